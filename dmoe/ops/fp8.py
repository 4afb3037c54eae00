"""Products of experts in fp8: rows and weights as e4m3 codes with a scale for each row, or each block of a weight.

A number is ``code * scale``. Scales are powers of two, rounded up: dividing by one, and multiplying by it again, rounds
nothing, so what is lost is the codes' own rounding, to four significant bits. Rows have a scale of their own
(activations differ in size from token to token), weights one for each 128 x 128 block, as in DeepSeek-V3
(arXiv 2412.19437, section 3.3.2).

e4m3 is the OCP 8-bit format (``float8_e4m3fn``): 4 exponent bits of bias 7, 3 of fraction, largest number 448, no
infinity. A row or a block that holds an infinity or NaN gets the scale NaN, and is NaN as a whole.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from dmoe.ops._checks import check_index_tensors
from dmoe.ops._library import count_flops, define, refuse_double_backward
from dmoe.ops.grouped_gemm import grouped_gemm

BLOCK = 128  # rows, and columns, of a weight that share a scale
CODES = torch.float8_e4m3fn
# 448 is 0.875 * 2^9: what does not fit under a scale's power takes the next.
_FRACTION, _EXPONENT = 0.875, 9
# Exponents of scales: decoded numbers, the smallest codes among them, are normal numbers of bfloat16 and of float32.
_LEAST, _MOST = -110, 120
_ROWS_AT_ONCE = 2048  # of what is quantised, so that no copy of all rows in float32 is made
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def power_of_two_scale(largest: Tensor) -> Tensor:
    """The least power of two by which ``largest``, magnitudes in float32, fit under 448: 1 for 0, NaN for no number."""
    fraction, exponent = torch.frexp(largest)
    exponent = (exponent - _EXPONENT + (fraction > _FRACTION)).clamp(_LEAST, _MOST)
    scale = ((exponent + 127) << 23).view(torch.float32)
    return scale.masked_fill(largest == 0, 1.0).masked_fill(~largest.isfinite(), torch.nan)


def quantize_rows_ref(
    rows: Tensor, row_to_token: Tensor | None = None, row_weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Plain-PyTorch meaning of :func:`quantize_rows`."""
    count, width = rows.shape[0] if row_to_token is None else row_to_token.shape[0], rows.shape[1]
    codes, scales = rows.new_empty((count, width), dtype=CODES), rows.new_empty(count, dtype=torch.float32)
    for begin in range(0, count, _ROWS_AT_ONCE):
        part = slice(begin, min(begin + _ROWS_AT_ONCE, count))
        if row_to_token is None:
            values = rows[part].float()
        else:
            token = row_to_token[part]
            values = rows[token.clamp(min=0)].float().masked_fill_((token < 0).unsqueeze(1), 0)
        if row_weights is not None:
            weight = row_weights[part].float()
            if row_to_token is not None:  # of no token: whatever stands there
                weight = weight.masked_fill(token < 0, 0)
            values = values * weight.unsqueeze(1)
        largest = values.abs().amax(1) if width else values.new_zeros(values.shape[0])
        scales[part] = power_of_two_scale(largest)
        codes[part] = (values / scales[part].unsqueeze(1)).to(CODES)
    return codes, scales


def _spread(scales: Tensor, rows: int, columns: int) -> Tensor:
    """``(ceil(rows / 128), ceil(columns / 128))`` as ``(rows, columns)``: each block's scale wherever it counts."""
    return scales.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]


def quantize_blocks_ref(weight: Tensor, with_transposed: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Plain-PyTorch meaning of :func:`quantize_blocks`, one expert after the other."""
    experts, height, width = weight.shape
    down, across = -(-height // BLOCK), -(-width // BLOCK)
    codes = weight.new_empty(weight.shape, dtype=CODES)
    scales = weight.new_empty((experts, down, across), dtype=torch.float32)
    transposed = weight.new_empty((experts, width, height) if with_transposed else (0,), dtype=CODES)
    for e in range(experts):
        values = weight[e].float()
        padded = torch.nn.functional.pad(values.abs(), (0, across * BLOCK - width, 0, down * BLOCK - height))
        scales[e] = power_of_two_scale(padded.view(down, BLOCK, across, BLOCK).amax((1, 3)))
        coded = (values / _spread(scales[e], height, width)).to(CODES)
        codes[e] = coded
        if with_transposed:
            transposed[e] = coded.t()
    return codes, scales, transposed


@functools.cache
def _numbers(dtype: torch.dtype) -> Tensor:
    """What each of the 256 codes stands for."""
    return torch.arange(256, dtype=torch.uint8).view(CODES).to(dtype)


def decoded_codes(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """``codes.to(dtype)``, which PyTorch does number by number on the CPU: there a table is nine times as fast."""
    if codes.device.type != "cpu" or torch.compiler.is_compiling() or is_fake(codes):
        return codes.to(dtype)
    with torch.inference_mode(False):
        table = _numbers(dtype)
    return table.index_select(0, codes.view(torch.uint8).flatten().int()).view(codes.shape)


def dequantize_blocks(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """``(N, K)`` of one expert: exact in bfloat16 and float32, which hold every code times every scale."""
    return decoded_codes(codes, dtype).mul_(_spread(scales.to(dtype), *codes.shape))


def _exact_in(dtype: torch.dtype) -> torch.dtype:
    """Where decoded numbers are exact, and sums are rounded to ``dtype`` once."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def fp8_gemm_ref(
    a_codes: Tensor,
    a_scales: Tensor,
    w_codes: Tensor,
    w_scales: Tensor,
    expert_offsets: Tensor,
    trans_b: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Plain-PyTorch meaning of :func:`fp8_gemm`: one expert's weight is decoded at a time.

    On CUDA, where the offsets would have to come to the host for that, all are, for one grouped product.
    """
    exact = _exact_in(dtype)
    rows, columns = a_codes.shape[0], w_codes.shape[1 if trans_b else 2]
    if a_codes.device.type != "cpu":
        weight = torch.stack([dequantize_blocks(c, s, exact) for c, s in zip(w_codes, w_scales, strict=True)])
        out = grouped_gemm(a_codes.to(exact), weight, expert_offsets, trans_b=trans_b)
        inside = (torch.arange(rows, device=out.device) < expert_offsets[-1]).unsqueeze(1)
        return torch.where(inside, out * a_scales.to(exact).unsqueeze(1), 0).to(dtype)
    out = a_codes.new_zeros((rows, columns), dtype=dtype)
    bounds = expert_offsets.tolist()
    if bounds[0] != 0 or bounds != sorted(bounds) or bounds[-1] > rows:
        raise RuntimeError(
            f"fp8_gemm: expert_offsets: expected a leading 0 and an ascending sequence up to {rows} rows, got {bounds}"
        )
    for e, (begin, end) in enumerate(itertools.pairwise(bounds)):
        if begin == end:
            continue
        weight = dequantize_blocks(w_codes[e], w_scales[e], exact).unsqueeze(0)
        of_all = torch.tensor([0, end - begin], dtype=torch.int32)
        product = grouped_gemm(decoded_codes(a_codes[begin:end], exact), weight, of_all, trans_b=trans_b)
        out[begin:end] = product * a_scales[begin:end].to(exact).unsqueeze(1)
    return out


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


_quantize_rows = define(
    "fp8_quantize_rows(Tensor rows, Tensor? row_to_token, Tensor? row_weights) -> (Tensor codes, Tensor scales)",
    quantize_rows_ref,
    fake=_fake_rows,
)
_quantize_blocks = define(
    "fp8_quantize_blocks(Tensor weight, bool with_transposed) -> (Tensor codes, Tensor scales, Tensor transposed)",
    quantize_blocks_ref,
    fake=_fake_blocks,
)
_fp8_gemm = define(
    "fp8_gemm(Tensor a_codes, Tensor a_scales, Tensor w_codes, Tensor w_scales, Tensor expert_offsets, bool trans_b, "
    "ScalarType dtype) -> Tensor",
    fp8_gemm_ref,
    fake=_fake_gemm,
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
