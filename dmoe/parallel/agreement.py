"""Do all ranks run the same layer? Asked once, and answered alike on every rank: nobody is left waiting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def check_agreement(operation: str, fields: Mapping[str, Any], group: ProcessGroup, hints: Mapping[str, str]) -> None:
    """Compare ``fields`` over the ranks of a group; every rank must call this, and every rank gets the same answer.

    Args:
        operation: whose fields these are, for the message.
        fields: what has to be equal: short values with a telling ``repr``.
        group: the ranks.
        hints: by field, what to do when the ranks differ in it.

    Raises:
        ValueError: on every rank, naming each field that differs, its values, and the ranks that hold them.
    """
    mine = {name: repr(value) for name, value in fields.items()}
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    raise_unless_equal(operation, everyone, hints)


def raise_unless_equal(operation: str, by_rank: Sequence[Mapping[str, str]], hints: Mapping[str, str]) -> None:
    """Raise one sentence about every field in which the ranks' records differ.

    Args:
        operation: for the message.
        by_rank: one record for each rank of the group, in order.
        hints: by field, what to do about it.
    """
    differing = []
    for name in dict.fromkeys(name for record in by_rank for name in record):
        holders: dict[str, list[int]] = {}
        for rank, record in enumerate(by_rank):
            holders.setdefault(record.get(name, "nothing"), []).append(rank)
        if len(holders) > 1:
            said = ", ".join(f"{value} on {_ranks(ranks)}" for value, ranks in holders.items())
            differing.append(f"{name}: {said}" + (f" ({hints[name]})" if name in hints else ""))
    if differing:
        raise ValueError(
            f"{operation}: the ranks of the expert-parallel group disagree: {'; '.join(differing)}. Ranks are counted "
            "inside the group"
        )


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else "ranks " + ", ".join(map(str, ranks))
