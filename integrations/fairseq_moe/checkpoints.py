"""Saving and loading through fairseq's own functions, which know of one file: here they meet those of ``parts.py``."""

from __future__ import annotations

import functools
import os
from itertools import chain
from typing import Any

from fairseq import checkpoint_utils
from fairseq.utils import safe_getattr

from dmoe.integrations.fairseq_moe import finding, parallel, parts, saving
from dmoe.integrations.fairseq_moe.flags import FlagError

_found: dict[str, finding.Files] = {}  # what find_together found, for load_checkpoint_to_cpu to come


def register() -> None:
    """Put this module in front of four functions of ``fairseq.checkpoint_utils``; a second call does nothing."""
    for ours in (saving.save_checkpoint, load_checkpoint, load_checkpoint_to_cpu, load_model_ensemble_and_task):
        stock = getattr(checkpoint_utils, ours.__name__)
        if not hasattr(stock, "of_dmoe"):
            replaced: Any = functools.wraps(stock)(functools.partial(ours, stock))
            replaced.of_dmoe = True
            setattr(checkpoint_utils, ours.__name__, replaced)


def load_checkpoint(stock: Any, cfg: Any, trainer: Any, **passed_on: Any) -> Any:
    """As the stock one, with the same file name on every rank; ``trainer.load_checkpoint`` does the rest.

    Of ``checkpoint_last``, the one to go on from, nothing may be whole, as where another program was killed: then the
    newest whole checkpoint of the folder is taken, and the log says so.

    Raises:
        FlagError: on all ranks: what is named is not there, or not whole.
    """
    if not getattr(trainer, "num_experts", 0):
        return stock(cfg, trainer, **passed_on)
    path, finetune = cfg.restore_file, cfg.finetune_from_model
    goes_on = path == "checkpoint_last.pt"
    resets = cfg.reset_optimizer or cfg.reset_lr_scheduler or cfg.reset_meters or cfg.reset_dataloader
    if finetune is not None and (resets or not goes_on):
        return stock(cfg, trainer, **passed_on)  # which refuses them together
    if goes_on:
        path = os.path.join(cfg.save_dir, path)
    is_last = os.path.basename(parts.stem_of(path)) == "checkpoint_last"
    files = find_together(path, trainer.num_experts, or_another=is_last)
    try:
        if files is not None:
            cfg.restore_file, cfg.finetune_from_model = files.main, None  # training has begun: that is of no account
        elif finetune is not None:
            files = find_together(finetune, trainer.num_experts)
            if files is None:
                raise FlagError(
                    f"--finetune-from-model {finetune}: expected a checkpoint, of one rank or more, got none"
                )
            cfg.finetune_from_model = files.main
        with trainer.with_suffix(""), trainer.having_found(files):
            return stock(cfg, trainer, **passed_on)
    finally:
        cfg.restore_file, cfg.finetune_from_model = "checkpoint_last.pt" if goes_on else path, finetune


def load_checkpoint_to_cpu(
    stock: Any, path: str, arg_overrides: Any = None, load_on_all_ranks: bool = False
) -> dict[str, Any]:
    """A state with the experts of this rank, whichever of a checkpoint's files the path names."""
    files = _found.pop(path, None) or finding.find(path)
    if files is None or not files.num_experts:
        return stock(path, arg_overrides, load_on_all_ranks)
    state = stock(files.main, arg_overrides, load_on_all_ranks)
    if not load_on_all_ranks:  # no training to go on with: MoETrainer always says True
        state[parts.OPTIMIZER] = None
    rank, ranks = parallel.world()
    parts.take(state, files, rank, ranks)
    _move_in_data(state, ranks)
    return state


def _move_in_data(state: dict[str, Any], ranks: int) -> None:
    """The place in the epoch, which counts the batches of one rank, when there were more or fewer ranks."""
    iterator = (state.get("extra_state") or {}).get("train_iterator")
    wrote = safe_getattr(safe_getattr(state.get("cfg"), "distributed_training", None), "distributed_world_size", None)
    if iterator and wrote and wrote != ranks:  # rounded down: rather see a batch twice than never
        iterator["iterations_in_epoch"] = iterator.get("iterations_in_epoch", 0) * wrote // ranks


def load_model_ensemble_and_task(
    stock: Any,
    filenames: list[str],
    arg_overrides: Any = None,
    task: Any = None,
    strict: bool = True,
    suffix: str = "",
    *rest: Any,
    **options: Any,
) -> Any:
    """As the stock one, whose caller in fairseq gives all by position; ``X.pt`` also names a checkpoint in parts."""
    names = []
    for filename in filenames:
        files = find_together(filename)
        if files is None or not files.num_experts:
            names.append(filename.replace(".pt", suffix + ".pt") if suffix else filename)
        else:
            names.append(files.main)
    return stock(names, arg_overrides, task, strict, "", *rest, **options)


def find_together(path: str, num_experts: int | None = None, *, or_another: bool = False) -> finding.Files | None:
    """What the first rank finds (see :func:`finding.find`), for all ranks, which all have to ask.

    Raises:
        FlagError: on every rank, when the first one finds something wrong, or any rank lacks a file.
    """
    rank, _ = parallel.world()
    files, problem = None, None
    if rank == 0:
        try:
            files = finding.find(path, num_experts, or_another=or_another)
        except FlagError as error:
            problem = str(error)
    files, problem = parallel.from_first((files, problem))
    if files is not None:
        absent = next((each for each in (files.main, *files.parts) if not os.path.isfile(each)), None)
        if absent is not None:
            problem = (
                f"{absent}: expected this file on every rank, got none on rank {rank}; the folder has to be shared"
            )
    parallel.agreed(problem)
    if files is not None:
        _found[files.main] = files
    return files


def parameter_names(optimizer: Any, model: Any, criterion: Any) -> list[str]:
    """Names of what an optimizer trains, in the order in which its state counts them."""
    named = chain(model.named_parameters(), ((f"criterion.{n}", p) for n, p in criterion.named_parameters()))
    names = {id(parameter): name for name, parameter in named}
    if hasattr(optimizer, "fp16_params") and isinstance(optimizer.fp32_params, list):  # it trains copies
        pairs = zip(optimizer.fp16_params, optimizer.fp32_params, strict=True)
        names |= {id(copied): names[id(parameter)] for parameter, copied in pairs}
    return [names.get(id(parameter), "") for group in optimizer.param_groups for parameter in group["params"]]
