"""Rows that the static mode has no room for: counted on the device, and whether a dispatcher is static at all now."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from torch import Tensor

OnOverflow = Literal["drop", "rerun"]


class Overflow:
    """What the dispatches of one dispatcher, and of those made from it for its chunks, had no room for.

    Args:
        on_overflow: see :class:`dmoe.parallel.AllToAllDispatcher`.

    Attributes:
        static: whether shapes are bounded now. With ``"rerun"`` only inside the first run of
            :func:`dmoe.parallel.exact_step`: nobody else would notice that rows are missing.
        compacts: whether rows are to lie without gaps, as in the dynamic mode: experts draw by a row's place.
        rows: rows without room since :meth:`clear`, scalar int64 on the device; None where none was counted yet.

    Raises:
        ValueError: another ``on_overflow``.
    """

    def __init__(self, on_overflow: str = "drop") -> None:
        if on_overflow not in get_args(OnOverflow):
            raise ValueError(
                f"AllToAllDispatcher: on_overflow: expected one of {', '.join(map(repr, get_args(OnOverflow)))}, got "
                f"{on_overflow!r}"
            )
        self.on_overflow, self.static = on_overflow, on_overflow == "drop"
        self.compacts = False
        self.rows: Tensor | None = None

    def count(self, rows_per_rank: Tensor, bound: int) -> Tensor:
        """Rows of one dispatch without room, a scalar int64; the host waits for nothing.

        Args:
            rows_per_rank: that were to go to each rank, ``(W,)`` integer.
            bound: that could.
        """
        lost = (rows_per_rank.long() - bound).clamp(min=0).sum()
        if self.on_overflow == "rerun":
            if self.rows is None or self.rows.device != lost.device:
                self.rows = torch.zeros_like(lost)
            self.rows.add_(lost)  # in place: a CUDA graph goes on counting here
        return lost

    def clear(self) -> None:
        """Count from 0 again."""
        if self.rows is not None:
            self.rows.zero_()


@contextmanager
def static(overflows: Iterable[Overflow]) -> Iterator[None]:
    """Shapes are bounded inside, for layers that know rows will be missed."""
    held = list(overflows)
    for each in held:
        each.clear()
        each.static = True
    try:
        yield
    finally:
        for each in held:
            each.static = each.on_overflow == "drop"
