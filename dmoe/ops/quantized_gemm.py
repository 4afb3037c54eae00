"""One product per expert with quantised weights, which are decoded block by block and never as a whole."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dmoe.ops._library import define, refuse_double_backward
from dmoe.ops.grouped_gemm import rows_of_experts
from dmoe.ops.weight_formats import columns_of, decode

_BLOCK = 256  # rows or columns of one expert's weight that the reference decodes at a time, at least


def quantized_gemm_ref(
    a: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    format: str,
    block: Sequence[int],
    expert_offsets: Tensor,
    trans_b: bool,
    a2: Tensor | None = None,
    b2: Tensor | None = None,
) -> Tensor:
    """Plain-PyTorch meaning of :data:`quantized_gemm`; on CUDA it multiplies every row by every expert.

    It decodes a block of an expert's weight, multiplies all rows of the expert with it, and goes on.
    """
    columns = codes.shape[1] if trans_b else columns_of(codes, format)
    share = block[0] if trans_b else block[1]
    width = min(-(-_BLOCK // share) * share, columns)  # whole blocks of scales
    out = a.new_zeros(a.shape[0], columns)
    for e, (rows, others) in enumerate(rows_of_experts(expert_offsets, codes.shape[0], a.shape[0])):
        if others is None and rows.start == rows.stop:
            continue
        for begin in range(0, columns, width):
            end = min(begin + width, columns)
            weight = _part(codes, scales, zeros, format, block, a, e, begin, end, trans_b)
            product = a[rows] @ weight
            if a2 is not None and b2 is not None:
                product += a2[rows] @ (b2[e, begin:end].t() if trans_b else b2[e, :, begin:end])
            part = out[rows, begin:end]
            part.copy_(product if others is None else product.where(~others, part))
    return out


def _part(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    format: str,
    block: Sequence[int],
    like: Tensor,
    e: int,
    begin: int,
    end: int,
    trans_b: bool,
) -> Tensor:
    """Columns [begin, end) of what the rows of expert e are multiplied with, ``(inner, end - begin)``."""
    per_byte = columns_of(codes, format) // codes.shape[2]

    def cut(tensor: Tensor, by: int) -> Tensor:
        cut_to = slice(begin // by, -(-end // by))
        return tensor[e, cut_to] if trans_b else tensor[e, :, cut_to]

    by = block[0] if trans_b else block[1]
    of_zeros = None if zeros is None else cut(zeros, by)
    part = decode(cut(codes, 1 if trans_b else per_byte), cut(scales, by), of_zeros, format, block, like.dtype)
    return part.t() if trans_b else part


def _fake(
    a: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    format: str,
    block: Sequence[int],
    expert_offsets: Tensor,
    trans_b: bool,
    a2: Tensor | None = None,
    b2: Tensor | None = None,
) -> Tensor:
    return a.new_empty(a.shape[0], codes.shape[1] if trans_b else columns_of(codes, format))


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
)
refuse_double_backward(quantized_gemm)
