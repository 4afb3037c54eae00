"""Products of every expert's rows with its matrix, and of every expert's rows with each other.

Both take rows sorted by expert. :func:`rows_kernel` walks the tile table with persistent programs;
:func:`weight_grad_kernel` starts one program for every tile of every expert's result, the experts with most rows first,
so that the longest sums do not begin last. Neither adds into memory that another program adds into.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dmoe.kernels._pieces import (
    EXPERT_DROPOUT,
    count_tiles,
    dropout_scale,
    inside_of,
    part_of,
    place,
    row_values,
    tile_rows,
)
from dmoe.kernels.plus_product import plus_product


@triton.jit(do_not_specialize=["num_experts", "most_tiles", "num_rows"])
def rows_kernel(
    a,  # (R, K)
    weight,  # see plus_product
    a2,  # (R, K2) and its weight, with K2: another product that is added
    weight2,
    bias,  # (E, N) or None
    out,  # (R, N)
    tiles,
    expert_offsets,
    row_to_token,
    row_to_slot,
    token_offsets,
    seed,
    x,  # (T, N), with DOTS
    dots,  # (columns of tiles, R) float32, with DOTS: each row of out times its token's row of x
    num_experts,
    most_tiles,
    num_rows,
    threshold,
    scale,
    K: tl.constexpr,
    N: tl.constexpr,
    A_STRIDE: tl.constexpr,
    EXPERT_ROWS: tl.constexpr,
    STRIDE: tl.constexpr,
    K_ROWS: tl.constexpr,
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
    BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    DOTS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    """``out[r] = a[r] @ weight[e]^T + a2[r] @ weight2[e]^T + bias[e]`` for the rows r of every expert e."""
    even_n: tl.constexpr = N % BLOCK_N == 0
    num_columns: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    num_tiles = count_tiles(expert_offsets, num_experts, most_tiles, BLOCK_M)
    for index in tl.range(tl.program_id(0), num_tiles * num_columns, tl.num_programs(0), flatten=FLATTEN):
        position, column = place(index, num_tiles, num_columns, GROUP)
        expert, first, rows, end = tile_rows(tiles, expert_offsets, position, BLOCK_M)
        n0 = column * BLOCK_N
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        total = plus_product(
            total, a, weight, first, rows, num_rows, expert, n0, K, N, A_STRIDE, EXPERT_ROWS, STRIDE, K_ROWS,
            DESCRIPTOR_A, DESCRIPTOR_B, PRECISION, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        if K2:
            total = plus_product(
                total, a2, weight2, first, rows, num_rows, expert, n0, K2, N, A_STRIDE2, EXPERT_ROWS2, STRIDE2,
                K_ROWS2, DESCRIPTOR_A2, DESCRIPTOR_B2, PRECISION, BLOCK_N, BLOCK_K2,
            )  # fmt: skip

        stored = rows < end
        if DROPOUT or DOTS:
            token = tl.load(row_to_token + rows, mask=stored, other=-1)
            real = token >= 0
            token = tl.maximum(token, 0)
        if DROPOUT:
            assignment = tl.load(token_offsets + token, mask=real, other=0)
            assignment += tl.load(row_to_slot + rows, mask=real, other=0)
        if DOTS:
            dot = tl.zeros((BLOCK_M,), tl.float32)
        part_width: tl.constexpr = BLOCK_N // PARTS
        for part_index in tl.static_range(PARTS):
            part = part_of(total, part_index, PARTS, BLOCK_M, BLOCK_N)
            column_0 = n0 + part_index * part_width
            columns = column_0 + tl.arange(0, part_width)
            inside = inside_of(columns, N, part_width, even_n)
            if BIAS:
                part += tl.load(bias + tl.maximum(expert, 0) * N + columns, mask=inside, other=0.0).to(tl.float32)
            if DROPOUT:
                part *= dropout_scale(seed, assignment, column_0, threshold, scale, EXPERT_DROPOUT, BLOCK_M, part_width)
            mask = stored[:, None] & inside[None, :]
            places = out + rows.to(tl.int64)[:, None] * N + columns[None, :]
            tl.store(places, part.to(out.dtype.element_ty), mask=mask)
            if DOTS:
                places = x + token.to(tl.int64)[:, None] * N + columns[None, :]
                of_token = tl.load(places, mask=real[:, None] & inside[None, :], other=0.0).to(tl.float32)
                dot += tl.sum(tl.where(mask, part * of_token, 0.0), 1)
        if DOTS:
            tl.store(dots + column.to(tl.int64) * num_rows + rows, dot, mask=stored)


@triton.jit
def _picked(
    source,
    index,
    rows,
    live,
    columns,
    WIDTH: tl.constexpr,
    STRIDE: tl.constexpr,
    GATHER: tl.constexpr,
    EVEN: tl.constexpr,
    ALL_THERE: tl.constexpr = False,
):
    """Rows of a sum's operand ``(BLOCK_K, BLOCK)``: rows that are not live, and of no token, are zeros.

    ALL_THERE: rows that are not live have a number all the same, and reading it costs less than asking.
    """
    if GATHER and ALL_THERE:
        rows = tl.load(index + rows)
        live &= rows >= 0
    elif GATHER:
        rows = tl.load(index + rows, mask=live, other=-1)
        live = rows >= 0
    pointers = source + rows.to(tl.int64)[:, None] * STRIDE + columns[None, :]
    if EVEN:
        return tl.load(pointers, mask=live[:, None], other=0.0)
    return tl.load(pointers, mask=live[:, None] & (columns < WIDTH)[None, :], other=0.0)


@triton.jit
def weight_grad_kernel(
    a,  # (R, M), or (T, M) with GATHER_A
    b,  # (R, N), or (T, N) with GATHER_B
    descriptor,  # of a with DESCRIPTOR_A, of b with DESCRIPTOR_B; these gather nothing
    gate_weights,  # with WEIGHED
    out,  # for each expert (M, N), from EXPERT_ROWS rows to the next
    expert_offsets,
    experts_by_load,
    row_to_token,
    row_to_slot,
    token_offsets,
    M: tl.constexpr,
    N: tl.constexpr,
    A_STRIDE: tl.constexpr,
    B_STRIDE: tl.constexpr,
    EXPERT_ROWS: tl.constexpr,
    STRIDE: tl.constexpr,
    GATHER_A: tl.constexpr,
    GATHER_B: tl.constexpr,
    DESCRIPTOR_A: tl.constexpr,
    DESCRIPTOR_B: tl.constexpr,
    WEIGHED: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
):
    """``out[e] = sum over the rows r of e of outer(w[r] a[r], b[r])``, or ``+=`` with ACCUMULATE.

    The copy engine reads whole steps, and behind an expert's last row lies another's. So with a descriptor the last
    step begins early enough to end there, and what the steps before it have added is zero in the operand that is read
    through pointers.
    """
    num_m: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    num_n: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0) % (num_m * num_n)
    expert = tl.load(experts_by_load + tl.program_id(0) // (num_m * num_n))
    begin = tl.load(expert_offsets + expert)
    end = tl.load(expert_offsets + expert + 1)
    m0 = tile // num_n * BLOCK_M
    n0 = tile % num_n * BLOCK_N
    rows_of_out = m0 + tl.arange(0, BLOCK_M)
    columns = n0 + tl.arange(0, BLOCK_N)
    even_m: tl.constexpr = M % BLOCK_M == 0
    even_n: tl.constexpr = N % BLOCK_N == 0

    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    by_pointer = begin
    if DESCRIPTOR_A or DESCRIPTOR_B:
        by_pointer = tl.where(end - begin < BLOCK_K, begin, end)  # fewer rows than a step: nowhere to begin earlier
        for row in range(begin, tl.where(end - begin < BLOCK_K, begin, end), BLOCK_K):
            first = tl.minimum(row, end - BLOCK_K)
            rows = first + tl.arange(0, BLOCK_K)
            if DESCRIPTOR_A:
                left = descriptor.load([first, m0])
                right = _picked(b, row_to_token, rows, rows >= row, columns, N, B_STRIDE, GATHER_B, even_n, True)
            else:
                left = _picked(a, row_to_token, rows, rows >= row, rows_of_out, M, A_STRIDE, GATHER_A, even_m, True)
                right = descriptor.load([first, n0])
            total = tl.dot(left.T, right, total, input_precision=PRECISION)
    for row in range(by_pointer, end, BLOCK_K):
        rows = row + tl.arange(0, BLOCK_K)
        left = _picked(a, row_to_token, rows, rows < end, rows_of_out, M, A_STRIDE, GATHER_A, even_m)
        if WEIGHED:
            token = tl.load(row_to_token + rows, mask=rows < end, other=-1)
            _, weight = row_values(gate_weights, row_to_slot, token_offsets, rows, tl.maximum(token, 0), token >= 0)
            left = (left.to(tl.float32) * weight[:, None]).to(left.dtype)
        right = _picked(b, row_to_token, rows, rows < end, columns, N, B_STRIDE, GATHER_B, even_n)
        total = tl.dot(left.T, right, total, input_precision=PRECISION)

    starts = out + (expert.to(tl.int64) * EXPERT_ROWS + rows_of_out)[:, None] * STRIDE
    part_width: tl.constexpr = BLOCK_N // PARTS
    for index in tl.static_range(PARTS):
        part = part_of(total, index, PARTS, BLOCK_M, BLOCK_N)
        columns = n0 + index * part_width + tl.arange(0, part_width)
        places = starts + columns[None, :]
        mask = (rows_of_out < M)[:, None] & (columns < N)[None, :]
        if ACCUMULATE:
            part += tl.load(places, mask=mask, other=0.0).to(tl.float32)
        tl.store(places, part.to(out.dtype.element_ty), mask=mask)


@triton.jit
def expert_sums_kernel(
    a,  # (R, N), or (T, N) with GATHER
    gate_weights,  # with WEIGHED
    out,  # (E, N)
    expert_offsets,
    row_to_token,
    row_to_slot,
    token_offsets,
    N: tl.constexpr,
    GATHER: tl.constexpr,
    WEIGHED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``out[e] = sum over the rows r of e of w[r] a[r]``: a bias's gradient."""
    expert = tl.program_id(0)
    begin = tl.load(expert_offsets + expert)
    end = tl.load(expert_offsets + expert + 1)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for row in range(begin, end, BLOCK_K):
        rows = row + tl.arange(0, BLOCK_K)
        values = _picked(a, row_to_token, rows, rows < end, columns, N, N, GATHER, False).to(tl.float32)
        if WEIGHED:
            token = tl.load(row_to_token + rows, mask=rows < end, other=-1)
            _, weight = row_values(gate_weights, row_to_slot, token_offsets, rows, tl.maximum(token, 0), token >= 0)
            values *= weight[:, None]
        total += tl.sum(values, 0)
    tl.store(out + expert.to(tl.int64) * N + columns, total.to(out.dtype.element_ty), mask=columns < N)


@triton.jit(do_not_specialize_on_alignment=["dots"])  # a row of a matrix of R columns
def bias_dots_kernel(
    grad_out,  # (R, N), or (T, N) with GATHER
    bias,  # (E, N)
    dots,  # (R,) float32
    tiles,
    expert_offsets,
    row_to_token,
    N: tl.constexpr,
    GATHER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``dots[r] = <grad_out[r], bias[e]>``: what the bias adds to the gate weight's gradient."""
    expert, _, rows, end = tile_rows(tiles, expert_offsets, tl.program_id(0), BLOCK_M)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for column in range(0, tl.where(expert >= 0, N, 0), BLOCK_N):
        columns = column + tl.arange(0, BLOCK_N)
        values = _picked(grad_out, row_to_token, rows, rows < end, columns, N, N, GATHER, False).to(tl.float32)
        total += tl.sum(values * tl.load(bias + expert * N + columns, mask=columns < N, other=0.0).to(tl.float32), 1)
    tl.store(dots + rows, total, mask=rows < end)


@triton.jit
def masked_rows_kernel(
    grad_y,  # (T, N)
    out,  # (R, N)
    seed,
    tiles,
    expert_offsets,
    row_to_token,
    row_to_slot,
    token_offsets,
    threshold,
    scale,
    N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``out[r] = grad_y[token of r]`` under the expert dropout's mask; zeros where a row holds no token."""
    _, _, rows, end = tile_rows(tiles, expert_offsets, tl.program_id(0), BLOCK_M)
    column = tl.program_id(1) * BLOCK_N
    columns = column + tl.arange(0, BLOCK_N)
    token = tl.load(row_to_token + rows, mask=rows < end, other=-1)
    real = token >= 0
    token = tl.maximum(token, 0)
    assignment = tl.load(token_offsets + token, mask=real, other=0) + tl.load(row_to_slot + rows, mask=real, other=0)
    inside = (columns < N)[None, :]
    values = tl.load(
        grad_y + token.to(tl.int64)[:, None] * N + columns[None, :], mask=real[:, None] & inside, other=0.0
    ).to(tl.float32)
    values *= dropout_scale(seed, assignment, column, threshold, scale, EXPERT_DROPOUT, BLOCK_M, BLOCK_N)
    places = out + rows.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(places, values.to(out.dtype.element_ty), mask=(rows < end)[:, None] & inside)
