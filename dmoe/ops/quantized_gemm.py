"""One product per expert with quantised weights, which are decoded block by block and never as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dmoe.ops._library import define, has_triton, refuse_double_backward
from dmoe.ops._trust import Subject, kind_of, precision
from dmoe.ops.grouped_gemm import by_rows_or_columns, rows_in_tiles, rows_of_experts
from dmoe.ops.tile_table import preferred_tile_rows
from dmoe.ops.weight_formats import FORMATS, columns_of, decode, scales_shape

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


def _served(
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
) -> bool:
    given = [a, codes, scales, *(tensor for tensor in (a2, b2) if tensor is not None)]
    columns = columns_of(codes, format)
    result = codes.shape[1] if trans_b else columns
    alike = all(tensor.dtype == a.dtype for tensor in (a2, b2) if tensor is not None)
    thin = a2 is None or (b2 is not None and (a2.shape[0], b2.shape[1 if trans_b else 2]) == (a.shape[0], result))
    fits = a.shape[1] == (columns if trans_b else codes.shape[1]) and codes.shape[0] == expert_offsets.shape[0] - 1
    form = FORMATS[format]
    known = block[0] == form.rows and (block[1] in form.columns or (not form.columns and block[1] == columns))
    ours = known and scales.shape == scales_shape((codes.shape[0], codes.shape[1], columns), block)
    return (
        has_triton()
        and a.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and all(tensor.numel() for tensor in given)
        and alike and thin and fits and ours
    )  # fmt: skip


def _subjects(*arguments: Any) -> Sequence[Subject]:
    if not _served(*arguments):
        return []
    a, codes, scales, zeros, format, block, expert_offsets, trans_b, a2, b2 = (*arguments, None, None)[:10]
    # Codes and scales are drawn anew, so their shapes are enough: they would be sent whole.
    told = codes.shape[1:], columns_of(codes, format), scales.dtype, None if zeros is None else zeros.dtype
    extra = (preferred_tile_rows(a.shape[0], expert_offsets.shape[0] - 1), precision())
    asked = (a, told, format, tuple(block), expert_offsets, trans_b, a2, b2)
    kind = (*told, format, tuple(block), trans_b, *map(kind_of, (a, a2, b2)))
    return [Subject("quantized_gemm", asked, extra, kind)]


def quantized_gemm_cuda(
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
    """Codes are decoded in the product's loop, in registers."""
    arguments = (a, codes, scales, zeros, format, block, expert_offsets, trans_b, a2, b2)
    if not _served(*arguments):
        return quantized_gemm_ref(*arguments)
    from dmoe.kernels.quantized_gemm import multiply_quantized_rows

    out = _fake(*arguments).zero_()  # rows of no expert stay zeros
    second = None if a2 is None or b2 is None else (a2.contiguous(), by_rows_or_columns(b2))
    multiply_quantized_rows(
        a.contiguous(),
        codes.contiguous(),
        scales.contiguous(),
        None if zeros is None else zeros.contiguous(),
        format,
        block,
        out,
        rows_in_tiles(a, expert_offsets),
        trans_b=trans_b,
        second=second,
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
