"""What fairseq's programs take beside their own flags, and what they cannot keep: accepted, mapped or refused.

``branch_flags.py`` has the flags of the branch that fairseq 0.12.2 lacks, ``backends.py`` those for several ranks.
"""

from __future__ import annotations

import ast
import functools
import logging
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from typing import Any

from fairseq import checkpoint_utils, options
from fairseq.dataclass import utils as dataclass_utils
from fairseq.utils import safe_getattr
from omegaconf import open_dict

from dmoe.integrations.fairseq_moe import backends, branch_flags
from dmoe.integrations.fairseq_moe.flags import FlagError, check_together, read_flags
from dmoe.integrations.fairseq_moe.overrides import of_capacity

logger = logging.getLogger(__name__)

_EVALUATION = "--model-overrides"  # a flag of every program that evaluates a checkpoint, and of no other


def register() -> None:
    """Have fairseq's programs ask this module for their flags; a second call does nothing."""
    for owner, ours in (
        (options, parse_args_and_arch),
        (dataclass_utils, convert_namespace_to_omegaconf),
        (checkpoint_utils, save_checkpoint),
    ):
        stock = getattr(owner, ours.__name__)
        if getattr(stock, "of_flags", False):
            continue
        replaced: Any = functools.wraps(stock)(functools.partial(ours, stock))
        replaced.of_flags = True
        for name, module in list(sys.modules.items()):  # fairseq's modules import such functions by name
            of_fairseq = name.partition(".")[0] in ("fairseq", "fairseq_cli", "__main__")
            if of_fairseq and vars(module).get(ours.__name__) is stock:
                setattr(module, ours.__name__, replaced)


def parse_args_and_arch(
    stock: Any,
    parser: ArgumentParser,
    input_args: Any = None,
    parse_known: bool = False,
    suppress_defaults: bool = False,
    modify_parser: Callable[[ArgumentParser], None] | None = None,
) -> Any:
    """As the stock one, with more flags, and those that were given checked and mapped."""

    def modify(parser: ArgumentParser) -> None:  # fairseq calls it before and after it adds a task's and a model's
        add_flags(parser)
        if modify_parser is not None:
            modify_parser(parser)

    parsed = stock(parser, input_args, parse_known, suppress_defaults, modify)
    try:
        settle(parsed[0] if isinstance(parsed, tuple) else parsed)
    except FlagError as error:
        raise SystemExit(f"fairseq_moe: {error}") from None
    return parsed


def convert_namespace_to_omegaconf(stock: Any, args: Namespace) -> Any:
    """As the stock one, which takes the flags that fairseq knows."""
    cfg = stock(args)
    with open_dict(cfg):
        branch_flags.keep(args, cfg)
    return cfg


def save_checkpoint(stock: Any, cfg: Any, trainer: Any, epoch_itr: Any, val_loss: Any) -> Any:
    """As the stock one, which without a loss takes no checkpoint for the best (``--no-best-checkpoints``)."""
    stock(cfg, trainer, epoch_itr, None if safe_getattr(cfg, "no_best_checkpoints", False) else val_loss)


def add_flags(parser: ArgumentParser) -> None:
    """What the branch has in its own parsers, and dmoe's own; as often as one likes."""
    branch_flags.add(parser)
    known = parser._option_string_actions
    task = known.get("--task")
    if task is not None and task.default is None:
        task.required = True  # `validate` has none by default, and fails over that

    def add(*spelled: str, **how: Any) -> None:
        if spelled[0] not in known:
            parser.add_argument(*spelled, **how)

    if _EVALUATION in known:
        add("--is-moe", action="store_true", help="the checkpoint has experts (also found out without this)")
        add(
            "--moe-eval-capacity-token-fraction",
            type=float,
            help="in place of the checkpoint's: rows of an expert as a share of the batch's tokens",
        )
        add("--moe-dropless", action="store_true", help="evaluate without capacity, however the model was trained")


def settle(args: Namespace) -> None:
    """Check and map what was parsed, in place.

    Raises:
        FlagError: what this fairseq cannot do, with what to use instead.
    """
    if hasattr(args, "max_update"):  # `generate` has an arch as well
        flags = read_flags(args)
        if flags.dummy_a2a and ranks(args) > 1:
            raise FlagError(
                "--dummy-a2a: expected one rank, got more: without exchange the experts compute other tokens; "
                "--record-a2a-perf-stats measures what the exchange costs"
            )
        for sentence in check_together(flags):
            logger.info(sentence)
    branch_flags.settle(args)
    _settle_batches(args)
    if getattr(args, "fp16_adam_stats", False) and not _has_fused_adam():
        args.fp16_adam_stats = False
        logger.info("--fp16-adam-stats: needs apex's FusedAdam, which is not here; Adam's moments stay in float32")
    backends.settle(args, ranks(args))
    if hasattr(args, "model_overrides"):
        _override_model(args)


def _settle_batches(args: Namespace) -> None:
    """``--max-valid-steps``, which every program accepts: it ends ``eval_lm`` and the validation in training early."""
    most = getattr(args, "max_valid_steps", None)
    if most is None:
        return
    if most < 0:
        raise FlagError(f"--max-valid-steps: expected at least 0, got {most}")
    if not hasattr(args, "max_update") and not hasattr(args, "context_window"):
        raise FlagError("--max-valid-steps: expected none where all batches are taken: train and eval_lm take a part")


def _override_model(args: Namespace) -> None:
    """Evaluation flags, as changes to the model's arguments in the checkpoint; ``overrides.py`` makes them."""
    flags = ("moe_eval_capacity_token_fraction", "moe_dropless", "is_moe")
    values = {name: getattr(args, name, None) for name in flags}
    given = {name: value for name, value in values.items() if value is not None and value is not False}
    changed = {**ast.literal_eval(args.model_overrides), **given}
    of_capacity(changed)
    if given:
        args.model_overrides = repr(changed)


def ranks(args: Namespace) -> int:
    """How many processes this run has: torchrun's or Slurm's word, or the flag's."""
    if os.environ.get("WORLD_SIZE"):
        return int(os.environ["WORLD_SIZE"])
    if os.environ.get("SLURM_NTASKS") and getattr(args, "distributed_port", -1) > 0:  # as fairseq asks for it
        return int(os.environ["SLURM_NTASKS"])
    return int(getattr(args, "distributed_world_size", None) or 1)


def _has_fused_adam() -> bool:
    from fairseq.optim.fused_adam import get_fused_adam_class

    return get_fused_adam_class() is not None
