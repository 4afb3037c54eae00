"""``routing_plan``: from expert indices to the place of every assignment, in one counting sort.

Rows are the assignments sorted by expert. The sort is stable in *visiting order*: token by token and choice by choice
(token-major), or all first choices, then all second choices (choice-major); ``token_order`` permutes the tokens first.
With a capacity an expert keeps its first ``capacity`` visitors, so the visiting order is the drop order.

Every length is a bound known from shapes alone (see :func:`row_bound`), so nothing waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmoe.ops._checks import check_integer, known
from dmoe.ops._library import define
from dmoe.ops.tile_table import tile_bound, tile_table_ref
from dmoe.sizes import smaller

INT32_MAX = 2**31 - 1
_Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def row_bound(
    num_assignments: int, num_experts: int, *, block_size: int = 1, capacity: int | None = None, binned: bool = False
) -> int:
    """Rows that a plan reserves: the most that any routing can use, from shapes alone.

    Args:
        num_assignments: T * K; may be symbolic while tracing.
        num_experts: E.
        block_size: rows of an expert are rounded up to a multiple of it.
        capacity: the most rows one expert takes; None is dropless.
        binned: every expert owns exactly ``capacity`` rows.

    Returns:
        packed ``T*K``, or ``min(T*K, E*capacity)``; binned ``E*capacity``; padded: with R the packed bound,
        ``R + min(E, R) * (block_size - 1)`` rounded down to whole blocks (only an expert with a row pads).
    """
    if binned:
        if capacity is None:
            raise ValueError("row_bound: binned: expected a capacity, got None")
        return num_experts * capacity
    rows = num_assignments if capacity is None else smaller(num_assignments, num_experts * capacity)
    if block_size == 1:
        return rows
    return (rows + smaller(num_experts, rows) * (block_size - 1)) // block_size * block_size


def routing_plan_ref(
    expert_indices: Tensor,
    num_experts: int,
    block_size: int,
    capacity: int | None,
    choice_major: bool,
    token_order: Tensor | None,
    binned: bool,
    tile_rows: int,
) -> _Results:
    """What :func:`routing_plan` computes, in plain PyTorch: a stable argsort and some index arithmetic."""
    T, K = expert_indices.shape
    E = num_experts
    device = expert_indices.device
    if device.type == "cpu":
        _check_values(expert_indices, num_experts, token_order)
    bound = row_bound(T * K, E, block_size=block_size, capacity=capacity, binned=binned)

    order = torch.arange(T, device=device) if token_order is None else token_order.long()
    visits = order[:, None] * K + torch.arange(K, device=device)  # (T, K): flat index of each visited assignment
    visits = (visits.T if choice_major else visits).reshape(-1)
    experts = expert_indices.reshape(-1).long()[visits]
    experts = torch.where((experts < 0) | (experts > E), E, experts)

    sorted_experts, by_expert = torch.sort(experts, stable=True)
    first = torch.searchsorted(sorted_experts, torch.arange(E + 1, device=device))
    rank = torch.arange(T * K, device=device) - first[sorted_experts]
    tokens_per_expert = first.diff()
    kept = tokens_per_expert if capacity is None else tokens_per_expert.clamp(max=capacity)
    if binned and capacity is not None:
        offsets = torch.arange(E + 1, device=device) * capacity
    else:
        padded = (kept + block_size - 1) // block_size * block_size
        offsets = torch.cat([padded.new_zeros(1), padded.cumsum(0)])

    keeps = torch.cat([kept, kept.new_zeros(1)])  # id E keeps nothing
    valid = rank < keeps[sorted_experts]
    row = offsets[sorted_experts] + rank
    assignment = visits[by_expert]
    target = torch.where(valid, row, bound)  # one extra row takes what was dropped, and is cut off
    row_to_token = torch.full((bound + 1,), -1, dtype=torch.int32, device=device)
    row_to_slot = torch.full((bound + 1,), -1, dtype=torch.int32, device=device)
    row_to_token[target] = (assignment // K).int()
    row_to_slot[target] = (assignment % K).int()
    token_rows = torch.full((T * K,), -1, dtype=torch.int32, device=device)
    token_rows[assignment] = torch.where(valid, row, -1).int()
    offsets = offsets.int()
    tiles = tile_table_ref(offsets, bound, tile_rows) if tile_rows else (offsets.new_empty(0, 2), offsets.new_empty(0))
    rows = row_to_token[:bound].clone(), row_to_slot[:bound].clone()
    return *rows, offsets, token_rows, tokens_per_expert.int(), *tiles


def _check_values(expert_indices: Tensor, num_experts: int, token_order: Tensor | None) -> None:
    """What the compiled CPU operation refuses, in the same words."""
    bad = (expert_indices < 0) | (expert_indices > num_experts)
    if bad.any():
        token, choice = bad.nonzero()[0].tolist()
        raise RuntimeError(
            f"dmoe::routing_plan: expert_indices[{token}, {choice}]: expected an id in [0, {num_experts}] "
            f"({num_experts} means dropped), got {int(expert_indices[token, choice])}"
        )
    if token_order is not None:
        T = expert_indices.shape[0]
        if not torch.equal(token_order.long().sort().values, torch.arange(T)):
            raise RuntimeError(f"dmoe::routing_plan: token_order: expected a permutation of range({T})")


def _fake(
    expert_indices: Tensor,
    num_experts: int,
    block_size: int,
    capacity: int | None,
    choice_major: bool,
    token_order: Tensor | None,
    binned: bool,
    tile_rows: int,
) -> _Results:
    assignments = expert_indices.shape[0] * expert_indices.shape[1]
    bound = row_bound(assignments, num_experts, block_size=block_size, capacity=capacity, binned=binned)
    num_tiles = tile_bound(bound, num_experts, tile_rows) if tile_rows else 0
    by_load = num_experts if tile_rows else 0
    shapes = ((bound,), (bound,), (num_experts + 1,), (assignments,), (num_experts,), (num_tiles, 2), (by_load,))
    a, b, c, d, e, f, g = (expert_indices.new_empty(shape, dtype=torch.int32) for shape in shapes)
    return a, b, c, d, e, f, g


_routing_plan = define(
    "routing_plan(Tensor expert_indices, int num_experts, int block_size, SymInt? capacity, bool choice_major, "
    "Tensor? token_order, bool binned, int tile_rows) -> (Tensor row_to_token, Tensor row_to_slot, "
    "Tensor expert_offsets, Tensor token_rows, Tensor tokens_per_expert, Tensor tiles, Tensor experts_by_load)",
    routing_plan_ref,
    fake=_fake,
)


def routing_plan(
    expert_indices: Tensor,
    num_experts: int,
    *,
    block_size: int = 1,
    capacity: int | None = None,
    choice_major: bool = False,
    token_order: Tensor | None = None,
    binned: bool = False,
    tile_rows: int = 0,
) -> _Results:
    """Sort assignments by expert: which token each row holds, and where each assignment went.

    Args:
        expert_indices: ``(T, K)`` int32 or int64, values in [0, E]; E means "dropped" and costs no row.
        num_experts: E, at least 1.
        block_size: each expert's rows are rounded up to a multiple of it; an expert without rows takes none.
        capacity: the most rows one expert keeps; later visitors are dropped. None is dropless; 0 drops everything.
        choice_major: visit all first choices, then all second choices (fairseq, GShard); otherwise token by token
            (MegaBlocks).
        token_order: ``(T,)`` int32 or int64, a permutation of range(T): the order in which tokens are visited
            (V-MoE's batch-prioritised drop sorts them by gate). None is 0, 1, 2, ...
        binned: expert e owns rows ``e*capacity .. (e+1)*capacity``; needs a capacity and ``block_size`` 1.
        tile_rows: also cut the rows, padding included, into tiles of so many, as :func:`dmoe.ops.tile_table.tile_table`
            does; 0 does not.

    Returns:
        seven int32 tensors on the device of ``expert_indices``; -1 means "nothing here":

        - row_to_token ``(R,)``, R = :func:`row_bound`: the token of each row; -1 in padding and in the unused tail.
        - row_to_slot ``(R,)``: which of its token's K choices the row is; -1 likewise.
        - expert_offsets ``(E+1,)``: the first row of each expert; the last is the number of rows in use.
        - token_rows ``(T*K,)``: the row of each assignment, token by token, choice by choice; -1 where dropped.
        - tokens_per_expert ``(E,)``: assignments of each expert before any drop.
        - tiles ``(M, 2)``, M = ``tile_bound(R, E, tile_rows)``: expert and first row of each tile, experts with most
          rows first, equal ones by id; -1 behind the last. ``(0, 2)`` when not asked for.
        - experts_by_load ``(E,)``: the experts in that order. ``(0,)`` when not asked for.

    Raises:
        TypeError: ``expert_indices`` or ``token_order`` is not int32 or int64.
        ValueError: a shape or an option does not fit, or there would be 2**31 or more rows or assignments.
        RuntimeError: on the CPU, an id outside [0, E], or a ``token_order`` that is no permutation. On CUDA the
            host reads no values: such an id counts as dropped, such an order gives an unspecified plan with rows and
            tokens in range.
    """
    name = "routing_plan"
    check_integer(name, expert_indices=expert_indices)
    if expert_indices.dim() != 2 or expert_indices.shape[1] < 1:
        raise ValueError(
            f"{name}: expert_indices: expected shape (T, K) with K >= 1, got {tuple(expert_indices.shape)}"
        )
    if num_experts < 1:
        raise ValueError(f"{name}: num_experts: expected at least 1, got {num_experts}")
    if block_size < 1:
        raise ValueError(f"{name}: block_size: expected at least 1, got {block_size}")
    if tile_rows < 0:
        raise ValueError(f"{name}: tile_rows: expected at least 0, got {tile_rows}")
    if capacity is not None and (isinstance(capacity, float) or known(capacity < 0)):
        raise ValueError(f"{name}: capacity: expected an integer of at least 0 or None, got {capacity}")
    if binned and (capacity is None or block_size != 1):
        raise ValueError(
            f"{name}: binned: expected a capacity and block_size 1, got capacity {capacity}, block_size {block_size}"
        )
    T, K = expert_indices.shape
    if token_order is not None:
        check_integer(name, token_order=token_order)
        if tuple(token_order.shape) != (T,):
            raise ValueError(f"{name}: token_order: expected shape ({T},), got {tuple(token_order.shape)}")
        if token_order.device != expert_indices.device:
            raise ValueError(
                f"{name}: token_order: expected device {expert_indices.device} of expert_indices, "
                f"got {token_order.device}"
            )
    bound = row_bound(T * K, num_experts, block_size=block_size, capacity=capacity, binned=binned)
    if known(bound > INT32_MAX) or known(T * K > INT32_MAX):
        raise ValueError(
            f"{name}: expected fewer than 2**31 rows and assignments (they are counted in int32), "
            f"got {bound} rows for {T * K} assignments"
        )
    return _routing_plan(
        expert_indices, num_experts, block_size, capacity, choice_major, token_order, binned, tile_rows
    )
