"""Flags of the branch's commands that fairseq 0.12.2 lacks, or knows and cannot keep: accepted, mapped or refused."""

from __future__ import annotations

import ast
import functools
import logging
import os
from argparse import ArgumentParser, Namespace
from typing import Any

from fairseq import options

from dmoe.integrations.fairseq_moe import backends
from dmoe.integrations.fairseq_moe.flags import FlagError, read_flags

logger = logging.getLogger(__name__)

_EVALUATION = "--model-overrides"  # a flag of every program that evaluates a checkpoint, and of no other
_DATA = "--num-workers"


def register() -> None:
    """Have fairseq's programs ask :func:`add_flags` and :func:`settle`; a second call does nothing."""
    stock = options.parse_args_and_arch
    if getattr(stock, "of_dmoe", False):
        return

    @functools.wraps(stock)
    def parse_args_and_arch(parser: ArgumentParser, *rest: Any, **kwargs: Any) -> Any:
        add_flags(parser)
        parsed = stock(parser, *rest, **kwargs)
        try:
            settle(parsed[0] if isinstance(parsed, tuple) else parsed)
        except FlagError as error:
            raise SystemExit(f"fairseq_moe: {error}") from None
        return parsed

    parse_args_and_arch.of_dmoe = True  # type: ignore[attr-defined]
    options.parse_args_and_arch = parse_args_and_arch


def add_flags(parser: ArgumentParser) -> None:
    """What the branch has in its own parsers."""
    known = {spelled for action in parser._actions for spelled in action.option_strings}

    def add(*spelled: str, **how: Any) -> None:
        if spelled[0] not in known:
            parser.add_argument(*spelled, **how)

    if _DATA in known:
        add("--num-workers-valid", type=int, help="accepted: validation loads with --num-workers of fairseq 0.12.2")
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
    if hasattr(args, "arch"):
        flags = read_flags(args)
        if flags.dummy_a2a and ranks(args) > 1:
            raise FlagError(
                "--dummy-a2a: expected one rank, got more: without exchange the experts compute other tokens; "
                "--record-a2a-perf-stats measures what the exchange costs"
            )
    if getattr(args, "num_workers_valid", None) is not None:
        logger.info("--num-workers-valid: fairseq 0.12.2 has no such option; validation uses --num-workers")
    if getattr(args, "fp16_adam_stats", False) and not _has_fused_adam():
        args.fp16_adam_stats = False
        logger.info("--fp16-adam-stats: needs apex's FusedAdam, which is not here; Adam's moments stay in float32")
    backends.settle(args, ranks(args))
    if hasattr(args, "model_overrides"):
        _override_model(args)


def _override_model(args: Namespace) -> None:
    """Evaluation flags, as changes to the model's arguments in the checkpoint."""
    changed: dict[str, Any] = {}
    fraction, dropless = getattr(args, "moe_eval_capacity_token_fraction", None), getattr(args, "moe_dropless", False)
    if fraction is not None:
        changed["moe_eval_capacity_token_fraction"] = fraction
        if fraction > 0:  # a capacity was asked for, also of a model that was trained without
            changed["moe_dropless"] = False
    if dropless and changed.get("moe_dropless") is False:
        raise FlagError(f"--moe-dropless: expected no --moe-eval-capacity-token-fraction beside it, got {fraction}")
    if dropless:
        changed["moe_dropless"] = True
    if changed:
        args.model_overrides = repr({**ast.literal_eval(args.model_overrides), **changed})


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
