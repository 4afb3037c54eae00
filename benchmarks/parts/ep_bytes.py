"""Rows and bytes of an all-to-all of tokens, counted from the choices alone.

Nothing here asks dmoe: a test compares every number with what the real dispatcher puts on the wire, so a change of its
wire format that is not written down in :class:`Wire` turns that test red.

A matrix ``rows`` is ``(W, W)``: ``rows[i, j]`` rows go from rank i to rank j. The diagonal stays at home.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

COUNTED = 6  # int64 numbers that dmoe's ranks tell each other before the rows: rows, choices, and the rows' kind
WIDTH = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}  # bytes of a number
NARROW_SCALE = 4  # bytes of the float32 scale that travels with an fp8 or int8 row


# ------------------------------------------------------------------------------------------------------------- rows


def copies_closed_form(num_ranks: int, num_experts: int, top_k: int) -> float:
    """Ranks that hold any of a token's K distinct experts, all choices equally likely; the local rank counts.

    ``W * (1 - C(E - E/W, K) / C(E, K))``. With more ranks than experts every expert is cut into W/E pieces (along F),
    and a token goes to each: ``K * W / E``.

    Raises:
        ValueError: as :func:`experts_per_rank`, or K that is not in [1, E].
    """
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k: expected 1 to E = {num_experts}, got {top_k}")
    each, pieces = experts_per_rank(num_experts, num_ranks)
    owners = num_ranks // pieces
    return pieces * owners * (1 - math.comb(num_experts - each, top_k) / math.comb(num_experts, top_k))


def experts_per_rank(num_experts: int, num_ranks: int) -> tuple[int, int]:
    """Experts on a rank, and the ranks that share one expert; at least one of the two is 1.

    Raises:
        ValueError: neither number is a multiple of the other.
    """
    if num_experts < 1 or num_ranks < 1 or (num_experts % num_ranks and num_ranks % num_experts):
        raise ValueError(
            f"experts and ranks: expected one to be a multiple of the other, got E = {num_experts} experts for "
            f"W = {num_ranks} ranks"
        )
    return max(num_experts // num_ranks, 1), max(num_ranks // num_experts, 1)


def rows_to_ranks(choices: Tensor, num_experts: int, num_ranks: int) -> Tensor:
    """Rows that one rank's tokens send to every rank when each token travels once per rank, ``(W,)`` int64.

    Args:
        choices: ``(T, K)`` integers in [0, E]; E takes no expert, and an expert chosen twice counts once.
        num_experts: E.
        num_ranks: W.

    Raises:
        TypeError, ValueError: choices that are no such thing.
    """
    each, pieces = experts_per_rank(num_experts, num_ranks)
    owners = num_ranks // pieces
    check_choices(choices, num_experts)
    goes = torch.zeros(choices.shape[0], owners + 1, dtype=torch.bool)
    goes.scatter_(1, choices.long() // each, True)  # E // each is the column beyond the last owner
    return goes[:, :owners].sum(0).repeat_interleave(pieces)


def naive_rows_to_ranks(choices: Tensor, num_experts: int, num_ranks: int) -> Tensor:
    """The same with a row for each choice of each token, ``(W,)`` int64."""
    each, pieces = experts_per_rank(num_experts, num_ranks)
    check_choices(choices, num_experts)
    per_expert = torch.bincount(choices.flatten().long(), minlength=num_experts + 1)[:num_experts]
    return per_expert.view(-1, each).sum(1).repeat_interleave(pieces)


def check_choices(choices: Tensor, num_experts: int) -> None:
    """Refuse what is not ``(T, K)`` integers in [0, E].

    Raises:
        TypeError: not integers.
        ValueError: another shape, or a number beyond.
    """
    if choices.is_floating_point() or choices.is_complex() or choices.dtype == torch.bool:
        raise TypeError(f"expert_indices: expected integers, got {choices.dtype}")
    if choices.dim() != 2 or choices.shape[1] == 0:
        raise ValueError(f"expert_indices: expected shape (T, K) with K >= 1, got {tuple(choices.shape)}")
    if choices.numel() and not 0 <= int(choices.min()) <= int(choices.max()) <= num_experts:
        raise ValueError(
            f"expert_indices: expected numbers in [0, {num_experts}] (E = {num_experts} takes no expert), got "
            f"{int(choices.min())} to {int(choices.max())}"
        )


def counted_rows(choices_by_rank: Sequence[Tensor], num_experts: int, *, naive: bool = False) -> Tensor:
    """The matrix of rows that these choices cause, exactly, ``(W, W)`` int64.

    Args:
        choices_by_rank: ``(T_i, K)`` of every rank; T may differ, and be 0.
        num_experts: E.
        naive: a row for each choice, not for each rank.
    """
    count = naive_rows_to_ranks if naive else rows_to_ranks
    return torch.stack([count(choices, num_experts, len(choices_by_rank)) for choices in choices_by_rank])


# ------------------------------------------------------------------------------------------------------------ bytes


@dataclass(frozen=True)
class Wire:
    """Bytes of what crosses the wire.

    Attributes:
        row: of one token's row on its way to the experts.
        choices: of the gate weights and expert numbers beside it.
        result: of one row on its way back; and of a gradient's row, either way.
        counts: told to each other rank before anything else.
    """

    row: int
    choices: int
    result: int
    counts: int

    @staticmethod
    def deduplicated(hidden: int, top_k: int, dtype: str, *, narrow: bool = False) -> Wire:
        """dmoe's: a row for each (token, rank), with K weights and K expert numbers in the dtype that sums are in."""
        summed = 8 if dtype == "fp64" else 4
        return Wire(_row(hidden, dtype, narrow), 2 * top_k * summed, hidden * WIDTH[dtype], COUNTED * 8)

    @staticmethod
    def naive(hidden: int, experts_per_rank: int, dtype: str, *, narrow: bool = False) -> Wire:
        """A row for each choice, sorted by expert, so that the rows of each expert (int64) are all it has to tell."""
        return Wire(_row(hidden, dtype, narrow), 0, hidden * WIDTH[dtype], 8 * experts_per_rank)

    def forward(self, rows: Tensor) -> Tensor:
        """Bytes that each rank sends to others in forward, ``(W,)``: rows and choices there, results back, counts."""
        there, back = _to_others(rows)
        return there * (self.row + self.choices) + back * self.result + (len(rows) - 1) * self.counts

    def backward(self, rows: Tensor) -> Tensor:
        """The same in backward: gradients of results there, those of rows and of choices back.

        Gate weights need a gradient, and rows' gradients travel in the dtype of results.
        """
        there, back = _to_others(rows)
        return there * self.result + back * (self.result + self.choices)


def _row(hidden: int, dtype: str, narrow: bool) -> int:
    return hidden + NARROW_SCALE if narrow else hidden * WIDTH[dtype]


def _to_others(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows that each rank sends to others, and that it gets from them (whose results it sends back)."""
    kept = rows.diagonal()
    return rows.sum(1) - kept, rows.sum(0) - kept


# --------------------------------------------------------------------------------------------------------- routings


def draw_choices(
    tokens: int, num_experts: int, top_k: int, *, zipf: float, seed: int, popularity_seed: int = 0
) -> Tensor:
    """K distinct experts for each token, drawn without replacement, ``(T, K)`` int64.

    The r-th most popular expert has probability proportional to ``r ** -zipf``; which expert that is, is a permutation
    of ``popularity_seed``, so that popular experts do not all live on rank 0. Zipf 0 is uniform.
    """
    popular = torch.randperm(num_experts, generator=torch.Generator().manual_seed(popularity_seed))
    weights = torch.empty(num_experts, dtype=torch.float64)
    weights[popular] = torch.arange(1, num_experts + 1, dtype=torch.float64) ** -zipf
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.empty(0, top_k, dtype=torch.int64)]
    for start in range(0, tokens, 2048):
        # The K largest of log(weight) + Gumbel noise are a draw without replacement.
        size = min(2048, tokens - start), num_experts
        uniform = torch.rand(size, generator=generator, dtype=torch.float64)
        parts.append((weights.log() - (-uniform.log()).log()).topk(top_k).indices)
    return torch.cat(parts)


def load_choices(path: Path, num_experts: int) -> list[Tensor]:
    """Choices recorded in a run: ``torch.save`` of one ``(T, K)`` tensor, or of a list with one for each rank.

    Raises:
        TypeError, ValueError: the file holds something else; the message names it.
    """
    found = torch.load(path, map_location="cpu", weights_only=True)
    choices = [found] if isinstance(found, Tensor) else found
    if not isinstance(choices, list | tuple) or not choices or not all(isinstance(c, Tensor) for c in choices):
        raise TypeError(
            f"{path.name}: expected a tensor of expert_indices (T, K), or a list of one for each rank, got "
            f"{type(found).__name__}"
        )
    for rank, tensor in enumerate(choices):
        try:
            check_choices(tensor, num_experts)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{path.name}, rank {rank}: {error}") from None
    if len({c.shape[1] for c in choices}) > 1:
        raise ValueError(f"{path.name}: expected one K, got {sorted({c.shape[1] for c in choices})}")
    return list(choices)
