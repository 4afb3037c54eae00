"""In which order a weight lies in memory: products read it as it is, and its gradient comes in the same order."""

from __future__ import annotations

import torch
from torch import Tensor


def is_transposed(weight: Tensor) -> bool:
    """Whether the columns of ``(..., rows, columns)`` are contiguous, and the rows are not."""
    return weight.stride(-1) != 1 and weight.stride(-2) == 1


def is_interleaved(up: Tensor) -> bool:
    """Whether the rows of gate and up ``(E, 2, F, H)`` take turns in memory: gate 0, up 0, gate 1 and so on."""
    return up.dim() == 4 and up.stride(2) == 2 * up.stride(1) and not _in_one(up)


def _in_one(up: Tensor) -> bool:
    """Whether all rows of the gate, then all of up, are rows of one matrix."""
    return up.stride(1) == up.shape[2] * up.stride(2)


def in_memory_order(up: Tensor) -> Tensor:
    """Gate and up that are interleaved, ``(E, 2, F, ...)``, as ``(E, 2 F, ...)`` with the rows as they lie: a view."""
    return up.transpose(1, 2).flatten(1, 2)


def half_by_half(rows: Tensor) -> Tensor:
    """The inverse of :func:`in_memory_order`."""
    return rows.unflatten(1, (-1, 2)).transpose(1, 2)


def in_halves(rows: Tensor, interleaved: bool) -> Tensor:
    """Rows of gate and up ``(E, 2 F, ...)``, which take turns or come one after the other, as ``(E, 2, F, ...)``."""
    return half_by_half(rows) if interleaved else rows.unflatten(1, (2, -1))


def readable(weight: Tensor, *, packed: bool = False) -> Tensor:
    """``weight (..., rows, columns)`` as products can read it: itself, or else a contiguous copy.

    Rows or columns are to be contiguous, and whole ones to lie between an expert and the next, unless they are packed.
    Rows of gate and up may take turns.
    """
    if not packed and is_interleaved(weight):
        return weight if readable(rows := in_memory_order(weight)) is rows else weight.contiguous()
    between = weight.stride(-2 if weight.stride(-1) == 1 else -1)
    dense = weight.stride(-1) == 1 or is_transposed(weight)
    whole = packed or weight.stride(0) % max(between, 1) == 0
    return weight if weight.is_contiguous() or (dense and whole) else weight.contiguous()


def matrices(up: Tensor, gate: Tensor | None, gated: bool) -> tuple[Tensor, ...]:
    """An up projection of experts of one width as ``(E, C, H)``: of all columns, or of gate and up that lie apart.

    Of all columns in the order of memory, where they are interleaved: so come the products' columns.
    """
    if gate is not None:
        return gate, up
    if not gated:
        return (up,)
    if is_interleaved(up):
        return (in_memory_order(up),)
    return (up.flatten(1, 2),) if _in_one(up) else up.unbind(1)


def bias_beside(bias: Tensor, up: Tensor) -> Tensor:
    """The up projection's bias as kernels read it: interleaved, or contiguous, itself where it is."""
    if bias.is_contiguous() or (bias.dim() == 3 and bias.stride() == (2 * bias.shape[2], 1, 2)):
        return bias
    return bias.transpose(1, 2).contiguous().transpose(1, 2) if is_interleaved(up) else bias.contiguous()


def in_layout_of(weight: Tensor, grad: Tensor) -> Tensor:
    """A gradient in the order of ``torch.empty_like(weight)``: itself where it is in it, else a copy."""
    if grad.stride() == weight.stride():
        return grad
    out = torch.empty_like(weight)
    return grad if grad.stride() == out.stride() else out.copy_(grad)
