"""Products of every expert's rows with its matrix, for Hopper; :mod:`dmoe.kernels.gluon_pieces` says how warps work."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from dmoe.kernels.gluon_pieces import (
    PANEL,
    PANEL_COLUMNS,
    PANEL_ROWS,
    count_tiles,
    multiply,
    new_barriers,
    panel_of,
    place,
    tile_at,
    tma_load,
)


@gluon.jit
def _copying_producer(
    a,  # descriptor of (R, K), blocks (64, BLOCK_K)
    weight,  # descriptor: blocks of b_s
    tiles,
    expert_offsets,
    num_tiles,
    a_s,
    b_s,
    full,
    empty,
    K: gl.constexpr,
    NUM_COLUMNS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    B_ROWS: gl.constexpr,
    BLOCK_K: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Both operands by the copy engine. Behind an expert's end it reads another's rows, whose results nobody stores."""
    done = 0
    for index in range(gl.program_id(0), num_tiles * NUM_COLUMNS, gl.num_programs(0)):
        position, column = place(index, num_tiles, NUM_COLUMNS, GROUP)
        expert = gl.load(tiles + 2 * position)
        first = gl.load(tiles + 2 * position + 1)
        for k in range(0, K, BLOCK_K):
            stage = done % STAGES
            mbarrier.wait(empty.index(stage), (done // STAGES) & 1 ^ 1)
            mbarrier.expect(full.index(stage), 2 * (128 + BLOCK_N) * BLOCK_K)
            tma_load(a, [first, k], full.index(stage), a_s.index(2 * stage))
            tma_load(a, [first + 64, k], full.index(stage), a_s.index(2 * stage + 1))
            if B_ROWS:
                tma_load(weight, [expert, k, column * BLOCK_N], full.index(stage), b_s.index(stage))
            else:
                tma_load(weight, [expert, column * BLOCK_N, k], full.index(stage), b_s.index(stage))
            done += 1


@gluon.jit
def _rows_consumer(
    bias,
    out,
    tiles,
    expert_offsets,
    num_tiles,
    a_s,
    b_s,
    full,
    empty,
    turn,
    HALF: gl.constexpr,
    K: gl.constexpr,
    N: gl.constexpr,
    NUM_COLUMNS: gl.constexpr,
    B_ROWS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    GROUP: gl.constexpr,
    SKEW: gl.constexpr,
    STAGES: gl.constexpr,
):
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16]
    )
    steps: gl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    b_shape: gl.constexpr = (BLOCK_K, BLOCK_N) if B_ROWS else (BLOCK_N, BLOCK_K)
    dtype: gl.constexpr = a_s.dtype
    done = 0
    for index in range(gl.program_id(0), num_tiles * NUM_COLUMNS, gl.num_programs(0)):
        position, column = place(index, num_tiles, NUM_COLUMNS, GROUP)
        expert, first, end = tile_at(tiles, expert_offsets, position)
        rows = first + HALF * 64 + gl.arange(0, 64, PANEL_ROWS)
        acc = gl.zeros((64, BLOCK_N), gl.float32, layout)
        acc, done = multiply(
            acc, a_s, b_s, full, empty, turn, done, steps, HALF, b_shape, False, B_ROWS, False, SKEW, STAGES
        )
        places = rows.to(gl.int64)[:, None] * N
        for panel in gl.static_range(BLOCK_N // 64):
            columns = column * BLOCK_N + panel * 64 + gl.arange(0, 64, PANEL_COLUMNS)
            inside = columns < N
            if bias is None:
                rounded = gl.convert_layout(panel_of(acc, panel, BLOCK_N, 64).to(dtype), PANEL)
            else:
                added = gl.load(bias + expert * N + columns, mask=inside, other=0.0).to(gl.float32)
                rounded = (gl.convert_layout(panel_of(acc, panel, BLOCK_N, 64), PANEL) + added[None, :]).to(dtype)
            gl.store(out + places + columns[None, :], rounded, mask=(rows < end)[:, None] & inside[None, :])


@gluon.jit(do_not_specialize=["num_experts", "table_length"])
def gluon_rows_kernel(
    a,  # descriptor of (R, K), blocks (64, BLOCK_K)
    weight,  # descriptor of (E, N, K), blocks (1, BLOCK_N, BLOCK_K); with B_ROWS of (E, K, N), (1, BLOCK_K, BLOCK_N)
    bias,  # (E, N), or None
    out,  # (R, N)
    tiles,
    expert_offsets,
    num_experts,
    table_length,
    K: gl.constexpr,
    N: gl.constexpr,
    B_ROWS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    GROUP: gl.constexpr,
    SKEW: gl.constexpr,
    STAGES: gl.constexpr,
    num_warps: gl.constexpr,
):
    """``out[r] = a[r] @ weight[e]^T + bias[e]`` (``@ weight[e]`` with B_ROWS); see ``rows_kernel``."""
    num_columns: gl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    dtype: gl.constexpr = a.dtype
    b_block: gl.constexpr = [STAGES, 1, BLOCK_K, BLOCK_N] if B_ROWS else [STAGES, 1, BLOCK_N, BLOCK_K]
    a_s = gl.allocate_shared_memory(dtype, [2 * STAGES, 64, BLOCK_K], a.layout)
    b_s = gl.allocate_shared_memory(dtype, b_block, weight.layout)
    full, empty, turn = new_barriers(STAGES, 1)
    num_tiles = count_tiles(expert_offsets, num_experts, table_length, 128)
    gl.warp_specialize(
        [
            (_rows_consumer, (bias, out, tiles, expert_offsets, num_tiles, a_s, b_s, full, empty, turn, 0, K, N,
                              num_columns, B_ROWS, BLOCK_N, BLOCK_K, GROUP, SKEW, STAGES)),
            (_rows_consumer, (bias, out, tiles, expert_offsets, num_tiles, a_s, b_s, full, empty, turn, 1, K, N,
                              num_columns, B_ROWS, BLOCK_N, BLOCK_K, GROUP, SKEW, STAGES)),
            (_copying_producer, (a, weight, tiles, expert_offsets, num_tiles, a_s, b_s, full, empty, K, num_columns,
                                 BLOCK_N, B_ROWS, BLOCK_K, GROUP, STAGES)),
        ],
        [4, 4],
        [224, 56],
    )  # fmt: skip
