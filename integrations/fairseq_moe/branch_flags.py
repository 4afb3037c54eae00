"""Flags of the branch that fairseq 0.12.2 does not know: each acts, is told why it need not, or is refused."""

from __future__ import annotations

import logging
from argparse import ArgumentParser, Namespace
from typing import Any, NamedTuple

from dmoe.integrations.fairseq_moe.flags import FlagError

logger = logging.getLogger(__name__)

_TRAINING = "--max-update"  # a flag of `train` and `count`, and of no other; `generate` has an --arch


class _Flag(NamedTuple):
    """One flag of the branch.

    Attributes:
        spelled: its names.
        beside: a flag that programs have which take this one.
        told: its help, and what is said to whoever gives it.
        refused: whether that ends the program.
        group: the group of fairseq's config that has it on the branch, for flags that act; they are not told.
        kind: the type of its value; None for a switch.
    """

    spelled: tuple[str, ...]
    beside: str
    told: str
    refused: bool = False
    group: str = ""
    kind: type | None = None

    @property
    def name(self) -> str:
        """What it is called in the branch's config."""
        return self.spelled[0][2:].replace("-", "_")

    @property
    def held_as(self) -> str:
        """Where argparse puts it: nowhere where fairseq has something of this name."""
        return f"branch_{self.name}"


_FLAGS = (
    _Flag(
        ("--num-workers-valid",),
        "--num-workers",
        "fairseq 0.12.2 has no such option; validation uses --num-workers",
        kind=int,
    ),
    _Flag(
        ("--max-source-positions",),
        "--past-target",
        "a language model has no source; --max-target-positions counts",
        kind=int,
    ),
    _Flag(
        ("--log-nvidia-smi",),
        _TRAINING,
        "fairseq 0.12.2 has no such option; `nvidia-smi --loop 10` beside the training shows the same",
    ),
    _Flag(
        ("--symlink-best-and-last-checkpoints", "--symlink"),
        _TRAINING,
        "fairseq 0.12.2 has no such option; best and last are files of their own, as good and as large as the others",
    ),
    _Flag(("--no-best-checkpoints",), _TRAINING, "do not store best checkpoints", group="checkpoint"),
    _Flag(
        ("--stats-path", "--sp"),
        "--context-window",
        "write loss, perplexity, tokens and seconds into this file, to whose name .json is added",
        group="eval_lm",
        kind=str,
    ),
    _Flag(
        ("--use-stable-embedding",),
        _TRAINING,
        "expected none: bitsandbytes' embedding is not in fairseq 0.12.2; --layernorm-embedding normalises as well",
        refused=True,
    ),
    _Flag(
        ("--block-wise",),
        _TRAINING,
        "expected none: it cuts up the 8-bit moments of bitsandbytes' Adam, which is not in fairseq 0.12.2",
        refused=True,
    ),
)


def add(parser: ArgumentParser) -> None:
    """Let a parser take those that belong to its program; once all other flags are there, and again at will."""
    known = parser._option_string_actions
    for flag in _FLAGS:
        if flag.beside in known and flag.spelled[0] not in known:
            how: dict[str, Any] = {"action": "store_true"} if flag.kind is None else {"type": flag.kind}
            parser.add_argument(*flag.spelled, dest=flag.held_as, help=flag.told, **how)


def settle(args: Namespace) -> None:
    """Say what becomes of those that were given and do not act.

    Raises:
        FlagError: one that cannot be.
    """
    for flag in _FLAGS:
        if not flag.group and _given(args, flag):
            if flag.refused:
                raise FlagError(f"{flag.spelled[0]}: {flag.told}")
            logger.info(f"{flag.spelled[0]}: {flag.told}")


def keep(args: Namespace, cfg: Any) -> None:
    """Take those that act into fairseq's config, which knows its own alone, where the branch has them."""
    for flag in _FLAGS:
        if flag.group and _given(args, flag):
            cfg[flag.group][flag.name] = getattr(args, flag.held_as)


def _given(args: Namespace, flag: _Flag) -> bool:
    value = getattr(args, flag.held_as, None)
    return value is not None and value is not False  # 0 is a value
