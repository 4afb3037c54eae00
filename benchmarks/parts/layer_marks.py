"""What the layer is measured by beside its rivals: a dense FFN of equal FLOPs, and the experts' bare products."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from .layer_case import Case, route
from .layers import Contestant, ModuleContestant


class Dense(ModuleContestant):
    """A dense SiLU-gated FFN of width K * F: the same FLOPs for every token, no router, another function."""

    compared = ()

    def __init__(self, case: Case, weights: dict[str, Tensor]) -> None:
        width, dtype = case.top_k * case.ffn, case.torch_dtype
        self.up = nn.Linear(case.hidden, 2 * width, bias=False, dtype=dtype)
        self.down = nn.Linear(width, case.hidden, bias=False, dtype=dtype)
        super().__init__(case, nn.ModuleList([self.up, self.down]))

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.up(x).chunk(2, -1)
        return self.down(silu(gate) * up)

    def weight_grads(self) -> dict[str, Tensor]:
        return {}


class Floor(Contestant):
    """The experts' matrix products and nothing else: ``torch.mm`` of each expert's rows into outputs that exist."""

    # Two products an expert in forward, up and down; in training four more: the gradients of hidden, of the rows and of
    # both weights. No router, no gather, no activation, no sum over a token's rows, no allocation.
    compared = ("y", "gate_up", "down")

    def __init__(self, case: Case, weights: dict[str, Tensor]) -> None:
        self.case, self.weights = case, weights
        dtype, rows = case.torch_dtype, case.rows
        self.pre = torch.zeros(rows, 2 * case.ffn, dtype=dtype)
        self.out = torch.zeros(rows, case.hidden, dtype=dtype)
        if case.training:
            self.grad_hidden = torch.zeros(rows, case.ffn, dtype=dtype)
            self.grad_rows = torch.zeros(rows, case.hidden, dtype=dtype)
            self.grad_gate_up = torch.zeros_like(weights["gate_up"])
            self.grad_down = torch.zeros_like(weights["down"])

    def prepare(self, x: Tensor, grad: Tensor) -> Callable[[], None]:
        """Lay out the rows and slices of this routing, with the true operands: so the results can be checked."""
        case = self.case
        gates, indices = route(x, self.weights["router"], case.top_k)
        order = torch.argsort(indices.flatten(), stable=True)
        bounds = [0, *torch.bincount(indices.flatten(), minlength=case.experts).cumsum(0).tolist()]
        # An expert without rows still has gradients to clear in training; in inference it has nothing to do.
        spans = [(e, slice(a, b)) for e, (a, b) in enumerate(itertools.pairwise(bounds)) if a < b or case.training]
        self.token, self.gate_of_row = order // case.top_k, gates.flatten()[order, None]
        rows = x[self.token]
        pre = torch.cat([rows[s] @ self.weights["gate_up"][e].t() for e, s in spans]).float()
        gate, up = pre.chunk(2, -1)
        hidden = (silu(gate) * up).to(x.dtype)
        calls = []
        for e, s in spans:
            calls.append((rows[s], self.weights["gate_up"][e].t(), self.pre[s]))
            calls.append((hidden[s], self.weights["down"][e].t(), self.out[s]))
        if case.training:  # forward of all experts first, then backward, as a step has it
            calls += self._backward(spans, rows, grad[self.token], gate, up)
        flops = sum(2 * a.shape[0] * a.shape[1] * b.shape[1] for a, b, _ in calls)
        if flops != case.flops:
            raise RuntimeError(f"floor: expected {case.flops} FLOPs, got {flops}")

        def run() -> None:
            mm = torch.mm
            for a, b, out in calls:
                mm(a, b, out=out)

        return run

    def _backward(
        self, spans: list[tuple[int, slice]], rows: Tensor, grad_out: Tensor, gate: Tensor, up: Tensor
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        weights, dtype = self.weights, rows.dtype
        grad_hidden = torch.cat([grad_out[s] @ weights["down"][e] for e, s in spans]).float() * self.gate_of_row
        sigmoid = gate.sigmoid()
        slope = sigmoid * (1 + gate * (1 - sigmoid))
        weighted_hidden = (gate * sigmoid * up * self.gate_of_row).to(dtype)
        grad_pre = torch.cat([grad_hidden * up * slope, grad_hidden * gate * sigmoid], -1).to(dtype)
        calls = []
        for e, s in spans:
            calls += [
                (grad_out[s], weights["down"][e], self.grad_hidden[s]),
                (grad_pre[s], weights["gate_up"][e], self.grad_rows[s]),
                (grad_pre[s].t(), rows[s], self.grad_gate_up[e]),
                (grad_out[s].t(), weighted_hidden[s], self.grad_down[e]),
            ]
        return calls

    def results(self) -> dict[str, Tensor]:
        """With the sum over a token's rows that is no part of the floor."""
        y = torch.zeros(self.case.tokens, self.case.hidden).index_add_(0, self.token, self.out * self.gate_of_row)
        return {"y": y, **({"gate_up": self.grad_gate_up, "down": self.grad_down} if self.case.training else {})}
