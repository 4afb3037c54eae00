"""The two products of the expert MLP that do more than multiply: up with the activation, and back through it."""

from __future__ import annotations

import triton
import triton.language as tl

from dmoe.kernels._pieces import (
    ACTIVATION_DROPOUT,
    act,
    act_slope,
    count_tiles,
    dropout_scale,
    halves,
    inside_of,
    operand_tile,
    part_of,
    place,
    row_values,
    rows_tile,
    through_up_act,
    tile_rows,
    tokens_again,
    up_act,
)


@triton.jit(do_not_specialize=["num_experts", "most_tiles"])
def up_kernel(
    x,  # (T, H)
    # For each expert (F, H), or (H, F) with K_ROWS; from EXPERT_ROWS rows to the next; JOINED (2 E, F, H); INTERLEAVED
    # (2 F, H) or (H, 2 F), rows or columns of gate and up by turns.
    weight,
    gate_weight,  # the gate's, likewise; None where it is in weight, UP_ROW rows and UP_COLUMN columns before up
    bias,  # (E, F) or (E, 2, F), BIAS_HALF from a half to the next, BIAS_STEP from a column to the next; or None
    gate_weights,
    seed,
    pre,  # (R, F) or (R, 2 F), or None
    hidden,  # (R, F), or None
    tiles,
    expert_offsets,
    row_to_token,
    row_to_slot,
    token_offsets,
    num_experts,
    most_tiles,
    threshold,
    scale,
    H: tl.constexpr,
    F: tl.constexpr,
    EXPERT_ROWS: tl.constexpr,
    STRIDE: tl.constexpr,
    K_ROWS: tl.constexpr,
    UP_ROW: tl.constexpr,
    UP_COLUMN: tl.constexpr,
    APART: tl.constexpr,
    JOINED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    P0: tl.constexpr,
    P1: tl.constexpr,
    P2: tl.constexpr,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    BIAS_HALF: tl.constexpr,
    BIAS_STEP: tl.constexpr,
    WEIGH_INPUT: tl.constexpr,
    WEIGH_HIDDEN: tl.constexpr,
    DROPOUT: tl.constexpr,
    STORE_PRE: tl.constexpr,
    STORE_HIDDEN: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    """``pre[r] = x[token of r] @ weight[e]^T + bias[e]`` with the token gathered as it is read, and act(pre)."""
    even_k: tl.constexpr = H % BLOCK_K == 0
    even_n: tl.constexpr = F % BLOCK_N == 0
    num_columns: tl.constexpr = (F + BLOCK_N - 1) // BLOCK_N
    parts: tl.constexpr = 2 if GATED else 1
    short: tl.constexpr = x.dtype.element_ty != tl.float32
    num_tiles = count_tiles(expert_offsets, num_experts, most_tiles, BLOCK_M)
    for index in tl.range(tl.program_id(0), num_tiles * num_columns, tl.num_programs(0), flatten=FLATTEN):
        position, column = place(index, num_tiles, num_columns, GROUP)
        expert, _, rows, end = tile_rows(tiles, expert_offsets, position, BLOCK_M)
        n0 = column * BLOCK_N
        stored = rows < end
        # Rows without a token read token 0: an unmasked load is cheaper, and they are stored as zeros.
        picked = tl.maximum(tl.load(row_to_token + rows, mask=stored, other=0), 0)
        starts = x + picked.to(tl.int64)[:, None] * H
        if JOINED:
            both = tl.zeros((BLOCK_M, 2 * BLOCK_N), tl.float32)
            for k in range(0, H, BLOCK_K):
                left = rows_tile(starts, k + tl.arange(0, BLOCK_K), H, even_k)
                right = weight.load([2 * expert, n0, k]).reshape(2 * BLOCK_N, BLOCK_K)
                both = tl.dot(left, right.T, both, input_precision=PRECISION)
            gate, up = halves(both, BLOCK_M, 2 * BLOCK_N)
        elif INTERLEAVED:
            both = tl.zeros((BLOCK_M, 2 * BLOCK_N), tl.float32)
            start = expert * EXPERT_ROWS
            for k in range(0, H, BLOCK_K):
                left = rows_tile(starts, k + tl.arange(0, BLOCK_K), H, even_k)
                right = operand_tile(
                    weight,
                    start,
                    2 * n0,
                    k,
                    2 * F,
                    H,
                    STRIDE,
                    2 * BLOCK_N,
                    BLOCK_K,
                    even_n,
                    even_k,
                    DESCRIPTOR,
                    K_ROWS,
                )
                both = tl.dot(left, right, both, input_precision=PRECISION)
        else:
            start = expert * EXPERT_ROWS
            gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for k in range(0, H, BLOCK_K):
                left = rows_tile(starts, k + tl.arange(0, BLOCK_K), H, even_k)
                if GATED:
                    right = operand_tile(
                        gate_weight if APART else weight,
                        start,
                        n0,
                        k,
                        F,
                        H,
                        STRIDE,
                        BLOCK_N,
                        BLOCK_K,
                        even_n,
                        even_k,
                        DESCRIPTOR,
                        K_ROWS,
                    )
                    gate = tl.dot(left, right, gate, input_precision=PRECISION)
                right = operand_tile(
                    weight,
                    start + UP_ROW,
                    UP_COLUMN + n0,
                    k,
                    UP_COLUMN + F,
                    H,
                    STRIDE,
                    BLOCK_N,
                    BLOCK_K,
                    even_n,
                    even_k,
                    DESCRIPTOR,
                    K_ROWS,
                )
                up = tl.dot(left, right, up, input_precision=PRECISION)

        token, real = tokens_again(row_to_token, rows, stored)
        if WEIGH_INPUT or WEIGH_HIDDEN or DROPOUT:
            assignment, row_weight = row_values(gate_weights, row_to_slot, token_offsets, rows, token, real)
        if WEIGH_INPUT:  # w (W x) for W (w x): the same up to rounding, and the product stays as it is
            if INTERLEAVED:
                both *= row_weight[:, None]
            else:
                gate *= row_weight[:, None]
                up *= row_weight[:, None]
        mask_rows = stored[:, None]
        bias_start = tl.maximum(expert, 0) * parts * F
        part_width: tl.constexpr = BLOCK_N // PARTS
        for index_of_part in tl.static_range(PARTS):
            column_0 = n0 + index_of_part * part_width
            columns = column_0 + tl.arange(0, part_width)
            inside = inside_of(columns, F, part_width, even_n)
            mask = mask_rows & inside[None, :]
            places = rows.to(tl.int64)[:, None] * (parts * F) + columns[None, :]
            if INTERLEAVED:  # a part first: all columns at once would have to fit in the registers
                part = part_of(both, index_of_part, PARTS, BLOCK_M, 2 * BLOCK_N)
                gate_part, up_part = tl.split(tl.reshape(part, (BLOCK_M, part_width, 2)))
            else:
                up_part = part_of(up, index_of_part, PARTS, BLOCK_M, BLOCK_N)
            if BIAS:
                up_bias = tl.load(
                    bias + bias_start + (parts - 1) * BIAS_HALF + columns * BIAS_STEP, mask=inside, other=0.0
                )
                up_part += up_bias.to(tl.float32)[None, :]
            up_part = tl.where(real[:, None], up_part, 0.0).to(x.dtype.element_ty)
            if STORE_PRE:
                tl.store(pre + places + (parts - 1) * F, up_part, mask=mask)
            if GATED:
                if not INTERLEAVED:
                    gate_part = part_of(gate, index_of_part, PARTS, BLOCK_M, BLOCK_N)
                if BIAS:
                    gate_bias = tl.load(bias + bias_start + columns * BIAS_STEP, mask=inside, other=0.0)
                    gate_part += gate_bias.to(tl.float32)[None, :]
                gate_part = tl.where(real[:, None], gate_part, 0.0).to(x.dtype.element_ty)
                if STORE_PRE:
                    tl.store(pre + places, gate_part, mask=mask)
            if STORE_HIDDEN:
                # From the rounded numbers, as backward will see them.
                if GATED:
                    value = act(gate_part.to(tl.float32), ACTIVATION, short, P0, P1, P2)
                    value *= up_act(up_part.to(tl.float32), ACTIVATION, short, P0, P1, P2)
                else:
                    value = act(up_part.to(tl.float32), ACTIVATION, short)
                if DROPOUT:
                    value *= dropout_scale(
                        seed, assignment, column_0, threshold, scale, ACTIVATION_DROPOUT, BLOCK_M, part_width
                    )
                if WEIGH_HIDDEN:
                    value *= row_weight[:, None]
                places = rows.to(tl.int64)[:, None] * F + columns[None, :]
                tl.store(hidden + places, value.to(x.dtype.element_ty), mask=mask)


@triton.jit
def _back_through_activation(
    grad,  # (BLOCK_M, COLUMNS): gradient of the weighted, masked activation, without the gate weight
    row_grad,
    column,
    pre,
    grad_pre,
    hidden,
    seed,
    rows,
    real,
    stored,
    assignment,
    row_weight,
    threshold,
    scale,
    F: tl.constexpr,
    ACTIVATION: tl.constexpr,
    P0: tl.constexpr,
    P1: tl.constexpr,
    P2: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    WEIGHED: tl.constexpr,
    DROPOUT: tl.constexpr,
    STORE_HIDDEN: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Stores the pre-activation's gradient and the activation again; returns ``row_grad`` with these columns added.

    INTERLEAVED: of the gradient, columns of gate and up by turns.
    """
    parts: tl.constexpr = 2 if GATED else 1
    short: tl.constexpr = pre.dtype.element_ty != tl.float32
    columns = column + tl.arange(0, COLUMNS)
    inside = inside_of(columns, F, COLUMNS, EVEN)
    mask = stored[:, None] & inside[None, :]
    readable = real[:, None] & inside[None, :]
    places = rows.to(tl.int64)[:, None] * (parts * F) + columns[None, :]
    if DROPOUT:
        grad *= dropout_scale(seed, assignment, column, threshold, scale, ACTIVATION_DROPOUT, BLOCK_M, COLUMNS)
    grad = tl.where(readable, grad, 0.0)
    if GATED:
        gate = tl.load(pre + places, mask=readable, other=0.0).to(tl.float32)
        up = tl.load(pre + places + F, mask=readable, other=0.0).to(tl.float32)
        value, slope = act_slope(gate, ACTIVATION, short, P0, P1, P2)
        factor = up_act(up, ACTIVATION, short, P0, P1, P2)
        if WEIGHED:
            row_grad += tl.sum(grad * value * factor, 1)
            grad *= row_weight[:, None]
        if INTERLEAVED:
            grad_gate = (grad * factor * slope).to(pre.dtype.element_ty)
            grad_up = through_up_act(grad * value, up, ACTIVATION, short, P0, P1, P2).to(pre.dtype.element_ty)
            both = tl.reshape(tl.join(grad_gate, grad_up), (BLOCK_M, 2 * COLUMNS))
            columns = 2 * column + tl.arange(0, 2 * COLUMNS)
            inside = inside_of(columns, 2 * F, 2 * COLUMNS, EVEN)
            places = rows.to(tl.int64)[:, None] * (2 * F) + columns[None, :]
            tl.store(grad_pre + places, both, mask=stored[:, None] & inside[None, :])
        else:  # one after the other: both at once are registers too many
            tl.store(grad_pre + places, (grad * factor * slope).to(pre.dtype.element_ty), mask=mask)
            grad_up = through_up_act(grad * value, up, ACTIVATION, short, P0, P1, P2)
            tl.store(grad_pre + places + F, grad_up.to(pre.dtype.element_ty), mask=mask)
        value *= factor
    else:
        value, slope = act_slope(tl.load(pre + places, mask=readable, other=0.0).to(tl.float32), ACTIVATION, short)
        if WEIGHED:
            row_grad += tl.sum(grad * value, 1)
            grad *= row_weight[:, None]
        tl.store(grad_pre + places, (grad * slope).to(pre.dtype.element_ty), mask=mask)
    if STORE_HIDDEN:
        if DROPOUT:
            value *= dropout_scale(seed, assignment, column, threshold, scale, ACTIVATION_DROPOUT, BLOCK_M, COLUMNS)
        if WEIGHED:
            value *= row_weight[:, None]
        value = tl.where(readable, value, 0.0)
        places = rows.to(tl.int64)[:, None] * F + (column + tl.arange(0, COLUMNS))[None, :]
        tl.store(hidden + places, value.to(pre.dtype.element_ty), mask=mask)
    return row_grad


@triton.jit(do_not_specialize=["num_experts", "most_tiles", "num_rows"])
def hidden_grad_kernel(
    grad_out,  # (R, H), or (T, H) with GATHER
    weight,  # for each expert (H, F), or (F, H) without K_ROWS; from EXPERT_ROWS rows to the next
    pre,
    gate_weights,
    seed,
    grad_pre,
    hidden,  # (R, F): the activation again, masked and weighed as forward had it; or None
    row_grads,  # (columns of tiles, R) float32, with WEIGHED: <activation, its gradient>, parts of the gate weight's
    tiles,
    expert_offsets,
    row_to_token,
    row_to_slot,
    token_offsets,
    num_experts,
    most_tiles,
    num_rows,
    threshold,
    scale,
    H: tl.constexpr,
    F: tl.constexpr,
    EXPERT_ROWS: tl.constexpr,
    STRIDE: tl.constexpr,
    K_ROWS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    P0: tl.constexpr,
    P1: tl.constexpr,
    P2: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    WEIGHED: tl.constexpr,
    DROPOUT: tl.constexpr,
    STORE_HIDDEN: tl.constexpr,
    GATHER: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    """Through the down projection and the activation: ``grad_pre = act'(pre) * (w grad_out[token] @ weight[e])``.

    The epilogue takes the tile in parts, one after the other: all at once does not fit in the registers.
    """
    even_k: tl.constexpr = H % BLOCK_K == 0
    even_n: tl.constexpr = F % BLOCK_N == 0
    num_columns: tl.constexpr = (F + BLOCK_N - 1) // BLOCK_N
    num_tiles = count_tiles(expert_offsets, num_experts, most_tiles, BLOCK_M)
    for index in tl.range(tl.program_id(0), num_tiles * num_columns, tl.num_programs(0), flatten=FLATTEN):
        position, column = place(index, num_tiles, num_columns, GROUP)
        expert, _, rows, end = tile_rows(tiles, expert_offsets, position, BLOCK_M)
        n0 = column * BLOCK_N
        stored = rows < end
        if GATHER:
            picked = tl.maximum(tl.load(row_to_token + rows, mask=stored, other=0), 0)
        else:
            picked = tl.minimum(rows, num_rows - 1)
        starts = grad_out + picked.to(tl.int64)[:, None] * H
        start = expert * EXPERT_ROWS
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, H, BLOCK_K):
            left = rows_tile(starts, k + tl.arange(0, BLOCK_K), H, even_k)
            right = operand_tile(
                weight, start, n0, k, F, H, STRIDE, BLOCK_N, BLOCK_K, even_n, even_k, DESCRIPTOR, K_ROWS
            )
            total = tl.dot(left, right, total, input_precision=PRECISION)

        token, real = tokens_again(row_to_token, rows, stored)
        assignment, row_weight = token, 0.0
        if WEIGHED or DROPOUT:
            assignment, row_weight = row_values(gate_weights, row_to_slot, token_offsets, rows, token, real)
        row_grad = tl.zeros((BLOCK_M,), tl.float32)
        part_width: tl.constexpr = BLOCK_N // PARTS
        for index_of_part in tl.static_range(PARTS):
            row_grad = _back_through_activation(
                part_of(total, index_of_part, PARTS, BLOCK_M, BLOCK_N),
                row_grad,
                n0 + index_of_part * part_width,
                pre,
                grad_pre,
                hidden,
                seed,
                rows,
                real,
                stored,
                assignment,
                row_weight,
                threshold,
                scale,
                F,
                ACTIVATION,
                P0,
                P1,
                P2,
                GATED,
                INTERLEAVED,
                WEIGHED,
                DROPOUT,
                STORE_HIDDEN,
                even_n,
                BLOCK_M,
                part_width,
            )
        if WEIGHED:
            tl.store(row_grads + column.to(tl.int64) * num_rows + rows, row_grad, mask=stored)
