"""Rows and weights in fp8, and their product on fp8 tensor cores; :mod:`dmoe.ops.fp8_ref` has what the numbers mean.

Codes are made by arithmetic on float32's bits rather than by the GPU's own conversion: that turns an infinity into 448,
Ampere has none, and the interpreter's rounds otherwise. The two kernels that do so move bytes, and wait for memory.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dmoe.kernels._launch import launch
from dmoe.kernels._pieces import count_tiles, inside_of, part_of, place, rows_tile, tile_rows
from dmoe.kernels.operands import Operand, Rows, config_of, copy_descriptor, persistent, shape_options

BLOCK = tl.constexpr(128)  # rows and columns of a weight that share a scale; a step of the product
_ROW_CHUNK = 4096  # columns of a row that are read at once


@triton.jit
def power_of_two_scale(largest):
    """The least power of two under which ``largest``, float32 and not negative, fits below 448, and what divides by it.

    448 is 1.75 * 2^8, so it goes by the exponent, and by whether the fraction is more than 1.75. Infinity and NaN give
    NaN. See :func:`dmoe.ops.fp8_ref.power_of_two_scale`.
    """
    bits = largest.to(tl.int32, bitcast=True)
    exponent = (bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x600000).to(tl.int32)
    exponent = tl.minimum(tl.maximum(exponent, 127 - 110), 127 + 120)
    exponent = tl.where(bits == 0, 127, exponent)
    scale = (exponent << 23).to(tl.float32, bitcast=True)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    number = bits < 0x7F800000
    return tl.where(number, scale, float("nan")), tl.where(number, inverse, float("nan"))


@triton.jit
def e4m3_bits(values):
    """The bits of the nearest e4m3 number, ties to even, of float32 of at most 448; of NaN those of NaN."""
    bits = values.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # 20 of 23 bits of the fraction go. What is added rounds them, and carries into the exponent where it must.
    normal = (magnitude + 0x7FFFF + ((magnitude >> 20) & 1) - (120 << 23)) >> 20
    # Below 2^-6 codes are multiples of 2^-9: so are numbers of which 2^14 has been added, in the last bits.
    shifted = magnitude.to(tl.float32, bitcast=True) + 16384.0
    subnormal = shifted.to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(magnitude < 0x3C800000, subnormal, normal)
    code = tl.where(magnitude > 0x7F800000, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit(do_not_specialize=["num_rows"])
def quantize_rows_kernel(
    rows,  # (R, K), or (T, K) with GATHER
    row_to_token,
    row_weights,  # (R,) with WEIGHED
    codes,  # (R, K) uint8
    scales,  # (R,) float32
    num_rows,
    K: tl.constexpr,
    GATHER: tl.constexpr,
    WEIGHED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Codes and scale of each row; one that is longer than COLUMNS is read twice, the second time from cache."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < num_rows
    real, source = there, row
    if GATHER:
        source = tl.load(row_to_token + row, mask=there, other=-1).to(tl.int64)
        real = source >= 0
    weight = tl.load(row_weights + row, mask=real, other=0.0).to(tl.float32)[:, None] if WEIGHED else 1.0
    starts = rows + source[:, None] * K
    largest = tl.zeros((ROWS,), tl.float32)
    # One step is no loop: its numbers stay in registers.
    values = tl.zeros((ROWS, COLUMNS), tl.float32)
    for column in range(0, K, COLUMNS):
        columns = column + tl.arange(0, COLUMNS)
        mask = real[:, None] & (columns < K)[None, :]
        values = tl.load(starts + columns[None, :], mask=mask, other=0.0).to(tl.float32) * weight
        magnitudes = tl.abs(values)
        magnitudes = tl.where(magnitudes < float("inf"), magnitudes, float("inf"))  # NaN is lost in a maximum
        largest = tl.maximum(largest, tl.max(magnitudes, 1))
    scale, inverse = power_of_two_scale(largest)
    tl.store(scales + row, scale, mask=there)
    for column in range(0, K, COLUMNS):
        columns = column + tl.arange(0, COLUMNS)
        inside = (columns < K)[None, :]
        if K > COLUMNS:
            values = tl.load(starts + columns[None, :], mask=real[:, None] & inside, other=0.0).to(tl.float32) * weight
        places = codes + row[:, None] * K + columns[None, :]
        tl.store(places, e4m3_bits(values * inverse[:, None]), mask=there[:, None] & inside)


@triton.jit
def quantize_blocks_kernel(
    weight,  # for each expert (N, K), or (K, N) with K_ROWS; from EXPERT_ROWS rows to the next
    codes,  # (E, N, K) uint8
    scales,  # (E, ceil(N / 128), ceil(K / 128)) float32
    transposed,  # (E, K, N) uint8, with TRANSPOSED
    N: tl.constexpr,
    K: tl.constexpr,
    EXPERT_ROWS: tl.constexpr,
    STRIDE: tl.constexpr,
    K_ROWS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PARTS: tl.constexpr,
):
    """One program for each block: its scale, its codes, and these turned round."""
    down: tl.constexpr = (N + BLOCK - 1) // BLOCK
    across: tl.constexpr = (K + BLOCK - 1) // BLOCK
    index = tl.program_id(0)
    expert = (index // (down * across)).to(tl.int64)
    n = index // across % down * BLOCK + tl.arange(0, BLOCK)
    k0 = index % across * BLOCK
    width: tl.constexpr = BLOCK // PARTS
    largest = 0.0
    for part in range(PARTS):
        columns = k0 + part * width + tl.arange(0, width)
        values = _of_block(weight, expert, n, columns, N, K, EXPERT_ROWS, STRIDE, K_ROWS)
        magnitudes = tl.abs(values)
        magnitudes = tl.where(magnitudes < float("inf"), magnitudes, float("inf"))
        largest = tl.maximum(largest, tl.max(magnitudes))
    scale, inverse = power_of_two_scale(largest)
    tl.store(scales + index, scale)
    for part in range(PARTS):  # from cache: a block's numbers are more than its registers hold
        columns = k0 + part * width + tl.arange(0, width)
        values = _of_block(weight, expert, n, columns, N, K, EXPERT_ROWS, STRIDE, K_ROWS)
        code = e4m3_bits(values * inverse)
        mask = (n < N)[:, None] & (columns < K)[None, :]
        tl.store(codes + (expert * N + n)[:, None] * K + columns[None, :], code, mask=mask)
        if TRANSPOSED:
            tl.store(transposed + (expert * K + columns)[:, None] * N + n[None, :], code.T, mask=mask.T)


@triton.jit
def _of_block(
    weight,
    expert,
    n,
    k,
    N: tl.constexpr,
    K: tl.constexpr,
    EXPERT_ROWS: tl.constexpr,
    STRIDE: tl.constexpr,
    K_ROWS: tl.constexpr,
):
    """``(rows, columns)`` float32; zeros behind the ends."""
    first = expert * EXPERT_ROWS
    if K_ROWS:
        pointers = weight + (first + k)[None, :] * STRIDE + n[:, None]
    else:
        pointers = weight + (first + n)[:, None] * STRIDE + k[None, :]
    return tl.load(pointers, mask=(n < N)[:, None] & (k < K)[None, :], other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["num_experts", "most_tiles", "num_rows"])
def fp8_rows_kernel(
    a,  # (R, K) e4m3
    a_scales,  # (R,) float32
    weight,  # (E N, K) e4m3
    w_scales,  # (E, ceil(N / 128), ceil(K / 128)) float32, of any strides
    out,  # (R, N)
    tiles,
    expert_offsets,
    num_experts,
    most_tiles,
    num_rows,
    N: tl.constexpr,
    K: tl.constexpr,
    SCALE_E: tl.constexpr,
    SCALE_N: tl.constexpr,
    SCALE_K: tl.constexpr,
    DESCRIPTOR_A: tl.constexpr,
    DESCRIPTOR_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILES_DOWN: tl.constexpr,
    PARTS: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    """``out[r] = a_scales[r] * sum over blocks of K of w_scales[e, n, k] (a[r] @ weight[e]^T)``.

    fp8 tensor cores add up in fewer bits than float32 has (DeepSeek-V3, section 3.3.2), so each step's sum, over at
    most 128 numbers, is one of its own, and is scaled and added in float32.
    """
    even_n: tl.constexpr = N % BLOCK_N == 0
    even_k: tl.constexpr = K % BLOCK_K == 0
    num_columns: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    num_tiles = count_tiles(expert_offsets, num_experts, most_tiles, BLOCK_M)
    for index in tl.range(tl.program_id(0), num_tiles * num_columns, tl.num_programs(0), flatten=FLATTEN):
        position, column = place(index, num_tiles, num_columns, TILES_DOWN)
        expert, first, rows, end = tile_rows(tiles, expert_offsets, position, BLOCK_M)
        n0 = column * BLOCK_N
        # A row behind the end belongs to another expert or to nobody; it is computed and not stored.
        starts = a + tl.minimum(rows, num_rows - 1).to(tl.int64)[:, None] * K if not DESCRIPTOR_A else 0
        start = expert * N
        scale_row = w_scales + expert * SCALE_E + n0 // BLOCK * SCALE_N
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            if DESCRIPTOR_A:  # noqa: SIM108  # the other branch would be compiled too
                left = a.load([first, k])
            else:
                left = rows_tile(starts, k + tl.arange(0, BLOCK_K), K, even_k)
            if DESCRIPTOR_B:
                right = weight.load([start + n0, k])
            else:
                n, columns = n0 + tl.arange(0, BLOCK_N), k + tl.arange(0, BLOCK_K)
                mask = inside_of(n, N, BLOCK_N, even_n)[:, None] & inside_of(columns, K, BLOCK_K, even_k)[None, :]
                pointers = weight + (start + n).to(tl.int64)[:, None] * K + columns[None, :]
                right = tl.load(pointers, mask=mask, other=0.0)
            part = tl.dot(left, right.T, tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
            total += part * tl.load(scale_row + k // BLOCK * SCALE_K)

        stored = rows < end
        scale = tl.load(a_scales + rows, mask=stored, other=0.0)[:, None]
        part_width: tl.constexpr = BLOCK_N // PARTS
        for part_index in tl.static_range(PARTS):
            part = part_of(total, part_index, PARTS, BLOCK_M, BLOCK_N) * scale
            columns = n0 + part_index * part_width + tl.arange(0, part_width)
            inside = inside_of(columns, N, part_width, even_n)
            places = out + rows.to(tl.int64)[:, None] * N + columns[None, :]
            tl.store(places, part.to(out.dtype.element_ty), mask=stored[:, None] & inside[None, :])


def quantize_rows(
    rows: Tensor, row_to_token: Tensor | None, row_weights: Tensor | None, codes: Tensor, scales: Tensor
) -> None:
    """Fill ``codes (R, K)`` uint8 and ``scales (R,)`` from ``rows (R, K)``, or tokens ``(T, K)``; all contiguous."""
    (count, width), columns = codes.shape, min(_ROW_CHUNK, max(16, triton.next_power_of_2(codes.shape[1])))
    at_once = max(1, min(16, 4096 // columns))
    launch(
        quantize_rows_kernel,
        (triton.cdiv(count, at_once),),
        rows,
        row_to_token,
        row_weights,
        codes,
        scales,
        count,
        K=width,
        GATHER=row_to_token is not None,
        WEIGHED=row_weights is not None,
        ROWS=at_once,
        COLUMNS=columns,
        num_warps=4,
        num_stages=1,
    )


def quantize_blocks(weight: Tensor, codes: Tensor, scales: Tensor, transposed: Tensor | None) -> None:
    """Fill ``codes (E, N, K)``, ``scales`` and, unless None, ``transposed (E, K, N)``; contiguous, codes uint8.

    Of a weight whose rows, or columns, are contiguous.
    """
    operand = Operand.of(weight)
    launch(
        quantize_blocks_kernel,
        (scales.numel(),),
        operand.rows,
        codes,
        scales,
        transposed,
        N=codes.shape[1],
        K=codes.shape[2],
        **operand.options,
        TRANSPOSED=transposed is not None,
        PARTS=4,
        num_warps=8,
        num_stages=1,
    )


def fp8_multiply_rows(a: Tensor, a_scales: Tensor, weight: Tensor, w_scales: Tensor, out: Tensor, rows: Rows) -> None:
    """Fill ``out (R, N)`` from e4m3 ``a (R, K)`` and ``weight (E, N, K)``, contiguous, and their scales."""
    k, n = a.shape[1], out.shape[1]
    config = config_of("fp8", a, rows.tile_rows, k, n)
    matrix = weight.view(-1, k)
    by_copy = (
        copy_descriptor(a, rows.tile_rows, config.block_k),
        copy_descriptor(matrix, config.block_n, config.block_k),
    )
    launch(
        fp8_rows_kernel,
        persistent(config, a, rows.tiles.shape[0], n),
        by_copy[0] or a,
        a_scales,
        by_copy[1] or matrix,
        w_scales,
        out,
        rows.tiles,
        rows.expert_offsets,
        rows.num_experts,
        rows.tiles.shape[0],
        rows.num_rows,
        N=n,
        K=k,
        SCALE_E=w_scales.stride(0),
        SCALE_N=w_scales.stride(1),
        SCALE_K=w_scales.stride(2),
        DESCRIPTOR_A=by_copy[0] is not None,
        DESCRIPTOR_B=by_copy[1] is not None,
        BLOCK_M=rows.tile_rows,
        TILES_DOWN=config.group,
        PARTS=config.parts,
        FLATTEN=config.flatten,
        **shape_options(config),
    )
