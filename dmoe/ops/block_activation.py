"""What the block-sparse expert MLP does between its products: activation, biases, dropout, weights by row.

Blocks of a gated pre-activation lie as ``(nnz, 2, B, B)``, gate then up, ``(nnz, B, B)`` otherwise. ``bias`` is flat;
``pre_columns`` names the block of it that belongs to each block of ``pre``. Blocks that are not in use (row index -1)
hold nothing, and nothing is read from them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmoe.ops.activation import accumulate_dtype, activate, activate_backward
from dmoe.ops.philox import ACTIVATION_DROPOUT, EXPERT_DROPOUT, dropout_scale


def _values(pre: Tensor, bias: Tensor | None, row_indices: Tensor, pre_columns: Tensor, gated: bool) -> Tensor:
    """The pre-activation, bias added, ``(nnz, B, 2 B)`` or ``(nnz, B, B)``; 0 in blocks that are not in use."""
    block_size = pre.shape[-1]
    value = pre.to(accumulate_dtype(pre.dtype)).view(-1, 2 if gated else 1, block_size, block_size)
    if bias is not None:
        blocks = bias.reshape(-1, block_size)[pre_columns.clamp(min=0).long()]
        value = value + blocks.view(-1, value.shape[1], 1, block_size)
    value = value.masked_fill((row_indices < 0)[:, None, None, None], 0)
    return torch.cat(value.unbind(1), dim=-1)


def _by_block(
    of_rows: Tensor, row_indices: Tensor, offsets: Tensor, block_size: int, *, one_column: bool = False
) -> Tensor:
    """Blocks of a tensor by rows: ``(M, 1)`` to ``(nnz, B, 1)``, or ``(M, width)`` to ``(nnz, B, B)``."""
    row = row_indices.clamp(min=0).long()
    if one_column:
        return of_rows.view(offsets.shape[0] - 1, block_size, 1)[row]
    local = (torch.arange(row.shape[0], device=row.device) - offsets[row]).clamp(min=0)
    tiles = of_rows.view(offsets.shape[0] - 1, block_size, of_rows.shape[1] // block_size, block_size).transpose(1, 2)
    return tiles[row, local.masked_fill(row_indices < 0, 0)]


def block_activation_ref(
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
    """``hidden = gate * dropout * act(pre + bias)``, and its backward where ``grad_hidden`` is given.

    Args:
        pre: pre-activation by blocks.
        bias: the up projection's, flat, or None.
        gates: weight of each row, ``(M,)``, or None where it does not multiply the activation.
        grad_hidden: ``(nnz, B, B)``, the gradient of ``hidden / gate``, or None in forward. It may be overwritten.
        row_indices, offsets: structure of ``hidden``.
        pre_columns: ``(nnz,)``, or ``(2 nnz,)`` if gated.
        assignments: which assignment each row is, ``(M,)``: the counter of its dropout mask.
        seed, dropout: of the mask; None or 0 for none.
        activation, gated: as in :class:`dmoe.MoEConfig`.

    Returns:
        ``hidden (nnz, B, B)`` in pre's dtype; and in backward the gradient of ``pre``, and ``(nnz, B)`` in the
        accumulation dtype: each block row's inner products of ``hidden / gate`` with its gradient.
    """
    block_size = pre.shape[-1]
    value = _values(pre, bias, row_indices, pre_columns, gated)
    hidden, kept = activate(value, activation, gated), None
    if seed is not None and dropout:
        width = row_indices.shape[0] // max(offsets.shape[0] - 1, 1) * block_size
        mask = dropout_scale(seed, assignments.clamp(min=0), width, ACTIVATION_DROPOUT, dropout, hidden.dtype)
        kept = _by_block(mask, row_indices, offsets, block_size)
        hidden = hidden * kept
    gate = None
    if gates is not None:
        gate = _by_block(gates.unsqueeze(1), row_indices, offsets, block_size, one_column=True)
    if grad_hidden is None:
        hidden = hidden if gate is None else hidden * gate
        hidden = hidden.to(pre.dtype)
        return hidden, hidden, hidden
    grad = grad_hidden.to(hidden.dtype).masked_fill((row_indices < 0)[:, None, None], 0)
    partial = (hidden * grad).sum(-1)
    grad = grad if kept is None else grad * kept
    if gate is not None:
        hidden, grad = hidden * gate, grad * gate
    halves = activate_backward(grad, value, activation, gated).chunk(2 if gated else 1, dim=-1)
    grad_pre = torch.stack(halves, dim=1).view(pre.shape)
    return hidden.to(pre.dtype), grad_pre.to(pre.dtype), partial


def block_row_sums_ref(values: Tensor, offsets: Tensor) -> Tensor:
    """Sums ``(M,)`` over the blocks in use of each block row of ``values (nnz, B)``."""
    rows, entry = offsets.shape[0] - 1, torch.arange(values.shape[0], device=values.device)
    used = entry < offsets[-1]
    row = torch.searchsorted(offsets[1:].contiguous(), entry, right=True).masked_fill(~used, rows)
    sums = values.new_zeros(rows + 1, values.shape[1])
    return sums.index_add_(0, row, values.masked_fill(~used.unsqueeze(1), 0))[:-1].reshape(-1)


def finish_rows_ref(
    rows: Tensor,
    bias: Tensor | None,
    expert_offsets: Tensor,
    assignments: Tensor,
    seed: Tensor | None,
    dropout: float,
) -> None:
    """``rows = dropout * (rows + bias of the row's expert)``, in place; ``rows`` is ``(M, H)``, ``bias`` ``(E, H)``."""
    value = rows.to(accumulate_dtype(rows.dtype))
    if bias is not None:
        value = value + bias[row_experts(expert_offsets, rows.shape[0])]
    if seed is not None and dropout:
        mask = dropout_scale(seed, assignments.clamp(min=0), rows.shape[1], EXPERT_DROPOUT, dropout, value.dtype)
        value = value * mask
    rows.copy_(value)


def row_experts(expert_offsets: Tensor, num_rows: int) -> Tensor:
    """Expert of each row, ``(M,)`` int64; the last one behind the rows in use."""
    row = torch.arange(num_rows, device=expert_offsets.device, dtype=torch.int32)
    found = torch.searchsorted(expert_offsets[1:].contiguous(), row, right=True)
    return found.clamp(max=expert_offsets.shape[0] - 2)
