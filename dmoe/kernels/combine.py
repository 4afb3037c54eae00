"""Rows back to their tokens: every token gathers its rows and sums them, in the same order every time."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_rows", "num_parts", "num_assignments"])
def combine_kernel(
    rows,  # (R, H)
    gate_weights,  # (N,) float32, with WEIGHED
    residual,  # (T, H), with RESIDUAL
    out,  # (T, H)
    row_grads,  # (num_parts, R) float32, with ROW_GRADS
    gate_grads,  # (N,): row_grads summed over parts, for each assignment's row; 0 for those without one
    token_offsets,
    token_rows,
    num_rows,
    num_parts,
    num_assignments,  # N
    H: tl.constexpr,
    WEIGHED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ROW_GRADS: tl.constexpr,
    PARTS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``out[t] = residual[t] + sum over the assignments j of t of gate_weights[j] rows[token_rows[j]]``."""
    token = tl.program_id(0).to(tl.int64)
    begin = tl.load(token_offsets + token)
    end = tl.load(token_offsets + token + 1)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < H
    total = tl.zeros((BLOCK,), tl.float32)
    for slot in range(begin, end, SLOTS):
        assignments = slot + tl.arange(0, SLOTS)
        row = tl.load(token_rows + assignments, mask=assignments < end, other=-1)
        kept = row >= 0
        places = rows + tl.maximum(row, 0).to(tl.int64)[:, None] * H + columns[None, :]
        values = tl.load(places, mask=kept[:, None] & inside[None, :], other=0.0).to(tl.float32)
        if WEIGHED:
            values *= tl.load(gate_weights + assignments, mask=kept, other=0.0)[:, None]
        total += tl.sum(values, 0)
        if ROW_GRADS:  # noqa: SIM102  # the compiler leaves out what a constant alone excludes
            if tl.program_id(1) == 0:
                part = tl.arange(0, PARTS)[:, None]
                sources = row_grads + part.to(tl.int64) * num_rows + row[None, :]
                parts = tl.load(sources, mask=(part < num_parts) & kept[None, :], other=0.0)
                tl.store(gate_grads + assignments, tl.sum(parts, 0), mask=assignments < end)
    if ROW_GRADS:  # noqa: SIM102  # the assignments behind the last token's are nobody's
        if (tl.program_id(0) == tl.num_programs(0) - 1) & (tl.program_id(1) == 0):
            for slot in range(end, num_assignments, SLOTS):
                assignments = slot + tl.arange(0, SLOTS)
                tl.store(gate_grads + assignments, tl.zeros((SLOTS,), tl.float32), mask=assignments < num_assignments)
    place = token * H + columns
    if RESIDUAL:
        total += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=inside)
