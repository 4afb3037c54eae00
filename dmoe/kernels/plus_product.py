"""The product that ends in another's sum: a tile of rows times a tile of their expert's weight, added in registers.

:mod:`dmoe.kernels.grouped_gemm` makes its sums of one or two of these, :mod:`dmoe.kernels.quantized_gemm` adds one to
its own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dmoe.kernels._pieces import operand_tile, rows_tile


@triton.jit
def plus_product(
    total,  # (rows of a tile, BLOCK_N) float32
    a,  # (R, K)
    weight,  # for each expert (N, K), or (K, N) with K_ROWS; from EXPERT_ROWS rows to the next
    first,
    rows,
    num_rows,
    expert,
    n0,
    K: tl.constexpr,
    N: tl.constexpr,
    A_STRIDE: tl.constexpr,
    EXPERT_ROWS: tl.constexpr,
    STRIDE: tl.constexpr,
    K_ROWS: tl.constexpr,
    DESCRIPTOR_A: tl.constexpr,
    DESCRIPTOR_B: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``total + a[rows] @ weight[expert]^T`` (``@ weight[expert]`` with K_ROWS), columns n0 and on."""
    even_k: tl.constexpr = K % BLOCK_K == 0
    even_n: tl.constexpr = N % BLOCK_N == 0
    # A row behind the end belongs to another expert or to nobody; it is computed and not stored.
    starts = a + tl.minimum(rows, num_rows - 1).to(tl.int64)[:, None] * A_STRIDE if not DESCRIPTOR_A else 0
    start = expert * EXPERT_ROWS
    for k in range(0, K, BLOCK_K):
        if DESCRIPTOR_A:  # noqa: SIM108  # the other branch would be compiled too
            left = a.load([first, k])
        else:
            left = rows_tile(starts, k + tl.arange(0, BLOCK_K), K, even_k)
        right = operand_tile(weight, start, n0, k, N, K, STRIDE, BLOCK_N, BLOCK_K, even_n, even_k, DESCRIPTOR_B, K_ROWS)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    return total
