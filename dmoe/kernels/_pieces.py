"""What several kernels are made of: where a tile lies, how it is loaded, activations, dropout masks."""

from __future__ import annotations

import triton
import triton.language as tl

ACTIVATION_DROPOUT = tl.constexpr(0)  # the streams of dmoe/ops/philox.py
EXPERT_DROPOUT = tl.constexpr(1)
PTX = tl.constexpr(not triton.knobs.runtime.interpret)  # the interpreter knows none


@triton.jit
def place(index, num_tiles, num_columns, GROUP: tl.constexpr):
    """Row tile and column tile number ``index``: down GROUP row tiles, then one column on, so both stay in L2."""
    per_group = GROUP * num_columns
    first = index // per_group * GROUP
    size = tl.minimum(num_tiles - first, GROUP)
    within = index % per_group
    return first + within % size, within // size


@triton.jit
def count_tiles(expert_offsets, num_experts, most, BLOCK_M: tl.constexpr):
    """How many tiles of the table have rows: ``most``, its length, is a bound that shapes alone give.

    Counted again by every program: one read of the offsets, in chunks whose size does not depend on their number.
    """
    total = 0
    for start in range(0, num_experts, 1024):
        expert = start + tl.arange(0, 1024)
        real = expert < num_experts
        end = tl.load(expert_offsets + expert + 1, mask=real, other=0)
        total += tl.sum(tl.cdiv(end - tl.load(expert_offsets + expert, mask=real, other=0), BLOCK_M))
    return tl.minimum(total, most)


@triton.jit
def tile_rows(tiles, expert_offsets, position, BLOCK_M: tl.constexpr):
    """Expert, first row, rows ``(BLOCK_M,)``, where they end. Behind the last tile: no rows, first and end are -1."""
    expert = tl.load(tiles + 2 * position)
    first = tl.load(tiles + 2 * position + 1)
    end = tl.load(expert_offsets + tl.maximum(expert, 0) + 1)
    end = tl.where(expert >= 0, end, -1)
    return expert, first, first + tl.arange(0, BLOCK_M), end


@triton.jit
def matrix_tile(
    source,
    row,
    column,
    row_end,
    column_end,
    STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EVEN_ROWS: tl.constexpr,
    EVEN_COLUMNS: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
):
    """``source[row : row + ROWS, column : column + COLUMNS]``, through a descriptor (TMA) or pointers.

    Pointers read zeros behind the ends, unless the size is even. A descriptor knows the ends of the whole array only:
    what it reads behind ``row_end`` is another expert's, so it serves where such rows are never stored.
    """
    if DESCRIPTOR:
        tile = source.load([row, column])
    else:
        rows = row + tl.arange(0, ROWS)
        columns = column + tl.arange(0, COLUMNS)
        pointers = source + rows.to(tl.int64)[:, None] * STRIDE + columns[None, :]
        if EVEN_ROWS and EVEN_COLUMNS:
            tile = tl.load(pointers)
        elif EVEN_ROWS:
            tile = tl.load(pointers, mask=(columns < column_end)[None, :], other=0.0)
        elif EVEN_COLUMNS:
            tile = tl.load(pointers, mask=(rows < row_end)[:, None], other=0.0)
        else:
            tile = tl.load(pointers, mask=(rows < row_end)[:, None] & (columns < column_end)[None, :], other=0.0)
    return tile


@triton.jit
def operand_tile(
    source,
    first,
    n,
    k,
    n_end: tl.constexpr,
    k_end: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    K_ROWS: tl.constexpr,
):
    """``(BLOCK_K, BLOCK_N)`` of an expert's weight, which begins at row ``first``: rows are n, or k with K_ROWS."""
    if K_ROWS:
        tile = matrix_tile(
            source, first + k, n, first + k_end, n_end, STRIDE, BLOCK_K, BLOCK_N, EVEN_K, EVEN_N, DESCRIPTOR
        )
    else:
        tile = matrix_tile(
            source, first + n, k, first + n_end, k_end, STRIDE, BLOCK_N, BLOCK_K, EVEN_N, EVEN_K, DESCRIPTOR
        ).T
    return tile


@triton.jit
def inside_of(columns, end, SIZE: tl.constexpr, EVEN: tl.constexpr):
    """Which of the columns ``(SIZE,)`` are in front of the end; a constant where all must be, and no comparison."""
    return tl.full((SIZE,), 1, tl.int1) if EVEN else columns < end


@triton.jit
def rows_tile(pointers, columns, column_end, EVEN: tl.constexpr):
    """Columns of rows given by pointers to their beginnings, ``(M, 1)``; zeros behind the end, unless it is even."""
    if EVEN:
        return tl.load(pointers + columns[None, :])
    return tl.load(pointers + columns[None, :], mask=(columns < column_end)[None, :], other=0.0)


@triton.jit
def tokens_again(row_to_token, rows, stored):
    """Token of each row, 0 where it holds none, and whether it holds one: for an epilogue.

    The loop before it has read them, too, with another value for rows that are not there: so the compiler keeps them
    apart, and none of this in registers through the loop.
    """
    token = tl.load(row_to_token + rows, mask=stored, other=-1)
    return tl.maximum(token, 0), token >= 0


@triton.jit
def row_values(gate_weights, row_to_slot, token_offsets, rows, token, real):
    """Assignment and gate weight of each row; 0 where a row holds no token."""
    assignment = tl.load(token_offsets + token, mask=real, other=0) + tl.load(row_to_slot + rows, mask=real, other=0)
    return assignment, tl.load(gate_weights + assignment, mask=real, other=0.0)


@triton.jit
def halves(tile, M: tl.constexpr, N: tl.constexpr):
    """Left and right half of a tile's columns."""
    return tl.split(tl.permute(tl.reshape(tile, (M, 2, N // 2)), (0, 2, 1)))


@triton.jit
def _half(tile, RIGHT: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    left, right = halves(tile, M, N)
    return right if RIGHT else left


@triton.jit
def part_of(tile, INDEX: tl.constexpr, PARTS: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """Part number INDEX of the PARTS (1, 2, 4 or 8) that a tile's columns are cut into.

    An epilogue that works on one part after the other needs a part's registers, not the tile's.
    """
    if PARTS == 8:
        part = _half(tile, INDEX >= 4, M, N)
        part = _half(part, INDEX % 4 >= 2, M, N // 2)
        part = _half(part, INDEX % 2 == 1, M, N // 4)
    elif PARTS == 4:
        part = _half(tile, INDEX >= 2, M, N)
        part = _half(part, INDEX % 2 == 1, M, N // 2)
    elif PARTS == 2:
        part = _half(tile, INDEX == 1, M, N)
    else:
        part = tile
    return part


@triton.jit
def _sigmoid(x, SHORT: tl.constexpr):
    """``1 / (1 + exp(-x))``; SHORT in four instructions, good to 2^-20 + |x| 2^-23 of itself: 16 bits do not see it.

    A quarter of an epilogue is this function: dividing as IEEE wants it, and exponentials below the normal range, take
    ten more. ``tanh.approx`` would be shorter still, but is good to 2^-11 of 1: sigmoid(-8) is a third of that.
    """
    if SHORT and PTX:
        s = tl.inline_asm_elementwise(
            """{
            .reg .f32 t;
            mul.f32 t, $1, 0fBFB8AA3B;  // -1 / ln 2
            ex2.approx.ftz.f32 t, t;
            add.f32 t, t, 0f3F800000;
            rcp.approx.ftz.f32 $0, t;
            }""",
            "=f,f",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        s = tl.sigmoid(x)
    return s


@triton.jit
def _tanh(x, SHORT: tl.constexpr):
    """As in ``csrc/activation.h``: a polynomial where 1 - tanh would be mostly rounding error."""
    u, s = tl.abs(x), x * x
    p = -0.00568128796 * s + 0.0206186287
    p = (p * s - 0.053733699) * s + 0.13331373
    far = 2.0 * _sigmoid(2.0 * u, SHORT) - 1.0
    return tl.where(u < 0.625, x + x * s * (p * s - 0.333332807), tl.where(x < 0.0, -far, far))


@triton.jit
def act(
    x,
    ACTIVATION: tl.constexpr,
    SHORT: tl.constexpr = False,
    P0: tl.constexpr = 0.0,
    P1: tl.constexpr = 0.0,
    P2: tl.constexpr = 0.0,
):
    """The activation, of the gate where there is one; see ``dmoe/ops/activation.py``. SHORT for results of 16 bits.

    P0, P1 and P2 are its numbers, in the order of :mod:`dmoe.activations`.
    """
    if ACTIVATION == "silu":
        value = x * _sigmoid(x, SHORT)
    elif ACTIVATION == "clamped_swiglu":
        x = tl.where(x > P0, P0, x)  # NaN stays NaN
        value = x * _sigmoid(P1 * x, SHORT)
    elif ACTIVATION == "softcapped_swiglu":
        value = P0 * _tanh(x / P0, SHORT) * _sigmoid(x, SHORT)
    elif ACTIVATION == "relu":
        value = tl.where(x < 0.0, 0.0, x)  # NaN stays NaN
    elif ACTIVATION == "relu_squared":
        value = tl.where(x < 0.0, 0.0, x)
        value *= value
    elif ACTIVATION == "sigmoid":
        value = _sigmoid(x, SHORT)
    elif ACTIVATION == "gelu":
        value = x * 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    else:  # gelu_tanh: (1 + tanh z) / 2 is sigmoid(2 z)
        value = x * _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x), SHORT)
    return value


@triton.jit
def up_act(
    up,
    ACTIVATION: tl.constexpr,
    SHORT: tl.constexpr = False,
    P0: tl.constexpr = 0.0,
    P1: tl.constexpr = 0.0,
    P2: tl.constexpr = 0.0,
):
    """What the gate's activation is multiplied by: up, but for activations that change it too."""
    if ACTIVATION == "clamped_swiglu":
        up = tl.where(up > P0, P0, tl.where(up < -P0, -P0, up)) + P2
    elif ACTIVATION == "softcapped_swiglu":
        up = P1 * _tanh(up / P1, SHORT)
    return up


@triton.jit
def through_up_act(
    grad,
    up,
    ACTIVATION: tl.constexpr,
    SHORT: tl.constexpr = False,
    P0: tl.constexpr = 0.0,
    P1: tl.constexpr = 0.0,
    P2: tl.constexpr = 0.0,
):
    """The gradient of up, from that of :func:`up_act`."""
    if ACTIVATION == "clamped_swiglu":
        grad = tl.where(tl.abs(up) > P0, 0.0, grad)
    elif ACTIVATION == "softcapped_swiglu":
        t = _tanh(up / P1, SHORT)
        grad *= 1.0 - t * t
    return grad


@triton.jit
def act_slope(
    x,
    ACTIVATION: tl.constexpr,
    SHORT: tl.constexpr = False,
    P0: tl.constexpr = 0.0,
    P1: tl.constexpr = 0.0,
    P2: tl.constexpr = 0.0,
):
    """:func:`act` and its derivative."""
    if ACTIVATION == "silu":
        s = _sigmoid(x, SHORT)
        # Behind 100 it is 1, and a short reciprocal's last bit should not be multiplied by a large number.
        value, slope = x * s, s * (1.0 + (tl.minimum(x, 100.0) if SHORT else x) * (1.0 - s))
    elif ACTIVATION == "clamped_swiglu":
        g = tl.where(x > P0, P0, x)
        z = P1 * g
        s = _sigmoid(z, SHORT)
        value, slope = g * s, s * (1.0 + (tl.minimum(z, 100.0) if SHORT else z) * (1.0 - s))
        slope = tl.where(x > P0, 0.0, slope)
    elif ACTIVATION == "softcapped_swiglu":
        t, s = _tanh(x / P0, SHORT), _sigmoid(x, SHORT)
        value = P0 * t * s
        slope = (1.0 - t * t) * s + value * (1.0 - s)
    elif ACTIVATION == "relu_squared":
        x = tl.where(x < 0.0, 0.0, x)
        value, slope = x * x, 2.0 * x
    elif ACTIVATION == "sigmoid":
        s = _sigmoid(-tl.abs(x), SHORT)  # the smaller of s and 1 - s: the other has lost its digits
        value, slope = tl.where(x < 0.0, s, 1.0 - s), s * (1.0 - s)
    elif ACTIVATION == "relu":
        off = x <= 0.0  # NaN stays NaN
        slope = (off == 0).to(tl.float32)
        value = tl.where(off, 0.0, x)
    elif ACTIVATION == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        value, slope = x * cdf, cdf + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    elif SHORT:
        s = _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x), True)
        value = x * s
        x = tl.minimum(tl.maximum(x, -16.0), 8.0)  # s is 0 or 1 there, and its last bit stays small
        slope = s + x * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    else:
        z = 1.5957691216057308 * (x + 0.044715 * x * x * x)
        e = tl.exp(-tl.abs(z))
        r = 1.0 / (1.0 + e)
        s = tl.where(z < 0.0, e * r, r)
        # s (1 - s) is e r^2: 1 - s itself would be mostly rounding error, and is multiplied by up to 30 here
        value, slope = x * s, s + x * e * r * r * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    return value, slope


@triton.jit
def dropout_scale(
    seed, rows, column, threshold, scale, STREAM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """``(ROWS, COLUMNS)`` of 0 or ``scale``; see ``dmoe/ops/philox.py``. ``column`` is a multiple of 4."""
    quads = (column // 4 + tl.arange(0, COLUMNS // 4)).to(tl.uint32)[None, :]
    counter = rows.to(tl.uint32)[:, None]
    nothing = tl.zeros((ROWS, COLUMNS // 4), tl.uint32)
    a, b, c, d = tl.philox(tl.load(seed), quads + nothing, counter + nothing, nothing + STREAM, nothing)
    words = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (ROWS, COLUMNS))
    return tl.where(words.to(tl.int64) >= threshold, scale, 0.0)
