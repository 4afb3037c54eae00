"""The up projection with its activation, for Hopper; :mod:`dmoe.kernels.gluon_pieces` says how warps work."""

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
    act,
    count_tiles,
    cp_async,
    multiply,
    new_barriers,
    panel_of,
    place,
    tile_at,
    tma_load,
)


@gluon.jit
def _row_starts(source, row_to_token, rows, end, WIDTH: gl.constexpr):
    """Pointers to the beginnings of the rows' tokens: rows of no token read token 0, and are stored as zeros."""
    token = gl.maximum(gl.load(row_to_token + rows, mask=rows < end, other=-1), 0)
    return source + token.to(gl.int64)[:, None] * WIDTH


@gluon.jit
def gathering_producer(
    source,  # (T, K)
    weight,  # descriptor: blocks of b_s
    tiles,
    expert_offsets,
    row_to_token,
    num_tiles,
    a_s,
    b_s,
    full,
    empty,
    K: gl.constexpr,
    NUM_COLUMNS: gl.constexpr,
    COLUMN: gl.constexpr,  # columns of a tile
    HALVES: gl.constexpr,  # of an expert, in the descriptor's first dimension
    B_ROWS: gl.constexpr,  # the summed dimension is the descriptor's second, not its third
    BYTES: gl.constexpr,  # of the right operand's stage
    BLOCK_K: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Rows of tokens by cp.async, the weight by the copy engine."""
    done = 0
    columns = gl.arange(0, BLOCK_K, PANEL_COLUMNS)
    lanes = gl.arange(0, 64, PANEL_ROWS)
    for index in range(gl.program_id(0), num_tiles * NUM_COLUMNS, gl.num_programs(0)):
        position, column = place(index, num_tiles, NUM_COLUMNS, GROUP)
        expert, first, end = tile_at(tiles, expert_offsets, position)
        upper = _row_starts(source, row_to_token, first + lanes, end, K) + columns[None, :]
        lower = _row_starts(source, row_to_token, first + 64 + lanes, end, K) + columns[None, :]
        for k in range(0, K, BLOCK_K):
            stage = done % STAGES
            mbarrier.wait(empty.index(stage), (done // STAGES) & 1 ^ 1)
            mbarrier.expect(full.index(stage), BYTES)
            if B_ROWS:
                tma_load(weight, [HALVES * expert, k, column * COLUMN], full.index(stage), b_s.index(stage))
            else:
                tma_load(weight, [HALVES * expert, column * COLUMN, k], full.index(stage), b_s.index(stage))
            if K % BLOCK_K == 0:
                cp_async(a_s.index(2 * stage), upper + k)
                cp_async(a_s.index(2 * stage + 1), lower + k)
            else:
                inside = (k + columns < K)[None, :]
                cp_async(a_s.index(2 * stage), upper + k, mask=inside)
                cp_async(a_s.index(2 * stage + 1), lower + k, mask=inside)
            async_copy.mbarrier_arrive(full.index(stage), increment_count=False)
            done += 1


@gluon.jit
def _up_consumer(
    bias,
    pre,
    hidden,
    tiles,
    expert_offsets,
    row_to_token,
    num_tiles,
    a_s,
    b_s,
    full,
    empty,
    turn,
    HALF: gl.constexpr,
    H: gl.constexpr,
    F: gl.constexpr,
    ACTIVATION: gl.constexpr,
    GATED: gl.constexpr,
    NUM_COLUMNS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    GROUP: gl.constexpr,
    SKEW: gl.constexpr,
    STAGES: gl.constexpr,
):
    parts: gl.constexpr = 2 if GATED else 1
    width: gl.constexpr = BLOCK_N // parts  # columns of the activation
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16]
    )
    steps: gl.constexpr = (H + BLOCK_K - 1) // BLOCK_K
    dtype: gl.constexpr = a_s.dtype
    done = 0
    for index in range(gl.program_id(0), num_tiles * NUM_COLUMNS, gl.num_programs(0)):
        position, column = place(index, num_tiles, NUM_COLUMNS, GROUP)
        expert, first, end = tile_at(tiles, expert_offsets, position)
        rows = first + HALF * 64 + gl.arange(0, 64, PANEL_ROWS)
        stored = rows < end
        real = gl.load(row_to_token + rows, mask=stored, other=-1) >= 0
        acc = gl.zeros((64, BLOCK_N), gl.float32, layout)
        acc, done = multiply(
            acc, a_s, b_s, full, empty, turn, done, steps, HALF, (BLOCK_N, BLOCK_K), False, False, True, SKEW, STAGES
        )
        places = rows.to(gl.int64)[:, None] * F
        for panel in gl.static_range(width // 64):
            columns = column * width + panel * 64 + gl.arange(0, 64, PANEL_COLUMNS)
            inside = columns < F
            mask = stored[:, None] & inside[None, :]
            up = _finished(
                panel_of(acc, panel + (parts - 1) * (width // 64), BLOCK_N, 64),
                bias,
                expert * (parts * F) + (parts - 1) * F + columns,
                inside,
                real,
                dtype,
            )
            if GATED:
                gate = _finished(
                    panel_of(acc, panel, BLOCK_N, 64), bias, expert * (parts * F) + columns, inside, real, dtype
                )
            if pre is not None:
                gl.store(pre + places * parts + ((parts - 1) * F + columns)[None, :], up, mask=mask)
                if GATED:
                    gl.store(pre + places * parts + columns[None, :], gate, mask=mask)
            if hidden is not None:
                # From the rounded numbers, as backward will see them.
                if GATED:
                    value = act(gate.to(gl.float32), ACTIVATION) * up.to(gl.float32)
                else:
                    value = act(up.to(gl.float32), ACTIVATION)
                gl.store(hidden + places + columns[None, :], value.to(dtype), mask=mask)


@gluon.jit
def _finished(panel, bias, bias_places, inside, real, DTYPE: gl.constexpr):
    """A panel of sums plus the bias as it is stored: rounded, zeros where a row holds no token.

    Without a bias it is rounded before the threads exchange it, which halves what goes through shared memory.
    """
    if bias is None:
        rounded = gl.convert_layout(panel.to(DTYPE), PANEL)
    else:
        added = gl.load(bias + bias_places, mask=inside, other=0.0).to(gl.float32)
        rounded = (gl.convert_layout(panel, PANEL) + added[None, :]).to(DTYPE)
    return gl.where(real[:, None], rounded, gl.zeros((64, 64), DTYPE, PANEL))


@gluon.jit(do_not_specialize=["num_experts", "table_length"])
def gluon_up_kernel(
    x,  # (T, H)
    weight,  # descriptor of (parts E, F, H), blocks (parts, BLOCK_N / parts, BLOCK_K)
    bias,  # (E, parts F), or None
    pre,  # (R, parts F), or None
    hidden,  # (R, F), or None
    tiles,
    expert_offsets,
    row_to_token,
    num_experts,
    table_length,
    H: gl.constexpr,
    F: gl.constexpr,
    ACTIVATION: gl.constexpr,
    GATED: gl.constexpr,
    BLOCK_N: gl.constexpr,  # of gate and up together
    BLOCK_K: gl.constexpr,
    GROUP: gl.constexpr,
    SKEW: gl.constexpr,
    STAGES: gl.constexpr,
    num_warps: gl.constexpr,
):
    """``pre[r] = x[token of r] @ weight[e]^T + bias[e]``, and the activation; see ``up_kernel`` in expert_mlp.py."""
    parts: gl.constexpr = 2 if GATED else 1
    width: gl.constexpr = BLOCK_N // parts
    num_columns: gl.constexpr = (F + width - 1) // width
    dtype: gl.constexpr = x.dtype.element_ty
    left: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, BLOCK_K], dtype)
    a_s = gl.allocate_shared_memory(dtype, [2 * STAGES, 64, BLOCK_K], left)
    b_s = gl.allocate_shared_memory(dtype, [STAGES, parts, width, BLOCK_K], weight.layout)
    full, empty, turn = new_barriers(STAGES, 1 + PRODUCER_THREADS)
    num_tiles = count_tiles(expert_offsets, num_experts, table_length, 128)
    gl.warp_specialize(
        [
            (_up_consumer, (bias, pre, hidden, tiles, expert_offsets, row_to_token, num_tiles, a_s, b_s, full, empty,
                            turn, 0, H, F, ACTIVATION, GATED, num_columns, BLOCK_N, BLOCK_K, GROUP, SKEW, STAGES)),
            (_up_consumer, (bias, pre, hidden, tiles, expert_offsets, row_to_token, num_tiles, a_s, b_s, full, empty,
                            turn, 1, H, F, ACTIVATION, GATED, num_columns, BLOCK_N, BLOCK_K, GROUP, SKEW, STAGES)),
            (gathering_producer, (x, weight, tiles, expert_offsets, row_to_token, num_tiles, a_s, b_s, full, empty, H,
                                  num_columns, width, parts, False, 2 * BLOCK_N * BLOCK_K, BLOCK_K, GROUP, STAGES)),
        ],
        [4, 4],
        [224, 56],
    )  # fmt: skip
