"""Rows of the static mode without the gaps between them: in the places that they have in the dynamic mode."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Compaction:
    """Rows that are there first, in their order, and the gaps behind them.

    No shape changes, and the host waits for nothing. Dropout draws each row's mask by the row's place, and so draws the
    same ones in both modes.

    Args:
        here: which rows are there, ``(R,)`` bool.
    """

    def __init__(self, here: Tensor) -> None:
        self._order = (~here).to(torch.uint8).argsort(stable=True)
        self._place = torch.empty_like(self._order)
        self._place[self._order] = torch.arange(len(here), device=here.device)

    def apply(self, rows: Tensor) -> Tensor:
        """``(R, C)`` without gaps; differentiable."""
        moved: Tensor = _Moved.apply(rows, self._order, self._place)
        return moved

    def undo(self, rows: Tensor) -> Tensor:
        """``(R, C)`` as they came; differentiable."""
        moved: Tensor = _Moved.apply(rows, self._place, self._order)
        return moved


class _Moved(torch.autograd.Function):
    """``rows[order]``, whose gradient is gathered as well: a sum into zeros would lose the sign of a zero."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, place: Tensor) -> Tensor:
        ctx.order, ctx.place = order, place
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Moved.apply(grad, ctx.place, ctx.order), None, None
