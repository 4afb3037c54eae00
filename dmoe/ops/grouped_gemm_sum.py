"""Two products per expert in one pass: a weight's, and a thin one beside it, as adapters have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dmoe.ops._library import define, refuse_double_backward
from dmoe.ops._trust import Subject, kind_of, precision
from dmoe.ops.grouped_gemm import by_rows_or_columns, grouped_gemm_op, rows_in_tiles, triton_serves
from dmoe.ops.tile_table import preferred_tile_rows


def _fake(a: Tensor, b: Tensor, a2: Tensor, b2: Tensor, expert_offsets: Tensor, trans_b: bool) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1 if trans_b else 2])


def _served(a: Tensor, b: Tensor, a2: Tensor, b2: Tensor, expert_offsets: Tensor, trans_b: bool) -> bool:
    fits = a2.shape[0] == a.shape[0] and b.shape[1 if trans_b else 2] == b2.shape[1 if trans_b else 2]
    alike = a.dtype == b.dtype == a2.dtype == b2.dtype and b.shape[0] == b2.shape[0]
    return fits and alike and triton_serves(a, b, a2, b2)


def _composed(a: Tensor, b: Tensor, a2: Tensor, b2: Tensor, *rest: Any) -> Tensor:
    return grouped_gemm_op(a, b, *rest).add_(grouped_gemm_op(a2, b2, *rest))


def _subjects(*arguments: Any) -> Sequence[Subject]:
    if not _served(*arguments):
        return []
    a, expert_offsets, trans_b = arguments[0], arguments[4], arguments[5]
    extra = (preferred_tile_rows(a.shape[0], expert_offsets.shape[0] - 1), precision())
    return [Subject("grouped_gemm_sum", arguments, extra, (*map(kind_of, arguments[:4]), trans_b))]


def grouped_gemm_sum_cuda(
    a: Tensor, b: Tensor, a2: Tensor, b2: Tensor, expert_offsets: Tensor, trans_b: bool
) -> Tensor:
    """Both products in one launch."""
    if not _served(a, b, a2, b2, expert_offsets, trans_b):
        return _composed(a, b, a2, b2, expert_offsets, trans_b)
    from dmoe.kernels.moe_mlp import multiply_rows

    a, a2 = a.contiguous(), a2.contiguous()
    b, b2 = by_rows_or_columns(b), by_rows_or_columns(b2)
    out = a.new_zeros(a.shape[0], b.shape[1 if trans_b else 2])  # rows of no expert stay zeros
    kernel = "down" if trans_b else "row_grad"
    multiply_rows(kernel, a, b, out, rows_in_tiles(a, expert_offsets), trans_b=trans_b, second=(a2, b2))
    return out


# ``a b + a2 b2``, of the same rows, experts and columns, in one pass: a thin second product is added in cache. Not
# differentiable, for those who know its gradient.
grouped_gemm_sum = define(
    "grouped_gemm_sum(Tensor a, Tensor b, Tensor a2, Tensor b2, Tensor expert_offsets, bool trans_b) -> Tensor",
    _composed,
    fake=_fake,
    cuda=grouped_gemm_sum_cuda,
    subjects=_subjects,
)
refuse_double_backward(grouped_gemm_sum)
