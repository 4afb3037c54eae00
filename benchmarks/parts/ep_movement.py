"""The contestants of ``dispatch.py``, on one rank of a gloo group: dmoe's dispatcher and the naive all-to-all.

The naive one is MegaBlocks' way, written here in plain PyTorch: one row for each choice of each token, sorted by
expert; ranks tell each other the rows of each expert; ``all_to_all_single`` of T * K rows; and the results come back
the same way, to be weighted and summed where the token lives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from dmoe import ExpertWeights, plan_token_choice, run_experts
from dmoe.ops.permute import permute, unpermute
from dmoe.parallel import AllToAllDispatcher, Dispatched, collectives, statistics
from parts.ep_bytes import draw_choices
from parts.harness import relative_error, stopwatch

# name: (which all-to-all, options of dmoe's dispatcher)
CONTESTANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "dmoe": ("dmoe", {}),
    "naive": ("naive", {}),
    "naive, dmoe's gathers": ("naive, dmoe's gathers", {}),
    "dmoe fp8": ("dmoe", {"wire_dtype": "fp8"}),
}


@dataclass(frozen=True)
class Case:
    """One size: T tokens on each of W ranks, E experts of width F in all (0: an expert only scales its rows)."""

    ranks: int
    tokens: int
    hidden: int
    ffn: int
    experts: int
    top_k: int
    zipf: float

    @property
    def routing(self) -> str:
        """Uniform or Zipf."""
        return f"zipf {self.zipf:g}" if self.zipf else "uniform"

    @property
    def shape(self) -> str:
        """The size without the experts' width."""
        return f"W={self.ranks} T={self.tokens} H={self.hidden} E={self.experts} K={self.top_k} {self.routing}"

    @property
    def label(self) -> str:
        """All of it, for ``--cases``."""
        return f"{self.shape} {f'F={self.ffn}' if self.ffn else 'movement'}"


class WireBytes:
    """Counts, while it is entered, the bytes that all-to-alls and gathers really take to other ranks."""

    def __init__(self, group: Any) -> None:
        self.group, self.sent = group, 0

    def __enter__(self) -> WireBytes:
        real, me = dist.all_to_all_single, dist.get_rank(self.group)

        def counting(output: Tensor, input: Tensor, out: Any = None, into: Any = None, **options: Any) -> Any:
            assert options["group"] is self.group
            ranks = dist.get_world_size(self.group)
            splits = into if into is not None else [input.shape[0] // ranks] * ranks
            width = input[:1].nbytes if input.shape[0] else 0
            self.sent += width * (sum(splits) - splits[me])
            return real(output, input, out, into, **options)

        gather, others = collectives.all_gather, dist.get_world_size(self.group) - 1

        def counting_gather(received: Tensor, tensor: Tensor, what: str, group: Any) -> None:
            assert group is self.group
            self.sent += tensor.nbytes * others
            gather(received, tensor, what, group)

        self._patches: list[Any] = [
            patch.object(dist, "all_to_all_single", counting),
            patch.object(statistics, "all_gather", counting_gather),
        ]
        for each in self._patches:
            each.start()
        return self

    def __exit__(self, *error: object) -> None:
        for each in self._patches:
            each.stop()


# ------------------------------------------------------------------------------------------------------- naive


class _AllToAll(torch.autograd.Function):
    """Rows to ranks; the gradient is the same the other way round."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, received: list[int], sent: list[int], group: Any) -> Tensor:
        ctx.back = sent, received, group
        rows = x.new_empty(sum(received), x.shape[1])
        dist.all_to_all_single(rows, x, received, sent, group=group)
        return rows

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        received, sent, group = ctx.back
        rows = grad.new_empty(sum(received), grad.shape[1])
        dist.all_to_all_single(rows, grad.contiguous(), received, sent, group=group)
        return rows, None, None, None


def naive_all_to_all(
    x: Tensor,
    ids: Tensor,
    gates: Tensor,
    num_experts: int,
    experts: Callable[[Tensor, Tensor], Tensor],
    group: Any,
    *,
    kernels: bool = False,
) -> Tensor:
    """Tokens to their experts and back, a row for each choice, ``(T, H)``.

    Args:
        x: ``(T, H)``.
        ids: ``(T, K)`` int64 in [0, E]; E takes no expert.
        gates: ``(T, K)`` in x's dtype.
        num_experts: E.
        experts: rows ``(R, H)`` and the local expert of each ``(R,)`` to results ``(R, H)``.
        group: the ranks.
        kernels: gather and sum with dmoe's operations, so that what is left to compare are the rows on the wire.
    """
    ranks, top_k = dist.get_world_size(group), ids.shape[1]
    flat = ids.flatten()
    counts = torch.bincount(flat, minlength=num_experts + 1)[:num_experts]
    told = torch.empty_like(counts)
    telling = dist.all_to_all_single(told, counts, group=group, async_op=True)
    if kernels:  # while the counts travel, as MegaBlocks does
        plan = plan_token_choice(ids, num_experts)
        rows = permute(x, plan.row_to_token, plan.token_offsets, plan.token_rows)
    else:
        order = flat.argsort(stable=True)
        token = order // top_k
        rows = x[token]
    telling.wait()
    sent, received = (n.view(ranks, -1).sum(1).tolist() for n in (counts, told))
    if sum(sent) < flat.numel():  # choices of no expert were sorted to the end
        rows = rows[: sum(sent)]
    each = num_experts // ranks
    expert = torch.arange(each).repeat(ranks).repeat_interleave(told)
    arrived = _AllToAll.apply(rows, received, sent, group)
    back = _AllToAll.apply(experts(arrived, expert), sent, received, group)
    if kernels:
        used = sum(sent)
        where = plan.row_to_token[:used], plan.row_to_slot[:used], plan.token_offsets, plan.token_rows
        return unpermute(back, gates, *where)
    used = sum(sent)
    weighted = back * gates.flatten()[order[:used]].unsqueeze(1)
    return torch.zeros_like(x).index_add(0, token[:used], weighted)


# -------------------------------------------------------------------------------------------------------- ranks


class Rank:
    """One rank: builds cases, checks contestants against each other, times their steps. Called by all ranks at once.

    Args:
        rank: of this process.
        world: ranks.
        folder: where the ranks find each other.
    """

    def __init__(self, rank: int, world: int, folder: str) -> None:
        method = (Path(folder) / "store").as_uri()
        dist.init_process_group("gloo", init_method=method, rank=rank, world_size=world)
        self.rank, self.world = rank, world
        self.group: Any = dist.group.WORLD

    def build(self, case: Case, tokens: int, dtype: torch.dtype, seed: int) -> None:
        """Data of one case; weights and experts are the same on all ranks but for the part that a rank owns."""
        self.case = case
        self.ids = draw_choices(
            tokens, case.experts, case.top_k, zipf=case.zipf, seed=seed * self.world + self.rank, popularity_seed=seed
        )
        random = torch.Generator().manual_seed(1000 * seed + self.rank)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=random, dtype=torch.float64)

        self.x = randn(tokens, case.hidden).to(dtype).requires_grad_()
        self.gates = randn(tokens, case.top_k).softmax(1).to(dtype).requires_grad_()
        self.grad = randn(tokens, case.hidden).to(dtype)
        each = case.experts // self.world
        if case.ffn:
            up = randn(each, 2, case.ffn, case.hidden) / case.hidden**0.5
            down = randn(each, case.hidden, case.ffn) / case.ffn**0.5
            self.weights = [up.to(dtype).requires_grad_(), down.to(dtype).requires_grad_()]
        else:
            self.weights = [(1 + randn(each).abs()).to(dtype).requires_grad_()]

    def forward(self, name: str) -> tuple[Tensor, Dispatched | None]:
        """A contestant's output, and what dmoe knows about its dispatch."""
        kind, options = CONTESTANTS[name]
        experts = self.case.experts
        if kind != "dmoe":
            kernels = kind != "naive"
            y = naive_all_to_all(
                self.x, self.ids, self.gates, experts, self._naive_experts, self.group, kernels=kernels
            )
            return y, None
        dispatcher = AllToAllDispatcher(self.group, experts, **options)
        arrived = dispatcher.dispatch(self.x, self.ids, self.gates)
        if self.case.ffn:
            y = run_experts(arrived.x, arrived.plan, arrived.gate_weights, ExpertWeights(*self.weights))
        else:  # no expansion in either contestant: a row times what its experts make of it
            plan, (scale,) = arrived.plan, self.weights
            row, slot = plan.row_to_token.long(), plan.row_to_slot.long()
            factor = arrived.gate_weights[row, slot] * scale.repeat_interleave(plan.tokens_per_expert.long())
            y = arrived.x * factor.new_zeros(len(arrived.x)).index_add(0, row, factor).unsqueeze(1)
        return dispatcher.combine(y, arrived), arrived

    def _naive_experts(self, rows: Tensor, expert: Tensor) -> Tensor:
        if not self.case.ffn:
            return rows * self.weights[0][expert].unsqueeze(1)
        plan = plan_token_choice(expert.unsqueeze(1), self.case.experts // self.world)
        return run_experts(rows, plan, rows.new_ones(len(rows), 1), ExpertWeights(*self.weights))

    def errors(self, name: str, against: str) -> dict[str, float]:
        """How far a contestant's output and gradients are from another's, as relative norms."""
        mine, theirs = self._results(name), self._results(against)
        return {key: relative_error(mine[key], theirs[key]) for key in mine}

    def _results(self, name: str) -> dict[str, Tensor]:
        leaves = [self.x, self.gates, *self.weights]
        y, _ = self.forward(name)
        names = ("x.grad", "gates.grad", *(f"weight {n}.grad" for n in range(len(self.weights))))
        return {"y": y.detach(), **dict(zip(names, torch.autograd.grad(y, leaves, self.grad), strict=True))}

    def traffic(self, name: str) -> dict[str, int]:
        """Bytes to other ranks, on the wire and as the dispatcher counts them; rows with those that stay."""
        with WireBytes(self.group) as wire:
            y, arrived = self.forward(name)
            forward = wire.sent
            y.backward(self.grad)
        self._forget()
        found = {"forward": forward, "backward": wire.sent - forward, "tokens": len(self.x)}
        if arrived is not None and arrived.traffic is not None:
            known = arrived.traffic
            found |= {
                "metrics": known.bytes_sent,
                "metrics_naive": known.naive_bytes_sent or 0,
                "rows": known.rows_sent + known.rows_kept,
                "naive_rows": (known.naive_rows_sent or 0) + (known.naive_rows_kept or 0),
            }
        return found

    def choices(self) -> Tensor:
        """This rank's routing."""
        return self.ids

    def time(self, name: str) -> tuple[float, float]:
        """Seconds of forward, and of forward and backward; ranks start together and wait for the slowest."""
        results: list[Tensor] = []

        def forward() -> None:
            results.append(self.forward(name)[0])
            dist.barrier(self.group)

        def backward() -> None:
            results.pop().backward(self.grad)
            dist.barrier(self.group)

        dist.barrier(self.group)
        there = stopwatch(forward)
        both = there + stopwatch(backward)
        self._forget()
        return there, both

    def _forget(self) -> None:
        for leaf in (self.x, self.gates, *self.weights):
            leaf.grad = None
