"""One product per expert with quantised weights, which are decoded block by block and never as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dmoe.ops._library import define, has_triton, refuse_double_backward
from dmoe.ops._trust import Subject, kind_of, precision
from dmoe.ops.grouped_gemm import by_rows_or_columns, rows_in_tiles, rows_of_experts
from dmoe.ops.tile_table import preferred_tile_rows
from dmoe.ops.weight_formats import FORMATS, columns_of, decode, scales_shape

_BLOCK = 256  # rows or columns of one expert's weight that the reference decodes at a time, at least


class _Call(NamedTuple):
    """The arguments in the order of the operation's schema, beside which they are described."""

    a: Tensor
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    format: str
    block: Sequence[int]
    expert_offsets: Tensor
    trans_b: bool
    a2: Tensor | None = None
    b2: Tensor | None = None

    @property
    def columns(self) -> int:
        """Of the matrices, K."""
        return columns_of(self.codes, self.format)

    @property
    def width(self) -> int:
        """Columns of the result."""
        return self.codes.shape[1] if self.trans_b else self.columns

    @property
    def share(self) -> int:
        """How many columns of the result share a scale."""
        return self.block[0] if self.trans_b else self.block[1]


def quantized_gemm_ref(*arguments: Any) -> Tensor:
    """Plain-PyTorch meaning of :data:`quantized_gemm`; on CUDA it multiplies every row by every expert.

    It decodes a block of an expert's weight, multiplies all rows of the expert with it, and goes on.
    """
    call = _Call(*arguments)
    a, a2, b2 = call.a, call.a2, call.b2
    step = min(-(-_BLOCK // call.share) * call.share, call.width)  # whole blocks of scales
    out = a.new_zeros(a.shape[0], call.width)
    for e, (rows, others) in enumerate(rows_of_experts(call.expert_offsets, call.codes.shape[0], a.shape[0])):
        if others is None and rows.start == rows.stop:
            continue
        for begin in range(0, call.width, step):
            end = min(begin + step, call.width)
            product = a[rows] @ _part(call, e, begin, end)
            if a2 is not None and b2 is not None:
                product += a2[rows] @ (b2[e, begin:end].t() if call.trans_b else b2[e, :, begin:end])
            part = out[rows, begin:end]
            part.copy_(product if others is None else product.where(~others, part))
    return out


def _part(call: _Call, e: int, begin: int, end: int) -> Tensor:
    """Columns [begin, end) of what the rows of expert e are multiplied with, ``(inner, end - begin)``."""

    def cut(tensor: Tensor, by: int) -> Tensor:
        cut_to = slice(begin // by, -(-end // by))
        return tensor[e, cut_to] if call.trans_b else tensor[e, :, cut_to]

    codes = cut(call.codes, 1 if call.trans_b else 8 // FORMATS[call.format].bits)
    zeros = None if call.zeros is None else cut(call.zeros, call.share)
    part = decode(codes, cut(call.scales, call.share), zeros, call.format, call.block, call.a.dtype)
    return part.t() if call.trans_b else part


def _fake(*arguments: Any) -> Tensor:
    call = _Call(*arguments)
    return call.a.new_empty(call.a.shape[0], call.width)


def _served(call: _Call) -> bool:
    a, codes, block, trans_b, a2, b2 = call.a, call.codes, call.block, call.trans_b, call.a2, call.b2
    thin_ones = [tensor for tensor in (a2, b2) if tensor is not None]
    alike = all(tensor.dtype == a.dtype for tensor in thin_ones)
    thin = a2 is None or (b2 is not None and (a2.shape[0], b2.shape[1 if trans_b else 2]) == (a.shape[0], call.width))
    inner = call.columns if trans_b else codes.shape[1]
    fits = a.shape[1] == inner and codes.shape[0] == call.expert_offsets.shape[0] - 1
    form = FORMATS[call.format]
    known = block[0] == form.rows and (block[1] in form.columns or (not form.columns and block[1] == call.columns))
    ours = known and call.scales.shape == scales_shape((*codes.shape[:2], call.columns), block)
    return (
        has_triton()
        and a.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and all(tensor.numel() for tensor in (a, codes, call.scales, *thin_ones))
        and alike and thin and fits and ours
    )  # fmt: skip


def _subjects(*arguments: Any) -> Sequence[Subject]:
    call = _Call(*arguments)
    if not _served(call):
        return []
    # Codes and scales are drawn anew, so their shapes are enough: they would be sent whole.
    told = call.codes.shape[1:], call.columns, call.scales.dtype, None if call.zeros is None else call.zeros.dtype
    extra = (preferred_tile_rows(call.a.shape[0], call.expert_offsets.shape[0] - 1), precision())
    block, thin = tuple(call.block), (call.a2, call.b2)
    asked = (call.a, told, call.format, block, call.expert_offsets, call.trans_b, *thin)
    kind = (*told, call.format, block, call.trans_b, *map(kind_of, (call.a, *thin)))
    return [Subject("quantized_gemm", asked, extra, kind)]


def quantized_gemm_cuda(*arguments: Any) -> Tensor:
    """Codes are decoded in the product's loop, in registers."""
    call = _Call(*arguments)
    if not _served(call):
        return quantized_gemm_ref(*call)
    from dmoe.kernels.quantized_gemm import multiply_quantized_rows

    out = _fake(*call).zero_()  # rows of no expert stay zeros
    multiply_quantized_rows(
        call.a.contiguous(),
        call.codes.contiguous(),
        call.scales.contiguous(),
        None if call.zeros is None else call.zeros.contiguous(),
        call.format,
        FORMATS[call.format].bits,
        call.block,
        out,
        rows_in_tiles(call.a, call.expert_offsets),
        trans_b=call.trans_b,
        second=None if call.a2 is None or call.b2 is None else (call.a2.contiguous(), by_rows_or_columns(call.b2)),
    )
    return out


# ``out[r] = a[r] @ W[e]^T`` for the rows r of expert e, with ``trans_b=False`` ``a[r] @ W[e]``, where W is what
# :func:`dmoe.ops.weight_formats.decode` makes, in a's dtype; plus ``a2[r] @ b2[e]`` where these are given.
#
# a: ``(R, K)``, or ``(R, N)``, rows sorted by expert. codes, scales, zeros, format, block: matrices ``(E, N, K)``; see
# the module named above. expert_offsets: ``(E + 1,)`` int32; rows from its last on belong to no expert, and are 0.
# a2 ``(R, r)``; b2 ``(E, N, r)``, or ``(E, r, K)``: in a's dtype. The result is ``(R, N)``, or ``(R, K)``.
#
# Not differentiable, for those who know its gradient: weights are frozen, and a's is this operation the other way.
# What does not fit together is a RuntimeError.
quantized_gemm = define(
    "quantized_gemm(Tensor a, Tensor codes, Tensor scales, Tensor? zeros, str format, int[] block, "
    "Tensor expert_offsets, bool trans_b, Tensor? a2=None, Tensor? b2=None) -> Tensor",
    quantized_gemm_ref,
    fake=_fake,
    cuda=quantized_gemm_cuda,
    subjects=_subjects,
)
refuse_double_backward(quantized_gemm)
