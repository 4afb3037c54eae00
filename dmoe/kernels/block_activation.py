"""The experts' activation on block-sparse values, and its backward: one pass over the blocks in use, each."""

# mypy: disable-error-code="no-untyped-def"
# Triton gives a kernel's arguments their types when it is launched.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmoe.kernels._launch import launch
from dmoe.kernels._pieces import (
    ACTIVATION_DROPOUT,
    EXPERT_DROPOUT,
    act,
    act_slope,
    dropout_scale,
    through_up_act,
    up_act,
)
from dmoe.kernels.operands import activation_options


@triton.jit(do_not_specialize=["row_blocks"])
def _block_activation(
    pre,
    bias,
    gates,
    grad_hidden,
    hidden,
    grad_pre,
    partial,
    row_indices,
    pre_columns,
    offsets,
    assignments,
    seed,
    row_blocks,
    threshold,
    scale,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    P0: tl.constexpr,
    P1: tl.constexpr,
    P2: tl.constexpr,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    DROPOUT: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    """One part of ROWS rows of one block."""
    PARTS: tl.constexpr = BLOCK // ROWS
    block = tl.program_id(0) // PARTS
    part = tl.program_id(0) % PARTS
    row = tl.load(row_indices + block)
    if (row >= 0) & (row < row_blocks):
        HALVES: tl.constexpr = 2 if GATED else 1
        rm = part * ROWS + tl.arange(0, ROWS)
        rn = tl.arange(0, BLOCK)
        inside = rm[:, None] * BLOCK + rn[None, :]
        at = block.to(tl.int64) * (BLOCK * BLOCK)
        at_pre = at * HALVES
        first = tl.load(pre + at_pre + inside).to(tl.float32)
        if BIAS:
            column = tl.load(pre_columns + block * HALVES).to(tl.int64)
            first += tl.load(bias + column * BLOCK + rn).to(tl.float32)[None, :]
        acted = act(first, ACTIVATION, False, P0, P1, P2)
        if GATED:
            second = tl.load(pre + at_pre + BLOCK * BLOCK + inside).to(tl.float32)
            if BIAS:
                column = tl.load(pre_columns + block * HALVES + 1).to(tl.int64)
                second += tl.load(bias + column * BLOCK + rn).to(tl.float32)[None, :]
            factor = up_act(second, ACTIVATION, False, P0, P1, P2)
            value = acted * factor
        else:
            value = acted

        rows = row.to(tl.int64) * BLOCK + rm
        if DROPOUT:
            left = (block - tl.load(offsets + row)) * BLOCK  # the block's first column within its expert
            assignment = tl.load(assignments + rows)
            kept = dropout_scale(seed, assignment, left, threshold, scale, ACTIVATION_DROPOUT, ROWS, BLOCK)
        if BACKWARD:
            grad = tl.load(grad_hidden + at + inside).to(tl.float32)
            if DROPOUT:
                grad *= kept
            tl.store(partial + block.to(tl.int64) * BLOCK + rm, tl.sum(value * grad, 1))
        if DROPOUT:
            value *= kept
        if WEIGHTED:
            gate = tl.load(gates + rows)[:, None]
            value *= gate
        # In backward this is where grad_hidden lay: every program reads its part before it writes it.
        tl.store(hidden + at + inside, value.to(hidden.dtype.element_ty))
        if BACKWARD:
            if WEIGHTED:
                grad *= gate
            if GATED:
                grad_up = through_up_act(grad * acted, second, ACTIVATION, False, P0, P1, P2)
                tl.store(grad_pre + at_pre + BLOCK * BLOCK + inside, grad_up.to(grad_pre.dtype.element_ty))
                grad *= factor
            # Asked for late: it would only hold registers before.
            grad *= act_slope(first, ACTIVATION, False, P0, P1, P2)[1]
            tl.store(grad_pre + at_pre + inside, grad.to(grad_pre.dtype.element_ty))


@triton.jit
def _block_row_sums(values, offsets, out, BLOCK: tl.constexpr):
    """``out[row]``: the sum over a block row's blocks, in their order."""
    row = tl.program_id(0)
    rm = tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    for block in range(tl.load(offsets + row), tl.load(offsets + row + 1)):
        sums += tl.load(values + tl.full((), block, tl.int64) * BLOCK + rm)
    tl.store(out + row.to(tl.int64) * BLOCK + rm, sums)


@triton.jit
def _finish_rows(
    rows,
    bias,
    expert_offsets,
    assignments,
    seed,
    experts,
    hidden_size,
    threshold,
    scale,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    EXPERTS: tl.constexpr,
    BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """One (BLOCK, WIDTH) tile of ``rows``, in place; a block of rows belongs to one expert."""
    pid_m = tl.program_id(0)
    left = tl.program_id(1) * WIDTH
    row = pid_m.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    column = left + tl.arange(0, WIDTH)
    at = rows + row[:, None] * hidden_size + column[None, :]
    inside = column[None, :] < hidden_size
    value = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        ids = tl.arange(0, EXPERTS)
        ends = tl.load(expert_offsets + 1 + ids, mask=ids < experts, other=0)
        expert = tl.sum(((ids < experts) & (ends <= pid_m * BLOCK)).to(tl.int32))
        expert = tl.minimum(expert, experts - 1).to(tl.int64)  # behind the last expert's rows nothing is read
        shift = tl.load(bias + expert * hidden_size + column, mask=column < hidden_size, other=0.0)
        value += shift.to(tl.float32)[None, :]
    if DROPOUT:
        assignment = tl.load(assignments + row)
        value *= dropout_scale(seed, assignment, left, threshold, scale, EXPERT_DROPOUT, BLOCK, WIDTH)
    tl.store(at, value.to(rows.dtype.element_ty), mask=inside)


def block_activation(
    pre: Tensor,
    bias: Tensor | None,
    gates: Tensor | None,
    grad_hidden: Tensor | None,
    row_indices: Tensor,
    pre_columns: Tensor,
    offsets: Tensor,
    assignments: Tensor,
    seed: Tensor | None,
    dropout: float,
    activation: str,
    gated: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``dmoe.ops.block_activation``; ``grad_hidden`` is overwritten by the hidden values."""
    block_size, blocks = pre.shape[-1], row_indices.shape[0]
    hidden = pre.new_empty(blocks, block_size, block_size) if grad_hidden is None else grad_hidden
    grad_pre, partial = hidden, hidden
    if grad_hidden is not None:
        grad_pre = pre.new_empty(pre.shape)
        partial = offsets.new_empty(blocks, block_size, dtype=torch.float32)
    rows = min(block_size, 2048 // block_size)
    launch(
        _block_activation,
        (blocks * (block_size // rows),),
        pre,
        pre if bias is None else bias,
        pre if gates is None else gates,
        hidden,
        hidden,
        grad_pre,
        partial,
        row_indices,
        pre_columns,
        offsets,
        assignments,
        offsets if seed is None else seed,
        offsets.shape[0] - 1,
        round(dropout * 2**32),
        1.0 / (1.0 - dropout),
        BLOCK=block_size,
        ROWS=rows,
        **activation_options(activation),
        GATED=gated,
        BIAS=bias is not None,
        WEIGHTED=gates is not None,
        DROPOUT=seed is not None and dropout > 0,
        BACKWARD=grad_hidden is not None,
        num_warps=4,
        num_stages=2,
    )
    return hidden, grad_pre, partial


def block_row_sums(values: Tensor, offsets: Tensor) -> Tensor:
    """Sums ``(M,)`` over each row's blocks of ``values (nnz, B)``."""
    rows, block_size = offsets.shape[0] - 1, values.shape[1]
    out = values.new_empty(rows * block_size)
    launch(_block_row_sums, (rows,), values, offsets, out, BLOCK=block_size, num_warps=1, num_stages=2)
    return out


def finish_rows(
    rows: Tensor,
    bias: Tensor | None,
    expert_offsets: Tensor,
    assignments: Tensor,
    seed: Tensor | None,
    dropout: float,
) -> None:
    """See ``dmoe.ops.block_activation``: ``rows`` are changed in place."""
    experts, hidden_size = expert_offsets.shape[0] - 1, rows.shape[1]
    block, width = 16, 128
    launch(
        _finish_rows,
        (rows.shape[0] // block, -(-hidden_size // width)),
        rows,
        rows if bias is None else bias,
        expert_offsets,
        assignments,
        expert_offsets if seed is None else seed,
        experts,
        hidden_size,
        round(dropout * 2**32),
        1.0 / (1.0 - dropout),
        BLOCK=block,
        WIDTH=width,
        EXPERTS=triton.next_power_of_2(experts),
        BIAS=bias is not None,
        DROPOUT=seed is not None and dropout > 0,
        num_warps=4,
        num_stages=2,
    )
