"""Back through down and the activation, for Hopper; :mod:`dmoe.kernels.gluon_pieces` says how the warps share work."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from dmoe.kernels.gluon_pieces import (
    NARROW,
    NARROW_COLUMNS,
    NARROW_ROWS,
    PRODUCER_THREADS,
    act_slope,
    count_tiles,
    group_barrier,
    multiply,
    new_barriers,
    panel_of,
    place,
    tile_at,
)
from dmoe.kernels.gluon_up import gathering_producer


@gluon.jit
def _panel_back(
    grad,  # (64, WIDTH): gradient of the weighed activation, without the gate weight
    row_grad,
    pre,  # pointers to the panel in the first half of each row, likewise the next two
    grad_pre,
    hidden,
    row_weight,
    mask,
    readable,
    F: gl.constexpr,
    ACTIVATION: gl.constexpr,
    GATED: gl.constexpr,
    WEIGHED: gl.constexpr,
    DTYPE: gl.constexpr,
):
    """``_back_through_activation`` of expert_mlp.py without dropout."""
    first = gl.load(pre, mask=readable, other=0.0).to(gl.float32)
    grad = gl.where(readable, grad, 0.0)
    value, slope = act_slope(first, ACTIVATION)
    if GATED:
        up = gl.load(pre + F, mask=readable, other=0.0).to(gl.float32)
        if WEIGHED:
            row_grad += gl.sum(grad * value * up, 1)
            grad *= row_weight[:, None]
        gl.store(grad_pre, (grad * up * slope).to(DTYPE), mask=mask)
        gl.store(grad_pre + F, (grad * value).to(DTYPE), mask=mask)
        value *= up
    else:
        if WEIGHED:
            row_grad += gl.sum(grad * value, 1)
            grad *= row_weight[:, None]
        gl.store(grad_pre, (grad * slope).to(DTYPE), mask=mask)
    if hidden is not None:
        if WEIGHED:
            value *= row_weight[:, None]
        value = gl.where(readable, value, 0.0)
        gl.store(hidden, value.to(DTYPE), mask=mask)
    return row_grad


@gluon.jit
def _hidden_grad_consumer(
    pre,
    gate_weights,
    grad_pre,
    hidden,
    row_grads,
    tiles,
    expert_offsets,
    row_to_token,
    row_to_slot,
    token_offsets,
    num_tiles,
    num_rows,
    a_s,
    b_s,
    full,
    empty,
    turn,
    passed,  # (4, 64, 32) float32: two panels of each group, on their way to another layout
    HALF: gl.constexpr,
    H: gl.constexpr,
    F: gl.constexpr,
    ACTIVATION: gl.constexpr,
    GATED: gl.constexpr,
    WEIGHED: gl.constexpr,
    NUM_COLUMNS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    GROUP: gl.constexpr,
    SKEW: gl.constexpr,
    STAGES: gl.constexpr,
):
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16]
    )
    parts: gl.constexpr = 2 if GATED else 1
    steps: gl.constexpr = (H + BLOCK_K - 1) // BLOCK_K
    dtype: gl.constexpr = a_s.dtype
    done = 0
    for index in range(gl.program_id(0), num_tiles * NUM_COLUMNS, gl.num_programs(0)):
        position, column = place(index, num_tiles, NUM_COLUMNS, GROUP)
        _, first, end = tile_at(tiles, expert_offsets, position)
        rows = first + HALF * 64 + gl.arange(0, 64, NARROW_ROWS)
        stored = rows < end
        token = gl.load(row_to_token + rows, mask=stored, other=-1)
        real = token >= 0
        row_weight = gl.zeros((64,), gl.float32, NARROW_ROWS)
        if WEIGHED:
            assignment = gl.load(token_offsets + token, mask=real, other=0)
            assignment += gl.load(row_to_slot + rows, mask=real, other=0)
            row_weight = gl.load(gate_weights + assignment, mask=real, other=0.0).to(gl.float32)
        acc = gl.zeros((64, BLOCK_N), gl.float32, layout)
        acc, done = multiply(
            acc, a_s, b_s, full, empty, turn, done, steps, HALF, (BLOCK_K, BLOCK_N), False, True, True, SKEW, STAGES
        )
        row_grad = gl.zeros((64,), gl.float32, NARROW_ROWS)
        columns = column * BLOCK_N + gl.arange(0, 32, NARROW_COLUMNS)
        pre_at = pre + rows.to(gl.int64)[:, None] * (parts * F) + columns[None, :]
        grad_pre_at = grad_pre + rows.to(gl.int64)[:, None] * (parts * F) + columns[None, :]
        hidden_at = None
        if hidden is not None:
            hidden_at = hidden + rows.to(gl.int64)[:, None] * F + columns[None, :]
        for quarter in gl.static_range(BLOCK_N // 64):
            for piece in gl.static_range(2):
                passed.index(2 * HALF + piece).store(panel_of(acc, 2 * quarter + piece, BLOCK_N, 32))
            group_barrier()
            # A loop that the compiler cannot unroll: its schedule would need more registers than there are.
            for piece in range(2 + gl.minimum(num_tiles, 0)):
                shift = quarter * 64 + piece * 32
                inside = (columns + shift < F)[None, :]
                row_grad = _panel_back(
                    passed.index(2 * HALF + piece).load(NARROW),
                    row_grad,
                    pre_at + shift,
                    grad_pre_at + shift,
                    hidden_at if hidden is None else hidden_at + shift,
                    row_weight,
                    stored[:, None] & inside,
                    real[:, None] & inside,
                    F,
                    ACTIVATION,
                    GATED,
                    WEIGHED,
                    dtype,
                )
            group_barrier()
        if WEIGHED:
            gl.store(row_grads + column.to(gl.int64) * num_rows + rows, row_grad, mask=stored)


@gluon.jit(do_not_specialize=["num_experts", "table_length", "num_rows"])
def gluon_hidden_grad_kernel(
    grad_y,  # (T, H)
    weight,  # descriptor of (E, H, F), blocks (1, BLOCK_K, BLOCK_N)
    pre,  # (R, parts F)
    gate_weights,
    grad_pre,  # (R, parts F)
    hidden,  # (R, F), or None
    row_grads,  # (columns of tiles, R) float32, or None without WEIGHED
    tiles,
    expert_offsets,
    row_to_token,
    row_to_slot,
    token_offsets,
    num_experts,
    table_length,
    num_rows,
    H: gl.constexpr,
    F: gl.constexpr,
    ACTIVATION: gl.constexpr,
    GATED: gl.constexpr,
    WEIGHED: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    GROUP: gl.constexpr,
    SKEW: gl.constexpr,
    STAGES: gl.constexpr,
    num_warps: gl.constexpr,
):
    """``grad_pre = act'(pre) * (w grad_y[token] @ weight[e])``; see ``hidden_grad_kernel`` in expert_mlp.py."""
    num_columns: gl.constexpr = (F + BLOCK_N - 1) // BLOCK_N
    dtype: gl.constexpr = grad_y.dtype.element_ty
    left: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, BLOCK_K], dtype)
    a_s = gl.allocate_shared_memory(dtype, [2 * STAGES, 64, BLOCK_K], left)
    b_s = gl.allocate_shared_memory(dtype, [STAGES, 1, BLOCK_K, BLOCK_N], weight.layout)
    passed_layout: gl.constexpr = gl.SwizzledSharedLayout(vec=4, per_phase=1, max_phase=8, order=[1, 0])
    passed = gl.allocate_shared_memory(gl.float32, [4, 64, 32], passed_layout)
    full, empty, turn = new_barriers(STAGES, 1 + PRODUCER_THREADS)
    num_tiles = count_tiles(expert_offsets, num_experts, table_length, 128)
    gl.warp_specialize(
        [
            (_hidden_grad_consumer, (pre, gate_weights, grad_pre, hidden, row_grads, tiles, expert_offsets,
                                     row_to_token, row_to_slot, token_offsets, num_tiles, num_rows, a_s, b_s, full,
                                     empty, turn, passed, 0, H, F, ACTIVATION, GATED, WEIGHED, num_columns, BLOCK_N,
                                     BLOCK_K, GROUP, SKEW, STAGES)),
            (_hidden_grad_consumer, (pre, gate_weights, grad_pre, hidden, row_grads, tiles, expert_offsets,
                                     row_to_token, row_to_slot, token_offsets, num_tiles, num_rows, a_s, b_s, full,
                                     empty, turn, passed, 1, H, F, ACTIVATION, GATED, WEIGHED, num_columns, BLOCK_N,
                                     BLOCK_K, GROUP, SKEW, STAGES)),
            (gathering_producer, (grad_y, weight, tiles, expert_offsets, row_to_token, num_tiles, a_s, b_s, full, empty,
                                  H, num_columns, BLOCK_N, 1, True, 2 * BLOCK_N * BLOCK_K, BLOCK_K, GROUP, STAGES)),
        ],
        [4, 4],
        [232, 40],
    )  # fmt: skip
