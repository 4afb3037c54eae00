"""Saving and loading through fairseq's own functions, which know of one file: here they meet those of ``parts.py``."""

from __future__ import annotations

import functools
import os
from itertools import chain
from typing import Any

import torch.distributed as dist
from fairseq import checkpoint_utils
from fairseq.distributed import utils as distributed_utils
from fairseq.utils import safe_getattr

from dmoe.integrations.fairseq_moe import parallel, parts
from dmoe.integrations.fairseq_moe.flags import FlagError

_found: dict[str, parts.Files] = {}  # what find_together found, for load_checkpoint_to_cpu to come


def register() -> None:
    """Put this module in front of four functions of ``fairseq.checkpoint_utils``; a second call does nothing."""
    for ours in (save_checkpoint, load_checkpoint, load_checkpoint_to_cpu, load_model_ensemble_and_task):
        stock = getattr(checkpoint_utils, ours.__name__)
        if not hasattr(stock, "of_dmoe"):
            replaced: Any = functools.wraps(stock)(functools.partial(ours, stock))
            replaced.of_dmoe = True
            setattr(checkpoint_utils, ours.__name__, replaced)


def save_checkpoint(stock: Any, cfg: Any, trainer: Any, epoch_itr: Any, val_loss: Any) -> Any:
    """A rank's own file; then, on the first rank, the shared one, under the same names and rules."""
    stock(cfg, trainer, epoch_itr, val_loss)
    if getattr(trainer, "spread", False) and trainer.data_parallel_rank == 0:
        with trainer.with_suffix("-shared"):
            stock(cfg, trainer, epoch_itr, val_loss)


def load_checkpoint(stock: Any, cfg: Any, trainer: Any, **passed_on: Any) -> Any:
    """As the stock one, with the same file name on every rank; ``trainer.load_checkpoint`` does the rest."""
    if not getattr(trainer, "num_experts", 0):
        return stock(cfg, trainer, **passed_on)
    path = cfg.restore_file
    if path == "checkpoint_last.pt":
        path = os.path.join(cfg.save_dir, path)
    files = find_together(path, trainer.num_experts)
    in_parts = files is not None and files.main != parts.stem_of(path) + ".pt"
    with trainer.with_suffix("-shared" if in_parts else ""):
        return stock(cfg, trainer, **passed_on)


def load_checkpoint_to_cpu(
    stock: Any, path: str, arg_overrides: Any = None, load_on_all_ranks: bool = False
) -> dict[str, Any]:
    """A state with the experts of this rank, whichever of a checkpoint's files the path names."""
    files = _found.pop(path, None) or parts.find(path)
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


def find_together(path: str, num_experts: int | None = None) -> parts.Files | None:
    """What the first rank finds (see :func:`parts.find`), for all ranks, which all have to ask.

    Raises:
        FlagError: on every rank, when the first one finds something wrong, or any rank lacks a file.
    """
    rank, ranks = parallel.world()
    answer: list[Any] = [None, None]
    if rank == 0:
        try:
            answer = [parts.find(path, num_experts), None]
        except FlagError as error:
            answer = [None, str(error)]
    if ranks > 1:
        group = distributed_utils.get_data_parallel_group()
        dist.broadcast_object_list(answer, src=dist.get_global_rank(group, 0), group=group)
    files, problem = answer
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
