"""One rank of ``level_ranks.py``: the layer on a gloo group, as its experts stand and with copies of the hottest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dmoe import MoE
from parts import ep_movement
from parts.ep_bytes import draw_choices
from parts.harness import relative_error, stopwatch

CONTESTANTS: dict[str, dict[str, Any]] = {"as they stand": {}, "level": {"balance_ranks": "replicate"}}


class Case(ep_movement.Case):
    """One size; ``zipf`` 0 sends all tokens to one expert."""

    @property
    def routing(self) -> str:
        """Zipf, or one expert."""
        return f"Zipf {self.zipf:g}" if self.zipf else "one expert"

    @property
    def label(self) -> str:
        """All of it, for ``--cases``."""
        sizes = f"W={self.ranks} T={self.tokens} H={self.hidden} F={self.ffn} E={self.experts} K={self.top_k}"
        return f"{sizes} {self.routing}"

    def choices(self, tokens: int, seed: int) -> Tensor:
        """Of one rank's tokens, ``(T, K)``; the r-th popular expert is expert r."""
        if not self.zipf:
            return torch.arange(self.top_k).expand(tokens, -1)
        popular = torch.randperm(self.experts, generator=torch.Generator().manual_seed(0)).argsort()
        drawn = draw_choices(tokens, self.experts, self.top_k, zipf=self.zipf, seed=seed)
        return popular[drawn]


class Rank:
    """One rank: builds cases, checks and times their steps. Called by all ranks at once.

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

    def build(self, case: Case, tokens: int, dtype: torch.dtype, min_rows: int | None) -> None:
        """Layers of the same values, and this rank's tokens."""
        self.case = case
        self.layers = {}
        for name, options in CONTESTANTS.items():
            torch.manual_seed(7)
            self.layers[name] = MoE(
                hidden_size=case.hidden,
                ffn_hidden_size=case.ffn,
                num_experts=case.experts,
                top_k=case.top_k,
                load_balancing_coefficient=0.0,
                min_rows_per_copy=min_rows,
                ep_group=self.group,
                dtype=dtype,
                **options,
            )
        generator = torch.Generator().manual_seed(1000 + self.rank)
        self.x = torch.randn(tokens, case.hidden, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        self.grad = torch.randn(tokens, case.hidden, generator=generator, dtype=torch.float64).to(dtype)
        self.ids = case.choices(tokens, self.rank)

    def forward(self, name: str) -> Tensor:
        """A contestant's output."""
        y = self.layers[name](self.x, expert_indices=self.ids)
        assert isinstance(y, Tensor)
        return y

    def errors(self) -> dict[str, float]:
        """How far output and gradients with copies are from those without, as relative norms."""
        mine, theirs = (self._results(name) for name in ("level", "as they stand"))
        return {key: relative_error(mine[key], theirs[key]) for key in mine}

    def _results(self, name: str) -> dict[str, Tensor]:
        y = self.forward(name)
        y.backward(self.grad)
        assert self.x.grad is not None
        grads = {key: p.grad for key, p in self.layers[name].named_parameters()}
        local = {key: getattr(grad, "to_local", lambda grad=grad: grad)() for key, grad in grads.items()}
        found = {"y": y.detach(), "x": self.x.grad, **local}
        self._forget()
        return found

    def traffic(self, name: str) -> dict[str, Any]:
        """Rows of all ranks, copies that this one hosts, and bytes to others: on the wire, and as metrics say."""
        with ep_movement.WireBytes(self.group) as wire:
            y = self.forward(name)
            forward = wire.sent
            y.backward(self.grad)
        self._forget()
        metrics = self.layers[name].last_metrics
        assert metrics is not None
        each = self.case.experts // self.world
        own = metrics.tokens_per_expert.view(self.world, each).sum(1)
        return {
            "forward": forward,
            "backward": wire.sent - forward,
            "metrics": metrics.bytes_sent,
            "own_rows": own.tolist(),
            "rows": None if metrics.rank_rows is None else metrics.rank_rows.tolist(),
            "copies": metrics.copies_hosted,
        }

    def time(self, name: str) -> tuple[float, float]:
        """Seconds of forward, and of forward and backward; ranks start together and wait for the slowest."""
        results: list[Tensor] = []

        def forward() -> None:
            results.append(self.forward(name))
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
        self.x.grad = None
        for layer in self.layers.values():
            layer.zero_grad(set_to_none=True)
