"""fp8 in plain PyTorch: what codes and scales mean, and what the operations of :mod:`dmoe.ops.fp8` compute.

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
import math

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from dmoe.ops.grouped_gemm import grouped_gemm
from dmoe.ops.weight_formats import FORMATS, spread

CODES, BLOCK = FORMATS["fp8"].codes, FORMATS["fp8"].rows  # as many columns as rows of a weight share a scale
_SQUARE = (BLOCK, BLOCK)
# 448 is 0.875 * 2^9: what does not fit under a scale's power takes the next.
_FRACTION, _EXPONENT = math.frexp(FORMATS["fp8"].largest)
# Exponents of scales: decoded numbers, the smallest codes among them, are normal numbers of bfloat16 and of float32.
_LEAST, _MOST = -110, 120
_ROWS_AT_ONCE = 2048  # of what is quantised, so that no copy of all rows in float32 is made


def power_of_two_scale(largest: Tensor) -> Tensor:
    """The least power of two by which ``largest``, magnitudes in float32, fit under 448: 1 for 0, NaN for no number."""
    fraction, exponent = torch.frexp(largest)
    exponent = (exponent - _EXPONENT + (fraction > _FRACTION)).clamp(_LEAST, _MOST)
    scale = ((exponent + 127) << 23).view(torch.float32)
    return scale.masked_fill(largest == 0, 1.0).masked_fill(~largest.isfinite(), torch.nan)


def quantize_rows_ref(
    rows: Tensor, row_to_token: Tensor | None = None, row_weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Plain-PyTorch meaning of :func:`dmoe.ops.fp8.quantize_rows`."""
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


def quantize_blocks_ref(weight: Tensor, with_transposed: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Plain-PyTorch meaning of :func:`dmoe.ops.fp8.quantize_blocks`, one expert after the other."""
    experts, height, width = weight.shape
    down, across = -(-height // BLOCK), -(-width // BLOCK)
    codes = weight.new_empty(weight.shape, dtype=CODES)
    scales = weight.new_empty((experts, down, across), dtype=torch.float32)
    transposed = weight.new_empty((experts, width, height) if with_transposed else (0,), dtype=CODES)
    for e in range(experts):
        values = weight[e].float()
        padded = torch.nn.functional.pad(values.abs(), (0, across * BLOCK - width, 0, down * BLOCK - height))
        scales[e] = power_of_two_scale(padded.view(down, BLOCK, across, BLOCK).amax((1, 3)))
        coded = (values / spread(scales[e], _SQUARE, values.shape)).to(CODES)
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
    """``(N, K)`` of one expert, as :func:`dmoe.ops.weight_formats.decode` has it, but never in float32 on the way.

    Scales that are powers of two need no rounding: bfloat16, float32 and float64 hold every code times every scale.
    """
    return decoded_codes(codes, dtype).mul_(spread(scales.to(dtype), _SQUARE, codes.shape))


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """Where decoded numbers are exact, and sums of products are rounded to ``dtype`` once.

    float16 is too narrow for scales, so its products are float32's. float64, in which gradients are checked, is its
    own: its sums are as exact as all others of such a model, though the numbers are codes'.
    """
    return dtype if dtype in (torch.bfloat16, torch.float64) else torch.float32


def fp8_gemm_ref(
    a_codes: Tensor,
    a_scales: Tensor,
    w_codes: Tensor,
    w_scales: Tensor,
    expert_offsets: Tensor,
    trans_b: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Plain-PyTorch meaning of :func:`dmoe.ops.fp8.fp8_gemm`: one expert's weight is decoded at a time.

    On CUDA, where the offsets would have to come to the host for that, all are, for one grouped product.
    """
    exact = exact_dtype(dtype)
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
