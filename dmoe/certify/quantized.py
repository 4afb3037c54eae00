"""Checks of the kernels of quantised weights and of fp8: codes and scales to the last bit, products as any other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dmoe.certify.compare import Run
from dmoe.certify.draw import Draw
from dmoe.certify.experts import counted
from dmoe.ops.fp8 import fp8_gemm_cuda, quantize_blocks_cuda, quantize_rows_cuda
from dmoe.ops.fp8_ref import dequantize_blocks, quantize_blocks_ref, quantize_rows_ref
from dmoe.ops.grouped_gemm import grouped_gemm_ref
from dmoe.ops.quantized_gemm import quantized_gemm_cuda
from dmoe.ops.weight_formats import decode, scales_shape

_TOKENS, _ROWS = 37, 53


def _bytes(draw: Draw, low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high, shape, generator=draw.generator, dtype=torch.uint8)


def product(asked: Sequence[Any], draw: Draw, *extra: Any) -> Iterator[Run]:
    """``quantized_gemm``: any codes but NaN; of an expert without rows all scales are NaN."""
    a, (size, columns, scale_type, zero_type), format, block, offsets, trans_b, a2, b2 = asked
    experts, rows, ends = counted(offsets, draw.device)
    codes = _bytes(draw, 0, 256, experts, *size)
    if format == "fp8":
        codes = torch.where(codes & 127 == 127, 0, codes).view(torch.float8_e4m3fn)
    elif format == "int8":
        codes = codes.view(torch.int8)
    shape = scales_shape((experts, size[0], columns), block)
    if format == "mxfp4":
        scales = _bytes(draw, 120, 125, *shape)
    else:
        scales = (torch.rand(shape, generator=draw.generator) + 0.25).div(8).to(scale_type)
    if experts > 1:
        scales[1] = 255 if format == "mxfp4" else torch.nan
    zeros = None if zero_type is None else _bytes(draw, 0, 16, *shape).to(zero_type)
    codes, scales = codes.to(draw.device), scales.to(draw.device)
    zeros = None if zeros is None else zeros.to(draw.device)

    def decoded(a: Tensor, a2: Tensor | None, b2: Tensor | None) -> dict[str, Tensor]:
        parts = zip(codes, scales, [None] * experts if zeros is None else zeros, strict=True)
        matrices = torch.stack([decode(*part, format, block, dtype).to(a.dtype) for part in parts])
        out = grouped_gemm_ref(a, matrices, ends, trans_b)
        return {"rows": out if a2 is None else out + grouped_gemm_ref(a2, b2, ends, trans_b)}  # type: ignore[arg-type]

    dtype = a["dtype"]
    yield Run(
        "a product with quantised weights",
        lambda a, a2, b2: {
            "rows": quantized_gemm_cuda(a, codes, scales, zeros, format, list(block), ends, trans_b, a2, b2)
        },
        decoded,
        (draw.normal(a, rows, scale=1.0), draw.normal(a2, rows, scale=1.0), draw.normal(b2, experts)),
    )


def _bits(function: Callable[..., Any], *names: str) -> Callable[..., dict[str, Tensor]]:
    def run(*arguments: Any) -> dict[str, Tensor]:
        found = zip(names, function(*arguments), strict=True)
        return {name: each.view(torch.uint8) if name != "scales" else each for name, each in found}

    return run


def rows(asked: Sequence[Any], draw: Draw, *extra: Any) -> Iterator[Run]:
    """``fp8_quantize_rows``: rows of zeros, and rows of no token."""
    tokens, row_to_token, row_weights = asked
    values, token = draw.normal(tokens, _TOKENS, scale=1.0), None
    if draw.device.type != "meta":
        values[3] = 0
    if row_to_token is not None:
        token = torch.randint(-1, _TOKENS, (_ROWS,), generator=draw.generator).int().to(draw.device)
    weights = draw.normal(row_weights, _TOKENS if token is None else _ROWS, scale=1.0)
    kernel, reference = (_bits(function, "codes", "scales") for function in (quantize_rows_cuda, quantize_rows_ref))
    # Not as arguments, which would be widened: wider numbers are not rounded where the operation rounds them.
    yield Run("rows in fp8", lambda: kernel(values, token, weights), lambda: reference(values, token, weights), ())


def blocks(asked: Sequence[Any], draw: Draw, *extra: Any) -> Iterator[Run]:
    """``fp8_quantize_blocks``."""
    weight, with_transposed = asked
    values = draw.normal(weight, min(2, weight["shape"][0]))
    names = ("codes", "scales", "transposed")
    kernel, reference = (_bits(function, *names) for function in (quantize_blocks_cuda, quantize_blocks_ref))
    yield Run("blocks in fp8", lambda: kernel(values, with_transposed), lambda: reference(values, with_transposed), ())


def fp8_product(asked: Sequence[Any], draw: Draw, *extra: Any) -> Iterator[Run]:
    """``fp8_gemm``."""
    (columns, inner), offsets, trans_b, dtype = asked
    experts, count, ends = counted(offsets, draw.device)
    generator = draw.generator
    codes, scales = quantize_rows_ref(torch.randn((count, inner), generator=generator))
    drawn = torch.randn((experts, columns, inner), generator=generator) * inner**-0.5
    w_codes, w_scales, turned = quantize_blocks_ref(drawn, True)
    codes, scales, w_codes, w_scales, turned = (
        each.to(draw.device) for each in (codes, scales, w_codes, w_scales, turned)
    )
    of_weight = (w_codes, w_scales) if trans_b else (turned, w_scales.mT)

    def decoded(like: Tensor) -> dict[str, Tensor]:
        # Exact in bfloat16 and wider; half precision is not wide enough for scales.
        wide = torch.float32 if like.dtype == torch.float16 else like.dtype
        matrices = torch.stack([dequantize_blocks(*each, wide) for each in zip(w_codes, w_scales, strict=True)])
        product = grouped_gemm_ref(codes.to(wide), matrices, ends, True) * scales.to(wide).unsqueeze(1)
        return {"rows": product.to(like.dtype)}

    yield Run(
        "a product in fp8",
        lambda like: {"rows": fp8_gemm_cuda(codes, scales, *of_weight, ends, trans_b, dtype)},
        decoded,
        (torch.ones(1, dtype=dtype, device=draw.device),),
    )
