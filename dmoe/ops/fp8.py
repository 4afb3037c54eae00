"""Products of experts in fp8: rows and weights as e4m3 codes with a scale for each row, or each block of a weight.

Three operations, of which none is differentiable: whoever calls them knows the gradient. :mod:`dmoe.ops.fp8_ref` says
what numbers codes and scales stand for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dmoe.ops._checks import check_index_tensors
from dmoe.ops._library import count_flops, define, has_triton, refuse_double_backward
from dmoe.ops._trust import Subject, kind_of
from dmoe.ops.fp8_ref import BLOCK, CODES, fp8_gemm_ref, quantize_blocks_ref, quantize_rows_ref
from dmoe.ops.grouped_gemm import by_rows_or_columns, rows_in_tiles
from dmoe.ops.tile_table import preferred_tile_rows

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _fake_rows(rows: Tensor, row_to_token: Tensor | None, row_weights: Tensor | None) -> tuple[Tensor, Tensor]:
    count = rows.shape[0] if row_to_token is None else row_to_token.shape[0]
    return rows.new_empty((count, rows.shape[1]), dtype=CODES), rows.new_empty((count,), dtype=torch.float32)


def _fake_blocks(weight: Tensor, with_transposed: bool) -> tuple[Tensor, Tensor, Tensor]:
    experts, height, width = weight.shape
    blocks = (experts, -(-height // BLOCK), -(-width // BLOCK))
    turned = (experts, width, height) if with_transposed else (0,)
    return (
        weight.new_empty(weight.shape, dtype=CODES),
        weight.new_empty(blocks, dtype=torch.float32),
        weight.new_empty(turned, dtype=CODES),
    )


def _fake_gemm(a_codes: Tensor, a_scales: Tensor, w_codes: Tensor, *rest: Any) -> Tensor:
    trans_b, dtype = rest[2], rest[3]
    return a_codes.new_empty((a_codes.shape[0], w_codes.shape[1 if trans_b else 2]), dtype=dtype)


def _rows_served(rows: Tensor, row_to_token: Tensor | None, row_weights: Tensor | None) -> bool:
    count = rows.shape[0] if row_to_token is None else row_to_token.shape[0]
    return has_triton() and rows.dtype != torch.float64 and bool(count and rows.numel())


def quantize_rows_cuda(rows: Tensor, row_to_token: Tensor | None, row_weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows are read once, where they are as short as a program's step, else once more from cache."""
    if not _rows_served(rows, row_to_token, row_weights):
        return quantize_rows_ref(rows, row_to_token, row_weights)
    from dmoe.kernels import fp8 as kernels

    codes, scales = _fake_rows(rows, row_to_token, row_weights)
    token, weights = (None if each is None else each.contiguous() for each in (row_to_token, row_weights))
    kernels.quantize_rows(rows.contiguous(), token, weights, codes.view(torch.uint8), scales)
    return codes, scales


def _blocks_served(weight: Tensor) -> bool:
    return has_triton() and weight.dtype != torch.float64 and bool(weight.numel())


def quantize_blocks_cuda(weight: Tensor, with_transposed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """One launch for all three results."""
    if not _blocks_served(weight):
        return quantize_blocks_ref(weight, with_transposed)
    from dmoe.kernels import fp8 as kernels

    codes, scales, transposed = _fake_blocks(weight, with_transposed)
    turned = transposed.view(torch.uint8) if with_transposed else None
    kernels.quantize_blocks(by_rows_or_columns(weight), codes.view(torch.uint8), scales, turned)
    return codes, scales, transposed


def _gemm_served(a_codes: Tensor, w_codes: Tensor) -> bool:
    """fp8 tensor cores came with compute capability 8.9."""
    if not has_triton() or not a_codes.numel() or not w_codes.numel():
        return False
    from dmoe.kernels._launch import capability

    return capability(a_codes.device) >= 89


def fp8_gemm_cuda(
    a_codes: Tensor,
    a_scales: Tensor,
    w_codes: Tensor,
    w_scales: Tensor,
    expert_offsets: Tensor,
    trans_b: bool,
    dtype: torch.dtype,
) -> Tensor:
    """On fp8 tensor cores where there are any."""
    if not _gemm_served(a_codes, w_codes):
        return fp8_gemm_ref(a_codes, a_scales, w_codes, w_scales, expert_offsets, trans_b, dtype)
    from dmoe.kernels.fp8 import fp8_multiply_rows

    if not trans_b:
        w_codes, w_scales = w_codes.mT, w_scales.mT
    out = a_codes.new_zeros((a_codes.shape[0], w_codes.shape[1]), dtype=dtype)  # rows of no expert stay zeros
    rows = rows_in_tiles(a_codes, expert_offsets)
    fp8_multiply_rows(a_codes.contiguous(), a_scales.contiguous(), w_codes.contiguous(), w_scales, out, rows)
    return out


def _rows_subjects(*arguments: Any) -> Sequence[Subject]:
    return [Subject("fp8_quantize_rows", arguments)] if _rows_served(*arguments) else []


def _blocks_subjects(weight: Tensor, with_transposed: bool) -> Sequence[Subject]:
    kind = (kind_of(weight), tuple(weight.shape[1:]), with_transposed)
    return [Subject("fp8_quantize_blocks", (weight, with_transposed), (), kind)] if _blocks_served(weight) else []


def _gemm_subjects(
    a_codes: Tensor, a_scales: Tensor, w_codes: Tensor, w_scales: Tensor, expert_offsets: Tensor, *rest: Any
) -> Sequence[Subject]:
    if not _gemm_served(a_codes, w_codes):
        return []
    trans_b, dtype = rest
    shape = tuple((w_codes if trans_b else w_codes.mT).shape[1:])
    extra = (preferred_tile_rows(a_codes.shape[0], expert_offsets.shape[0] - 1),)
    # Numbers are drawn and quantised anew, so sizes are enough. What decides is the order of the scales, too.
    asked, kind = (shape, expert_offsets, trans_b, dtype), (*shape, trans_b, dtype, w_scales.stride()[1:])
    return [Subject("fp8_gemm", asked, extra, kind)]


_quantize_rows = define(
    "fp8_quantize_rows(Tensor rows, Tensor? row_to_token, Tensor? row_weights) -> (Tensor codes, Tensor scales)",
    quantize_rows_ref,
    fake=_fake_rows,
    cuda=quantize_rows_cuda,
    subjects=_rows_subjects,
)
_quantize_blocks = define(
    "fp8_quantize_blocks(Tensor weight, bool with_transposed) -> (Tensor codes, Tensor scales, Tensor transposed)",
    quantize_blocks_ref,
    fake=_fake_blocks,
    cuda=quantize_blocks_cuda,
    subjects=_blocks_subjects,
)
_fp8_gemm = define(
    "fp8_gemm(Tensor a_codes, Tensor a_scales, Tensor w_codes, Tensor w_scales, Tensor expert_offsets, bool trans_b, "
    "ScalarType dtype) -> Tensor",
    fp8_gemm_ref,
    fake=_fake_gemm,
    cuda=fp8_gemm_cuda,
    subjects=_gemm_subjects,
)
for _op in (_quantize_rows, _quantize_blocks, _fp8_gemm):
    refuse_double_backward(_op)


def _check_floats(op: str, name: str, tensor: Tensor, dims: int, shape: str) -> None:
    if tensor.dtype not in _FLOATS:
        raise TypeError(f"{op}: {name}: expected float32, float64, bfloat16 or float16, got {tensor.dtype}")
    if tensor.dim() != dims:
        raise ValueError(f"{op}: {name}: expected shape {shape}, got {tuple(tensor.shape)}")


def quantize_rows(
    rows: Tensor, row_to_token: Tensor | None = None, row_weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Rows as e4m3 codes, each with the least power of two under which it fits; gathered, and weighed, on the way.

    Not differentiable: for those who know the gradient.

    Args:
        rows: ``(R, K)``, or with ``row_to_token`` the tokens ``(T, K)``; float32, float64 (as float32), bfloat16 or
            float16. Rows that belong to nobody may hold anything.
        row_to_token: ``(R,)`` int32, the token of each row, negative for none: such a row is zeros of scale 1.
        row_weights: ``(R,)`` floating point, multiplies each row, in float32, before it is quantised.

    Returns:
        codes ``(R, K)`` float8_e4m3fn and scales ``(R,)`` float32; row r is about ``codes[r] * scales[r]``. A row of
        zeros has scale 1, a row with an infinity or NaN the scale NaN.

    Raises:
        TypeError: a dtype that is not supported.
        ValueError: shapes or devices that do not fit.
    """
    op = "fp8_quantize_rows"
    _check_floats(op, "rows", rows, 2, "(R, K)")
    if row_to_token is not None:
        check_index_tensors(op, rows.device, row_to_token=row_to_token)
    count = rows.shape[0] if row_to_token is None else row_to_token.shape[0]
    if row_weights is not None:
        _check_floats(op, "row_weights", row_weights, 1, "(R,)")
        if row_weights.shape[0] != count:
            raise ValueError(f"{op}: row_weights: expected one for each of {count} rows, got {row_weights.shape[0]}")
    return _quantize_rows(rows, row_to_token, row_weights)


def quantize_blocks(weight: Tensor, *, with_transposed: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
    """Weights as e4m3 codes with a power of two for each 128 x 128 block; blocks at the edges may be ragged.

    Not differentiable: for those who know the gradient.

    Args:
        weight: ``(E, N, K)`` float32, float64 (as float32), bfloat16 or float16.
        with_transposed: give the transposed codes too. Tensor cores multiply fp8 only along what is contiguous in both
            factors, so the product that sums over N reads them.

    Returns:
        codes ``(E, N, K)`` float8_e4m3fn, scales ``(E, ceil(N / 128), ceil(K / 128))`` float32, and the same codes as
        ``(E, K, N)``, or None; their scales are ``scales.mT``.

    Raises:
        TypeError: a dtype that is not supported.
        ValueError: another number of dimensions than three.
    """
    _check_floats("fp8_quantize_blocks", "weight", weight, 3, "(E, N, K)")
    codes, scales, transposed = _quantize_blocks(weight, with_transposed)
    return codes, scales, transposed if with_transposed else None


def fp8_gemm(
    a_codes: Tensor,
    a_scales: Tensor,
    w_codes: Tensor,
    w_scales: Tensor,
    expert_offsets: Tensor,
    *,
    trans_b: bool = True,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Multiply each row by the matrix of its expert, both in fp8: :func:`dmoe.ops.grouped_gemm` of what they stand for.

    Sums are in float32 and rounded to ``dtype`` once. Rows from ``expert_offsets[-1]`` on are zeros. On CUDA it takes
    compute capability 8.9 or more to multiply fp8; others multiply decoded numbers. Not differentiable.

    Args:
        a_codes, a_scales: ``(R, Kd)`` and ``(R,)``, as :func:`quantize_rows` gives them; rows sorted by expert.
        w_codes, w_scales: as :func:`quantize_blocks` gives them: ``(E, N, Kd)`` and ``(E, ceil(N / 128),
            ceil(Kd / 128))``; with ``trans_b=False`` ``(E, Kd, N)`` and the scales likewise. CUDA copies codes that are
            not contiguous along Kd.
        expert_offsets: ``(E + 1,)`` int32, the first row of each expert, a leading 0, ascending.
        trans_b: see ``w_codes``.
        dtype: of the result: float32, bfloat16 or float16.

    Returns:
        ``(R, N)``.

    Raises:
        TypeError: a dtype that is not supported.
        ValueError: shapes or devices that do not fit.
        RuntimeError: offsets that do not ascend from 0 to at most R, on the CPU; on CUDA they are cut to that range.
    """
    op = "fp8_gemm"
    count_flops()
    for name, codes in (("a_codes", a_codes), ("w_codes", w_codes)):
        if codes.dtype != CODES:
            raise TypeError(f"{op}: {name}: expected {CODES}, got {codes.dtype}")
    for name, scales in (("a_scales", a_scales), ("w_scales", w_scales)):
        if scales.dtype != torch.float32:
            raise TypeError(f"{op}: {name}: expected torch.float32, got {scales.dtype}")
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"{op}: dtype: expected float32, bfloat16 or float16, got {dtype}")
    check_index_tensors(op, a_codes.device, expert_offsets=expert_offsets)
    if a_codes.dim() != 2 or a_scales.shape != a_codes.shape[:1]:
        raise ValueError(
            f"{op}: expected a_codes (R, Kd) and a_scales (R,), got {tuple(a_codes.shape)} and {tuple(a_scales.shape)}"
        )
    experts = expert_offsets.shape[0] - 1
    if w_codes.dim() != 3 or w_codes.shape[0] != experts or w_codes.shape[2 if trans_b else 1] != a_codes.shape[1]:
        order = "(E, N, Kd)" if trans_b else "(E, Kd, N)"
        raise ValueError(
            f"{op}: w_codes: expected {order} with E = {experts} and Kd = {a_codes.shape[1]}, got "
            f"{tuple(w_codes.shape)}"
        )
    blocks = (experts, *(-(-length // BLOCK) for length in w_codes.shape[1:]))
    if w_scales.shape != blocks:
        raise ValueError(f"{op}: w_scales: expected {blocks}, one for each block, got {tuple(w_scales.shape)}")
    return _fp8_gemm(a_codes, a_scales, w_codes, w_scales, expert_offsets, trans_b, dtype)
