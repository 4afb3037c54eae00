"""Cases of :mod:`kernel_cases`: products with quantised weights, and in fp8."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

CASES: dict[str, Callable[[], None]] = {}


def _quantized(
    format: str, columns_of_a_scale: int = 0, *, zero_points: bool = False, rank: int = 0, hidden: int = 2048,
    ffn: int = 768, tokens: int = 16384, dtype: torch.dtype = torch.bfloat16,
) -> None:  # fmt: skip
    """A product with quantised weights, both ways."""
    from dmoe.ops.quantized_gemm import quantized_gemm_cuda
    from dmoe.ops.weight_formats import FORMATS

    def tensor(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    form = FORMATS[format]
    block = form.rows, columns_of_a_scale or form.block(hidden)[1]
    codes = tensor(*form.codes_shape((32, ffn, hidden)), of=form.codes)
    scales = tensor(32, -(-ffn // block[0]), -(-hidden // block[1]), of=form.scales)
    offsets = tensor(33, of=torch.int32)
    for trans_b, inner, thin in ((True, hidden, (ffn, rank)), (False, ffn, (rank, hidden))):
        second = (tensor(tokens, rank), tensor(32, *thin)) if rank else (None, None)
        arguments = tensor(tokens, inner), codes, scales, scales if zero_points else None, format, list(block)
        quantized_gemm_cuda(*arguments, offsets, trans_b, *second)


_FORMATS = {
    "int8": ("int8", {}),
    "fp8": ("fp8", {}),
    "int4 of 128": ("int4", {"columns_of_a_scale": 128}),
    "int4 of 32 with zero points": ("int4", {"columns_of_a_scale": 32, "zero_points": True}),
    "nf4": ("nf4", {}),
    "nf4, rank 16": ("nf4", {"rank": 16}),
    "nf4, rank 256": ("nf4", {"rank": 256}),
    "nf4, float32": ("nf4", {"dtype": torch.float32}),
    "nf4, decode": ("nf4", {"tokens": 64}),
    "mxfp4": ("mxfp4", {}),
    "mxfp4, rank 8, odd rows": ("mxfp4", {"rank": 8, "ffn": 777}),
    "int8, odd sizes": ("int8", {"hidden": 1001, "ffn": 777}),
    "fp8, odd sizes": ("fp8", {"hidden": 1001, "ffn": 777}),
    "GPT-OSS's mxfp4": ("mxfp4", {"hidden": 2880, "ffn": 5760}),
}
for _name, (_format, _options) in _FORMATS.items():
    CASES[f"quantized_gemm: {_name}"] = functools.partial(_quantized, _format, **_options)


def _fp8(*, hidden: int = 2048, ffn: int = 768, tokens: int = 4096, gather: bool = True) -> None:
    """Rows gathered and quantised, a weight quantised, and their products both ways."""
    from dmoe.ops.fp8 import fp8_gemm_cuda, quantize_blocks_cuda, quantize_rows_cuda

    def tensor(*shape: int, of: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    index = tensor(4 * tokens, of=torch.int32) if gather else None
    rows = quantize_rows_cuda(tensor(tokens, hidden), index, tensor(4 * tokens, of=torch.float32) if gather else None)
    codes, scales, transposed = quantize_blocks_cuda(tensor(32, ffn, hidden), True)
    offsets = tensor(33, of=torch.int32)
    fp8_gemm_cuda(*rows, codes, scales, offsets, True, torch.bfloat16)
    grads = quantize_rows_cuda(tensor(rows[0].shape[0], ffn), None, None)
    fp8_gemm_cuda(*grads, transposed, scales.mT, offsets, True, torch.bfloat16)


CASES["fp8_gemm"] = _fp8
CASES["fp8_gemm, odd sizes"] = functools.partial(_fp8, hidden=1001, ffn=777, gather=False)
CASES["fp8_gemm, decode"] = functools.partial(_fp8, tokens=16)
