"""``replicate``: spread one value per expert over the rows of that expert (MegaBlocks' ``ops.replicate``)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dmoe.ops._checks import check_integer, known
from dmoe.ops._library import define, register_autograd

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_DTYPES = (*_FLOATS, torch.int16, torch.int32, torch.int64)


def replicate_ref(x: Tensor, bins: Tensor, length: int) -> Tensor:
    """What :func:`replicate` computes for a 2-D ``x``, in plain PyTorch."""
    _check_bins("replicate", bins, length)
    position = torch.arange(length, device=x.device)
    column = torch.searchsorted(bins.long().contiguous(), position, right=True)
    return torch.where(column < bins.shape[0], x[:, column.clamp(max=bins.shape[0] - 1)], 0)


def replicate_backward_ref(grad: Tensor, bins: Tensor) -> Tensor:
    """The transpose of :func:`replicate`: sums of the columns ``bins[e-1] .. bins[e]``, in float32 or wider."""
    _check_bins("replicate_backward", bins, grad.shape[1])
    wide = grad.dtype if grad.dtype == torch.float64 else torch.float32
    ends = bins.long().clamp(max=grad.shape[1])
    # segment_reduce sums each segment in a fixed order; index_add would not on CUDA.
    offsets = torch.cat([ends.new_zeros(1), ends])
    sums = torch.segment_reduce(grad.T.to(wide).contiguous(), "sum", offsets=offsets, axis=0, unsafe=True, initial=0)
    return sums.T.to(grad.dtype).contiguous()


def _check_bins(name: str, bins: Tensor, length: int) -> None:
    """What the compiled CPU operation refuses, in the same words."""
    if bins.device.type != "cpu":
        return
    before = 0
    for e, end in enumerate(bins.tolist()):
        if not before <= end <= length:
            raise RuntimeError(f"dmoe::{name}: bins[{e}]: expected {before} .. {length} (never falling), got {end}")
        before = end


_replicate = define(
    "replicate(Tensor x, Tensor bins, SymInt length) -> Tensor",
    replicate_ref,
    fake=lambda x, bins, length: x.new_empty((x.shape[0], length)),
)
_replicate_backward = define(
    "replicate_backward(Tensor grad, Tensor bins) -> Tensor",
    replicate_backward_ref,
    fake=lambda grad, bins: grad.new_empty((grad.shape[0], bins.shape[0])),
)


def _save_bins(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.length = inputs[0].shape[1]


# Both are linear, and each is the other's transpose: gradients of any order come out of this pair.
register_autograd(
    _replicate,
    lambda ctx, grad: (_replicate_backward(grad, *ctx.saved_tensors), None, None),
    _save_bins,
)
register_autograd(
    _replicate_backward,
    lambda ctx, grad: (_replicate(grad, *ctx.saved_tensors, ctx.length), None),
    _save_bins,
)


def replicate(x: Tensor, bins: Tensor, length: int) -> Tensor:
    """Repeat each expert's value over its positions: ``out[b, i] = x[b, e]`` for ``bins[e-1] <= i < bins[e]``.

    Differentiable in ``x``; the gradient is the sum over the positions of each expert, accumulated in float32 (float64
    for float64) in a fixed order.

    Args:
        x: ``(B, E)`` or ``(E,)``, E >= 1: float16, bfloat16, float32, float64, int16, int32 or int64.
        bins: ``(E,)`` int32 or int64: the inclusive running sum of the rows per expert, that is ``expert_offsets[1:]``;
            never falling, in 0 .. length.
        length: positions of the result.

    Returns:
        ``(B, length)`` or ``(length,)``, the dtype of ``x``; 0 at ``bins[-1]`` and after it.

    Raises:
        TypeError: a dtype that is not listed.
        ValueError: shapes or devices do not agree, or a negative ``length``.
        RuntimeError: ``bins`` falls or leaves 0 .. length, on the CPU. On CUDA the result is then unspecified, but
            every value of it comes from the same row of ``x`` or is 0.
    """
    if x.dtype not in _DTYPES:
        raise TypeError(f"replicate: x: expected a float dtype or int16, int32, int64, got {x.dtype}")
    check_integer("replicate", bins=bins)
    if x.dim() not in (1, 2) or x.shape[-1] < 1:
        raise ValueError(f"replicate: x: expected shape (B, E) or (E,) with E >= 1, got {tuple(x.shape)}")
    if tuple(bins.shape) != (x.shape[-1],):
        raise ValueError(f"replicate: bins: expected shape ({x.shape[-1]},), got {tuple(bins.shape)}")
    if bins.device != x.device:
        raise ValueError(f"replicate: bins: expected device {x.device} of x, got {bins.device}")
    if known(length < 0):
        raise ValueError(f"replicate: length: expected at least 0, got {length}")
    if x.dim() == 1:
        return _replicate(x[None], bins, length)[0]
    return _replicate(x, bins, length)
