"""Products of rows with quantised weights, decoded inside the loop over K: no decoded weight is ever in memory.

A tile of codes comes like any operand, in a quarter or half of its bytes, is decoded in registers to the rows' dtype
and multiplied. A decoded value is computed in float32 and rounded once, as :mod:`dmoe.ops.weight_formats` has it: the
kernel and plain PyTorch multiply the same numbers. e4m3 and e2m1 are read as float32 whose exponent is too small,
which takes no GPU that knows fp8.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmoe.kernels._launch import launch
from dmoe.kernels._pieces import count_tiles, inside_of, matrix_tile, part_of, place, rows_tile, tile_rows
from dmoe.kernels.fp8 import BLOCK
from dmoe.kernels.operands import (
    Product,
    Rows,
    config_of,
    copy_descriptor,
    persistent,
    precision,
    shape_options,
)
from dmoe.kernels.plus_product import plus_product

_ALL = 1 << 30  # columns that share a scale, where all do: more than there are, and a power of two


@triton.jit
def _nf4():
    """The 16 quantiles by code (QLoRA, appendix E), float32: made once, from constants, before any loop."""
    code = tl.arange(0, 16)
    a, b, c, d = (code & 1) != 0, (code & 2) != 0, (code & 4) != 0, (code & 8) != 0
    v0 = tl.where(a, -0.6961928009986877, -1.0)
    v1 = tl.where(a, -0.39491748809814453, -0.5250730514526367)
    v2 = tl.where(a, -0.18477343022823334, -0.28444138169288635)
    v3 = tl.where(a, 0.0, -0.09105003625154495)
    v4 = tl.where(a, 0.16093020141124725, 0.07958029955625534)
    v5 = tl.where(a, 0.33791524171829224, 0.24611230194568634)
    v6 = tl.where(a, 0.5626170039176941, 0.44070982933044434)
    v7 = tl.where(a, 1.0, 0.7229568362236023)
    low = tl.where(c, tl.where(b, v3, v2), tl.where(b, v1, v0))
    high = tl.where(c, tl.where(b, v7, v6), tl.where(b, v5, v4))
    return tl.where(d, high, low)


@triton.jit
def _e4m3(code):
    """float32 of e4m3's bits: where float32 has exponent and fraction they are 2^-120 of it, but for NaN."""
    bits = code.to(tl.uint32)
    magnitude = bits & 0x7F
    tiny = ((magnitude << 20) | ((bits & 0x80) << 24)).to(tl.float32, bitcast=True)
    return tl.where(magnitude == 0x7F, float("nan"), tiny * 1.329227995784916e36)


@triton.jit
def _e2m1(code):
    """float32 of e2m1's bits, likewise: 2^-126 of it."""
    bits = code.to(tl.uint32)
    tiny = (((bits & 7) << 22) | ((bits & 8) << 28)).to(tl.float32, bitcast=True)
    return tiny * 8.507059173023462e37


@triton.jit
def _e8m0(code):
    """float32 of e8m0's bits: 2^(code - 127), NaN for 255."""
    bits = code.to(tl.uint32)
    bits = tl.where(bits == 0, 0x00400000, tl.where(bits == 255, 0x7FC00000, bits << 23))
    return bits.to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def _per_group(
    source,
    row,
    column,
    row_end,
    column_end: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    E8M0: tl.constexpr,
):
    """Scales or zero points of a tile whose rows have one for each GROUP columns, in float32, as wide as it needs.

    ``(ROWS, 1)`` where the tile's columns share one, else ``(ROWS, COLUMNS)``. Zeros behind the ends.
    """
    groups: tl.constexpr = (COLUMNS + GROUP - 1) // GROUP
    width: tl.constexpr = (column_end + GROUP - 1) // GROUP
    rows = row + tl.arange(0, ROWS)
    group = column // GROUP + tl.arange(0, groups)
    mask = (rows < row_end)[:, None] & (group < width)[None, :]
    values = tl.load(source + rows.to(tl.int64)[:, None] * width + group[None, :], mask=mask, other=0)
    values = _e8m0(values) if E8M0 else values.to(tl.float32)
    if groups > 1:
        values = tl.broadcast_to(values[:, :, None], (ROWS, groups, GROUP))
        values = tl.reshape(values, (ROWS, COLUMNS))
    return values


@triton.jit
def decoded_tile(
    codes,  # (E N, K), or (E N, K / 2) of two codes a byte
    scales,
    zeros,  # like scales, or None
    expert,
    n0,
    k0,
    N: tl.constexpr,
    K: tl.constexpr,
    FORMAT: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    DTYPE: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """``(ROWS, COLUMNS)`` of an expert's matrix from row n0 and column k0 on, in DTYPE.

    Zeros behind its last column, and behind its last row unless a descriptor reads on: see :func:`matrix_tile`.
    """
    pack: tl.constexpr = 8 // BITS
    first = expert * N
    code = matrix_tile(
        codes, first + n0, k0 // pack, first + N, K // pack, K // pack, ROWS, COLUMNS // pack, N % ROWS == 0,
        K % COLUMNS == 0, DESCRIPTOR,
    )  # fmt: skip
    if pack == 2:
        code = tl.reshape(tl.join(code & 15, code >> 4), (ROWS, COLUMNS))
    if FORMAT == "fp8":  # a tile lies in one block
        down: tl.constexpr = (N + BLOCK - 1) // BLOCK
        across: tl.constexpr = (K + BLOCK - 1) // BLOCK
        scale = tl.load(scales + (expert * down + n0 // BLOCK) * across + k0 // BLOCK).to(tl.float32)
    else:
        scale = _per_group(scales, first + n0, k0, first + N, K, GROUP, ROWS, COLUMNS, FORMAT == "mxfp4")
    if FORMAT == "int4":
        value = code.to(tl.float32)
        if zeros is None:
            value -= 8.0
        else:
            value -= _per_group(zeros, first + n0, k0, first + N, K, GROUP, ROWS, COLUMNS, False)
    elif FORMAT == "nf4":
        # From shared memory: choosing by bits instead takes 15 instructions a code.
        value = tl.reshape(tl.gather(_nf4(), tl.reshape(code.to(tl.int32), (ROWS * COLUMNS,)), 0), (ROWS, COLUMNS))
    elif FORMAT == "mxfp4":
        value = _e2m1(code)
    elif FORMAT == "fp8":
        value = _e4m3(code)
    else:
        value = code.to(tl.float32)
    return (value * scale).to(DTYPE)


@triton.jit(do_not_specialize=["num_experts", "most_tiles", "num_rows"])
def quantized_rows_kernel(
    a,  # (R, K), with SUM_ROWS (R, N)
    codes,
    scales,
    zeros,
    a2,  # (R, K2) and its weight, with K2: another product that is added, see plus_product
    weight2,
    out,  # (R, N), with SUM_ROWS (R, K)
    tiles,
    expert_offsets,
    num_experts,
    most_tiles,
    num_rows,
    N: tl.constexpr,
    K: tl.constexpr,
    FORMAT: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SUM_ROWS: tl.constexpr,
    DESCRIPTOR_A: tl.constexpr,
    DESCRIPTOR_B: tl.constexpr,
    K2: tl.constexpr,
    A_STRIDE2: tl.constexpr,
    EXPERT_ROWS2: tl.constexpr,
    STRIDE2: tl.constexpr,
    K_ROWS2: tl.constexpr,
    DESCRIPTOR_A2: tl.constexpr,
    DESCRIPTOR_B2: tl.constexpr,
    BLOCK_K2: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILES_DOWN: tl.constexpr,
    PARTS: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    """``out[r] = a[r] @ W[e]^T`` (``@ W[e]`` with SUM_ROWS) ``+ a2[r] @ weight2[e]^T``, W ``(N, K)`` of e decoded."""
    width: tl.constexpr = K if SUM_ROWS else N  # of the result
    length: tl.constexpr = N if SUM_ROWS else K  # of the sums
    even: tl.constexpr = width % BLOCK_N == 0
    num_columns: tl.constexpr = (width + BLOCK_N - 1) // BLOCK_N
    dtype: tl.constexpr = out.dtype.element_ty
    num_tiles = count_tiles(expert_offsets, num_experts, most_tiles, BLOCK_M)
    for index in tl.range(tl.program_id(0), num_tiles * num_columns, tl.num_programs(0), flatten=FLATTEN):
        position, column = place(index, num_tiles, num_columns, TILES_DOWN)
        expert, first, rows, end = tile_rows(tiles, expert_offsets, position, BLOCK_M)
        n0 = column * BLOCK_N
        # A row behind the end belongs to another expert or to nobody; it is computed and not stored.
        starts = a + tl.minimum(rows, num_rows - 1).to(tl.int64)[:, None] * length if not DESCRIPTOR_A else 0
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, length, BLOCK_K):
            if DESCRIPTOR_A:  # the other branch would be compiled too
                left = a.load([first, k])
            else:
                left = rows_tile(starts, k + tl.arange(0, BLOCK_K), length, length % BLOCK_K == 0)
            if SUM_ROWS:
                right = decoded_tile(
                    codes, scales, zeros, expert, k, n0, N, K, FORMAT, BITS, GROUP, dtype, DESCRIPTOR_B,
                    BLOCK_K, BLOCK_N,
                )  # fmt: skip
            else:
                right = decoded_tile(
                    codes, scales, zeros, expert, n0, k, N, K, FORMAT, BITS, GROUP, dtype, DESCRIPTOR_B,
                    BLOCK_N, BLOCK_K,
                ).T  # fmt: skip
            total = tl.dot(left, right, total, input_precision=PRECISION)
        if K2:
            total = plus_product(
                total, a2, weight2, first, rows, num_rows, expert, n0, K2, width, A_STRIDE2, EXPERT_ROWS2, STRIDE2,
                K_ROWS2, DESCRIPTOR_A2, DESCRIPTOR_B2, PRECISION, BLOCK_N, BLOCK_K2,
            )  # fmt: skip
        part_width: tl.constexpr = BLOCK_N // PARTS
        for part_index in tl.static_range(PARTS):
            part = part_of(total, part_index, PARTS, BLOCK_M, BLOCK_N)
            columns = n0 + part_index * part_width + tl.arange(0, part_width)
            inside = inside_of(columns, width, part_width, even)
            places = out + rows.to(tl.int64)[:, None] * width + columns[None, :]
            tl.store(places, part.to(dtype), mask=(rows < end)[:, None] & inside[None, :])


def multiply_quantized_rows(
    a: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    format: str,
    bits: int,
    block: Sequence[int],
    out: Tensor,
    rows: Rows,
    *,
    trans_b: bool,
    second: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Fill ``out`` with ``a[r] @ W[e].T`` (``trans_b``), or ``a[r] @ W[e]``, of weights that ``codes`` stand for.

    Args:
        a, out: ``(R, K)`` and ``(R, N)``; without ``trans_b`` the other way round. Contiguous.
        codes, scales, zeros, format, block: as :mod:`dmoe.ops.weight_formats` has them, of matrices ``(E, N, K)``;
            contiguous.
        bits: of a code; two of 4 lie in a byte.
        rows: where the rows are.
        trans_b: see above.
        second: ``a2 (R, K2)`` and its weight ``(E, N, K2)``, or ``(E, K2, K)`` without ``trans_b``: added.
    """
    pack = 8 // bits
    n, k = codes.shape[1], codes.shape[2] * pack
    config = config_of(
        "quantized_int8" if format == "int8" else "quantized", a, rows.tile_rows, a.shape[1], out.shape[1]
    )
    # A tile lies in one block of fp8, and has whole groups of the others or a part of one.
    config = replace(config, block_n=min(config.block_n, BLOCK.value), block_k=min(config.block_k, BLOCK.value))
    thin = Product.second_of(second, config, rows.tile_rows, trans_b=trans_b)
    descriptor = copy_descriptor(a, rows.tile_rows, config.block_k)
    matrix = codes.view(-1, codes.shape[2])
    if format == "fp8":
        matrix = matrix.view(torch.uint8)
    down, across = (config.block_n, config.block_k) if trans_b else (config.block_k, config.block_n)
    # A sum over rows stops at an expert's last, and the copy engine does not.
    by_copy = copy_descriptor(matrix, down, across // pack) if trans_b or n % down == 0 else None
    launch(
        quantized_rows_kernel,
        persistent(config, a, rows.tiles.shape[0], out.shape[1]),
        descriptor or a,
        by_copy or matrix,
        scales,
        zeros,
        None if thin is None else thin.a,
        None if thin is None else thin.weight,
        out,
        rows.tiles,
        rows.expert_offsets,
        rows.num_experts,
        rows.tiles.shape[0],
        rows.num_rows,
        N=n,
        K=k,
        FORMAT=format,
        BITS=bits,
        GROUP=block[1] if pack == 2 else _ALL,
        SUM_ROWS=not trans_b,
        DESCRIPTOR_A=descriptor is not None,
        DESCRIPTOR_B=by_copy is not None,
        **(thin.second_options() if thin else Product.no_second_options()),
        PRECISION=precision(a),
        BLOCK_M=rows.tile_rows,
        TILES_DOWN=config.group,
        PARTS=config.parts,
        FLATTEN=config.flatten and (thin is None or thin.one_step),
        **shape_options(config),
    )
