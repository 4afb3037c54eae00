"""Thin products against float64, and how far they may be from it.

Run as a program it prints, as JSON, what is off: which kernels run is chosen once a process.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator

import torch

from dmoe.ops.grouped_gemm import grouped_gemm, grouped_gemm_weight
from dmoe.ops.grouped_gemm_sum import grouped_gemm_sum

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# What makes this processor another one.
LEVELS = {
    "as it comes": {},
    "without bfloat16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "portable": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
}
# Inner and columns: one, below and above vectors of each length, sums of several blocks, several streams of columns.
SIZES = ((1, 1), (3, 5), (33, 16), (31, 67), (300, 130), (515, 9), (8, 1100), (270, 1050))
ROWS = (1, 2, 3, 4, 5, 7, 9, 17)
# Many rows, of few columns, or of few numbers in a sum: (rows, inner, columns).
THIN = (
    (40, 515, 1),
    (300, 257, 8),
    (70, 33, 16),
    (65, 300, 31),
    (300, 1, 67),
    (40, 8, 130),
    (257, 16, 33),
    (33, 31, 9),
)
UNIT = 2.0**-24  # what float32 rounds by, relatively


def random(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def offsets_of(counts: list[int]) -> torch.Tensor:
    return torch.tensor([0, *counts]).cumsum(0).int()


def excess(got: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> float:
    """How many times farther ``got`` is from ``a @ b`` than a sum in float32 that is rounded once may be; above 1 is
    wrong.

    A float32 sum of n products is off by at most n units of the sum of their magnitudes (Higham 2002, eq. 3.5).
    """
    a, b = a.double(), b.double()
    exact, size = a @ b, a.abs() @ b.abs()
    info = torch.finfo(got.dtype)
    once = 0.0 if got.dtype == torch.float32 else info.eps / 2
    bound = once * exact.abs() + (a.shape[-1] + 1) * UNIT * size + info.tiny * info.eps
    return float(((got.double() - exact).abs() / bound).nan_to_num(torch.inf).max()) if got.numel() else 0.0


def product(rows: int, inner: int, columns: int, dtype: torch.dtype, trans_b: bool) -> float:
    """:func:`excess` of one expert's rows."""
    a = random(rows, inner, dtype=dtype, seed=rows)
    b = random(1, *((columns, inner) if trans_b else (inner, columns)), dtype=dtype, seed=inner)
    got = grouped_gemm(a, b, offsets_of([rows]), trans_b=trans_b)
    return excess(got, a, b[0].T if trans_b else b[0])


def weight_gradient(rows: int, height: int, columns: int, dtype: torch.dtype) -> float:
    """:func:`excess` of one expert's; infinite unless an expert beside it, which has no rows, has zeros."""
    a, b = random(rows, height, dtype=dtype, seed=rows), random(rows, columns, dtype=dtype, seed=height)
    got = grouped_gemm_weight(a, b, offsets_of([0, rows]), 2)
    return float("inf") if got[0].any() else excess(got[1], a.T, b)


def added(rows: int, inner: int, columns: int, dtype: torch.dtype, trans_b: bool) -> float:
    """:func:`excess` of a product that is added to one of single numbers, which are rounded once themselves."""
    first, ones = random(rows, 1, dtype=dtype, seed=columns), torch.ones(1, columns, dtype=dtype)
    a, b = random(rows, inner, dtype=dtype, seed=rows), random(inner, columns, dtype=dtype, seed=inner)
    weights = [(w.T.contiguous() if trans_b else w)[None] for w in (ones, b)]
    got = grouped_gemm_sum(first, weights[0], a, weights[1], offsets_of([rows]), trans_b)
    return excess(got, torch.cat([first, a], 1), torch.cat([ones, b]))


def faults() -> Iterator[str]:
    """Whatever is off, over all dtypes, sizes and both orders of the weight."""
    few = ((rows, *size) for size in SIZES for rows in ROWS)
    for dtype, shape in itertools.product(DTYPES, (*few, *THIN)):
        found = {
            "columns": product(*shape, dtype, True),
            "rows": product(*shape, dtype, False),
            "columns added": added(*shape, dtype, True),
            "rows added": added(*shape, dtype, False),
            "gradient": weight_gradient(*shape, dtype),
        }
        yield from (f"{k} {dtype} {shape}: {v:.2f}" for k, v in found.items() if not v <= 1)


if __name__ == "__main__":
    print(json.dumps(list(faults())))
