"""Times routers in a process of its own, one sample a request, so that two checkouts of dmoe can take turns.

    PYTHONPATH=CHECKOUT python benchmarks/parts/router_worker.py THREADS

A request is a line of JSON: ``name`` and ``fields`` of a config (``family`` and its ``options`` apart), ``tokens``,
``training``; the answer is the seconds of one call, averaged over enough calls for the clock, or what went wrong.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch

import dmoe

SAMPLE_SECONDS = 5e-3


class Router:
    """One router, forward and backward, on one batch."""

    def __init__(self, request: dict[str, Any]) -> None:
        fields = dict(request["fields"])
        if request["family"]:
            fields["router"] = getattr(dmoe.routing, request["family"])(**request["options"])
        torch.manual_seed(0)
        self.layer = dmoe.MoE(**fields).train(request["training"])
        tokens = request["tokens"]
        self.x = torch.randn(tokens, fields["hidden_size"], requires_grad=True)
        self.ids = torch.randint(50257, (tokens,))
        self.calls = 1
        self.sample()
        self.calls = max(1, min(200, int(SAMPLE_SECONDS / max(self.sample(), 1e-9))))

    def once(self) -> None:
        """Route, the losses, and back to x."""
        self.x.grad = None
        routing = self.layer.router(self.x, token_ids=self.ids)
        loss = self.layer.router_losses(routing)
        total = routing.gate_weights.sum() if loss is None else routing.gate_weights.sum() + loss
        if total.requires_grad:
            total.backward()

    def sample(self) -> float:
        """Seconds of one call."""
        start = time.perf_counter()
        for _ in range(self.calls):
            self.once()
        return (time.perf_counter() - start) / self.calls


def main() -> None:
    """Answer requests until there are none."""
    torch.set_num_threads(int(sys.argv[1]))
    routers: dict[str, Router] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if line not in routers:
            routers[line] = Router(request)
        print(json.dumps(routers[line].sample()), flush=True)


if __name__ == "__main__":
    main()
