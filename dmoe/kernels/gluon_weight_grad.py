"""Sums of outer products of an expert's rows, for Hopper; :mod:`dmoe.kernels.gluon_pieces` says how warps work."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from dmoe.kernels.gluon_pieces import (
    PANEL,
    PANEL_COLUMNS,
    PANEL_ROWS,
    PRODUCER_THREADS,
    cp_async,
    multiply,
    new_barriers,
    panel_of,
)


@gluon.jit
def _sum_at(experts_by_load, expert_offsets, index, TILES: gl.constexpr):
    """Sum number ``index``: expert, tile of its result, first row, where its rows end. Longest sums come first."""
    expert = gl.load(experts_by_load + index // TILES)
    return expert, index % TILES, gl.load(expert_offsets + expert), gl.load(expert_offsets + expert + 1)


@gluon.jit
def _gathering_producer(
    a,
    b,
    expert_offsets,
    experts_by_load,
    row_to_token,
    num_sums,
    a_s,
    b_s,
    full,
    empty,
    M: gl.constexpr,
    N: gl.constexpr,
    A_STRIDE: gl.constexpr,
    B_STRIDE: gl.constexpr,
    GATHER_A: gl.constexpr,
    GATHER_B: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Rows that count by cp.async, and zeros for those behind the end and of no token, in both operands: one operand's
    zero would not do, as the other's number may be NaN. Row numbers are loaded a step before they are needed.
    """
    num_n: gl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    num_m: gl.constexpr = (M + 127) // 128
    lanes = gl.arange(0, BLOCK_K, PANEL_ROWS)
    a_lanes = gl.arange(0, 64, PANEL_COLUMNS)
    b_lanes = gl.arange(0, BLOCK_N, PANEL_COLUMNS)
    done = 0
    for index in range(gl.program_id(0), num_sums, gl.num_programs(0)):
        _, tile, begin, end = _sum_at(experts_by_load, expert_offsets, index, num_m * num_n)
        a_columns = tile // num_n * 128 + a_lanes
        b_columns = tile % num_n * BLOCK_N + b_lanes
        following = gl.load(row_to_token + begin + lanes, mask=begin + lanes < end, other=-1)
        for row in range(begin, end, BLOCK_K):
            token, rows = following, row + lanes
            following = gl.load(row_to_token + rows + BLOCK_K, mask=rows + BLOCK_K < end, other=-1)
            live = token >= 0
            token = gl.maximum(token, 0)
            a_starts = a + (token if GATHER_A else rows).to(gl.int64)[:, None] * A_STRIDE
            b_starts = b + (token if GATHER_B else rows).to(gl.int64)[:, None] * B_STRIDE
            stage = done % STAGES
            mbarrier.wait(empty.index(stage), (done // STAGES) & 1 ^ 1)
            if M % 128 == 0:
                cp_async(a_s.index(2 * stage), a_starts + a_columns[None, :], mask=live[:, None])
                cp_async(a_s.index(2 * stage + 1), a_starts + (a_columns + 64)[None, :], mask=live[:, None])
            else:
                left, right = (a_columns < M)[None, :], (a_columns + 64 < M)[None, :]
                cp_async(a_s.index(2 * stage), a_starts + a_columns[None, :], mask=live[:, None] & left)
                cp_async(a_s.index(2 * stage + 1), a_starts + (a_columns + 64)[None, :], mask=live[:, None] & right)
            if N % BLOCK_N == 0:
                cp_async(b_s.index(stage), b_starts + b_columns[None, :], mask=live[:, None])
            else:
                mask = live[:, None] & (b_columns < N)[None, :]
                cp_async(b_s.index(stage), b_starts + b_columns[None, :], mask=mask)
            async_copy.mbarrier_arrive(full.index(stage), increment_count=False)
            done += 1


@gluon.jit
def _sum_consumer(
    out,
    expert_offsets,
    experts_by_load,
    num_sums,
    a_s,
    b_s,
    full,
    empty,
    turn,
    HALF: gl.constexpr,
    M: gl.constexpr,
    N: gl.constexpr,
    EXPERT_ROWS: gl.constexpr,
    STRIDE: gl.constexpr,
    ACCUMULATE: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    SKEW: gl.constexpr,
    STAGES: gl.constexpr,
):
    num_n: gl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    num_m: gl.constexpr = (M + 127) // 128
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16]
    )
    done = 0
    for index in range(gl.program_id(0), num_sums, gl.num_programs(0)):
        expert, tile, begin, end = _sum_at(experts_by_load, expert_offsets, index, num_m * num_n)
        acc = gl.zeros((64, BLOCK_N), gl.float32, layout)
        steps = (end - begin + BLOCK_K - 1) // BLOCK_K
        acc, done = multiply(
            acc, a_s, b_s, full, empty, turn, done, steps, HALF, (BLOCK_K, BLOCK_N), True, True, True, SKEW, STAGES
        )
        rows = tile // num_n * 128 + HALF * 64 + gl.arange(0, 64, PANEL_ROWS)
        starts = out + (expert.to(gl.int64) * EXPERT_ROWS + rows)[:, None] * STRIDE
        for panel in gl.static_range(BLOCK_N // 64):
            columns = tile % num_n * BLOCK_N + panel * 64 + gl.arange(0, 64, PANEL_COLUMNS)
            mask = (rows < M)[:, None] & (columns < N)[None, :]
            places = starts + columns[None, :]
            if ACCUMULATE:
                total = gl.convert_layout(panel_of(acc, panel, BLOCK_N, 64), PANEL)
                total += gl.load(places, mask=mask, other=0.0).to(gl.float32)
                gl.store(places, total.to(out.dtype.element_ty), mask=mask)
            else:
                total = panel_of(acc, panel, BLOCK_N, 64).to(out.dtype.element_ty)
                gl.store(places, gl.convert_layout(total, PANEL), mask=mask)


@gluon.jit(do_not_specialize=["num_experts"])
def gluon_weight_grad_kernel(
    a,  # (R, M), or (T, M) with GATHER_A
    b,  # (R, N), or (T, N) with GATHER_B
    out,  # for each expert (M, N), from EXPERT_ROWS rows to the next
    expert_offsets,
    experts_by_load,
    row_to_token,
    num_experts,
    M: gl.constexpr,
    N: gl.constexpr,
    A_STRIDE: gl.constexpr,
    B_STRIDE: gl.constexpr,
    EXPERT_ROWS: gl.constexpr,
    STRIDE: gl.constexpr,
    GATHER_A: gl.constexpr,
    GATHER_B: gl.constexpr,
    ACCUMULATE: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    SKEW: gl.constexpr,
    STAGES: gl.constexpr,
    num_warps: gl.constexpr,
):
    """``out[e] = sum over the rows r of e of outer(a[r], b[r])``, or ``+=``; see ``weight_grad_kernel``."""
    dtype: gl.constexpr = a.dtype.element_ty
    left: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_K, 64], dtype)
    right: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_K, BLOCK_N], dtype)
    a_s = gl.allocate_shared_memory(dtype, [2 * STAGES, BLOCK_K, 64], left)
    b_s = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_K, BLOCK_N], right)
    full, empty, turn = new_barriers(STAGES, PRODUCER_THREADS)
    num_sums = num_experts * (((M + 127) // 128) * ((N + BLOCK_N - 1) // BLOCK_N))
    gl.warp_specialize(
        [
            (_sum_consumer, (out, expert_offsets, experts_by_load, num_sums, a_s, b_s, full, empty, turn, 0, M, N,
                             EXPERT_ROWS, STRIDE, ACCUMULATE, BLOCK_N, BLOCK_K, SKEW, STAGES)),
            (_sum_consumer, (out, expert_offsets, experts_by_load, num_sums, a_s, b_s, full, empty, turn, 1, M, N,
                             EXPERT_ROWS, STRIDE, ACCUMULATE, BLOCK_N, BLOCK_K, SKEW, STAGES)),
            (_gathering_producer, (a, b, expert_offsets, experts_by_load, row_to_token, num_sums, a_s, b_s, full, empty,
                                   M, N, A_STRIDE, B_STRIDE, GATHER_A, GATHER_B, BLOCK_N, BLOCK_K, STAGES)),
        ],
        [4, 4],
        [224, 56],
    )  # fmt: skip
