"""What the Gluon kernels for Hopper share: the ring of stages, which tile comes next, activations.

A program has three groups of four warps. The producers fill a ring of ``STAGES`` stages in shared memory, each one step
of the summed dimension: 128 rows of the left operand in two halves, and the right operand. Each of two consumer groups
multiplies its half of the rows with the same right operand, into 64 rows of sums in its registers. Two barriers belong
to a stage: ``full`` (the producers' 128 threads, or the copy engine, are through) and ``empty`` (both consumer groups
have read it). Producers wait for nothing else, so they run into the next tile while consumers are in an epilogue.

Memory ordering, all of it inside one program:

- The copy engine (TMA) writes through the async proxy, as wgmma reads. It completes ``full``'s byte count, and whoever
  has waited for that phase sees the bytes.
- ``cp.async`` writes through the generic proxy. Its arrival on ``full`` (``mbarrier_arrive``, noinc) happens once all
  earlier copies of that thread are done, so no producer thread could put a fence between copy and arrival without
  waiting for its copies itself. The consumers put it on the other side: wait for ``full``, fence.proxy.async, wgmma.
  PTX asks for a proxy fence somewhere on the causality path from the write to the read, in the thread block of the read
  of the async proxy; this is on the path (write, arrival, wait, fence, read) of every write, as each consumer thread
  waits and fences itself. The other way, waiting in the producer for copies that are a step or two old, costs it as
  many stages of the four.
- ``empty`` is arrived on when the group's wgmma that reads the stage has retired (``wait_group``), which orders its
  reads before whatever the producers, having waited for ``empty``, write there, through either proxy.
- Barriers are initialised by generic writes, and the copy engine works on them: one fence after the initialisation.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

# Renamed between Triton 3.6 and 3.9; the old names still exist there, and raise.
tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
cp_async = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
group_barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # of the warps of one group

PRODUCER_THREADS = gl.constexpr(128)
# 16 bytes a thread, 128 contiguous bytes a row: how operands are copied and results stored, 64 columns at a time.
PANEL = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
PANEL_ROWS = gl.constexpr(gl.SliceLayout(1, gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])))
PANEL_COLUMNS = gl.constexpr(gl.SliceLayout(0, gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])))
# The same for 32 columns, where an epilogue needs more registers for each: 64 contiguous bytes a row.
NARROW = gl.constexpr(gl.BlockedLayout([1, 8], [8, 4], [4, 1], [1, 0]))
NARROW_ROWS = gl.constexpr(gl.SliceLayout(1, gl.BlockedLayout([1, 8], [8, 4], [4, 1], [1, 0])))
NARROW_COLUMNS = gl.constexpr(gl.SliceLayout(0, gl.BlockedLayout([1, 8], [8, 4], [4, 1], [1, 0])))
NARROW_WIDTH = gl.constexpr(32)
LANES = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))


@gluon.jit
def count_tiles(expert_offsets, num_experts, most, TILE_ROWS: gl.constexpr):
    """How many of the tile table's entries are tiles, in chunks of 128 experts: nothing depends on their number."""
    lanes = gl.arange(0, 128, LANES)
    tiles = gl.zeros((128,), gl.int32, LANES)
    for chunk in range(0, num_experts, 128):
        expert = chunk + lanes
        inside = expert < num_experts
        begin = gl.load(expert_offsets + expert, mask=inside, other=0)
        end = gl.load(expert_offsets + expert + 1, mask=inside, other=0)
        tiles += (end - begin + TILE_ROWS - 1) // TILE_ROWS
    return gl.minimum(gl.sum(tiles, 0), most)


@gluon.jit
def place(index, num_tiles, NUM_COLUMNS: gl.constexpr, GROUP: gl.constexpr):
    """Row tile and column tile number ``index``: down GROUP row tiles, then one column on, so both stay in L2."""
    per_group = GROUP * NUM_COLUMNS
    first = index // per_group * GROUP
    size = gl.minimum(num_tiles - first, GROUP)
    within = index % per_group
    return first + within % size, within // size


@gluon.jit
def tile_at(tiles, expert_offsets, position):
    """Expert, first row, and where the expert's rows end."""
    expert = gl.load(tiles + 2 * position)
    first = gl.load(tiles + 2 * position + 1)
    return expert, first, gl.load(expert_offsets + expert + 1)


@gluon.jit
def new_barriers(STAGES: gl.constexpr, FULL: gl.constexpr):
    """``full``, which takes FULL arrivals, ``empty``, and ``turn``, on which the second consumer group waits once."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=FULL)
        mbarrier.init(empty.index(stage), count=2)
    mbarrier.init(turn.index(0), count=1)
    fence_async_shared()
    return full, empty, turn


@gluon.jit
def multiply(
    acc,
    a_s,  # (2 STAGES, 64, BLOCK_K), or (2 STAGES, BLOCK_K, 64) with A_ROWS
    b_s,
    full,
    empty,
    turn,
    done,  # steps of earlier tiles
    steps,
    HALF: gl.constexpr,  # which consumer group this is: 0 or 1
    B_SHAPE: gl.constexpr,  # (N, BLOCK_K), or (BLOCK_K, N) with B_ROWS
    A_ROWS: gl.constexpr,  # the summed dimension runs over the operand's rows
    B_ROWS: gl.constexpr,
    FENCE: gl.constexpr,  # an operand comes by cp.async
    SKEW: gl.constexpr,  # steps that group 0 is ahead of group 1
    STAGES: gl.constexpr,
):
    """``acc`` plus ``steps`` steps of the ring, and how many steps there have been. Leaves every stage released.

    A stage is released when its wgmma has retired, which is known one step later: one is always in flight. With SKEW,
    group 1 begins its first tile when group 0 has done that many steps (there must be as many, if there are any). Both
    then go at the same rate and keep that distance: the epilogue of one runs beside the products of the other.
    """
    if SKEW > 0 and HALF == 1:
        mbarrier.wait(turn.index(0), 0, pred=steps > 0)
    for step in range(steps):
        stage = done % STAGES
        mbarrier.wait(full.index(stage), (done // STAGES) & 1)
        if FENCE:
            fence_async_shared()
        a = a_s.index(2 * stage + HALF)
        b = b_s.index(stage).reshape(B_SHAPE)
        acc = warpgroup_mma(a.permute((1, 0)) if A_ROWS else a, b if B_ROWS else b.permute((1, 0)), acc, is_async=True)
        acc = warpgroup_mma_wait(num_outstanding=1, deps=(acc,))
        mbarrier.arrive(empty.index((done + STAGES - 1) % STAGES), count=1, pred=step > 0)
        done += 1
        if SKEW > 0 and HALF == 0:
            mbarrier.arrive(turn.index(0), count=1, pred=done == SKEW)
    acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
    mbarrier.arrive(empty.index((done + STAGES - 1) % STAGES), count=1, pred=steps > 0)
    return acc, done


@gluon.jit
def _half(tile, RIGHT: gl.constexpr, N: gl.constexpr):
    left, right = gl.split(gl.permute(gl.reshape(tile, (64, 2, N // 2)), (0, 2, 1)))
    return right if RIGHT else left


@gluon.jit
def panel_of(tile, INDEX: gl.constexpr, N: gl.constexpr, WIDTH: gl.constexpr):
    """Columns ``WIDTH INDEX`` to ``WIDTH (INDEX + 1)`` of a tile of 64 rows and N (128 or 256) columns; WIDTH 32 or 64.

    A tile's columns lie in different registers of a thread, so this moves nothing.
    """
    start: gl.constexpr = INDEX * WIDTH
    half = _half(tile, start >= 128, 256) if N == 256 else tile
    panel = _half(half, start % 128 >= 64, 128)
    if WIDTH <= 32:
        panel = _half(panel, start % 64 >= 32, 64)
    if WIDTH == 16:
        panel = _half(panel, start % 32 >= 16, 32)
    return panel


@gluon.jit
def exp(x):
    """Two instructions for the seven of ``gl.exp``, which takes care of results below 2^-126: these are 0 here."""
    return gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * 1.4426950408889634], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def reciprocal(x):
    """To one ulp, in one instruction; a division takes nine."""
    return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _sigmoid(x):
    return reciprocal(1.0 + exp(-x))


@gluon.jit
def act(x, ACTIVATION: gl.constexpr):
    """See :func:`dmoe.kernels._pieces.act`: the same formulas."""
    if ACTIVATION == "silu":
        value = x * _sigmoid(x)
    elif ACTIVATION == "relu":
        value = gl.where(x < 0.0, 0.0, x)
    elif ACTIVATION == "relu_squared":
        value = gl.where(x < 0.0, 0.0, x)
        value *= value
    elif ACTIVATION == "sigmoid":
        value = _sigmoid(x)
    else:
        value = x * _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    return value


@gluon.jit
def act_slope(x, ACTIVATION: gl.constexpr):
    """See :func:`dmoe.kernels._pieces.act_slope`: the same formulas."""
    if ACTIVATION == "silu":
        s = _sigmoid(x)
        value, slope = x * s, s * (1.0 + x * (1.0 - s))
    elif ACTIVATION == "relu":
        off = x <= 0.0
        slope = (off == 0).to(gl.float32)
        value = gl.where(off, 0.0, x)
    elif ACTIVATION == "relu_squared":
        x = gl.where(x < 0.0, 0.0, x)
        value, slope = x * x, 2.0 * x
    elif ACTIVATION == "sigmoid":
        s = _sigmoid(-gl.abs(x))
        value, slope = gl.where(x < 0.0, s, 1.0 - s), s * (1.0 - s)
    else:
        z = 1.5957691216057308 * (x + 0.044715 * x * x * x)
        e = exp(-gl.abs(z))
        r = reciprocal(1.0 + e)
        s = gl.where(z < 0.0, e * r, r)
        value, slope = x * s, s + x * e * r * r * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    return value, slope
