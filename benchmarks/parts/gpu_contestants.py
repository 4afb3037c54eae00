"""Who takes part in ``layer_gpu.py``, on the same weights and routing; other libraries are in ``parts.gpu_peers``."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import grouped_mm, silu

import dmoe
from parts.gpu_problem import Problem, Truth


class AbsentError(Exception):
    """A contestant cannot take part; the message says why."""


class Contestant(ABC):
    """The expert half of the layer in one pair of hands: :meth:`forward` is timed, and the gradients of its result."""

    #: reads a number back from the device in each step, so it cannot be captured in a CUDA graph
    synchronises = False
    #: has a backward pass
    trains = True

    def __init__(self, problem: Problem) -> None:
        """Bring the weights into this contestant's layout. Nothing here is timed.

        Raises:
            AbsentError: it cannot run this case, or its package is not there.
        """
        self.problem = problem
        self.x = problem.x.detach().requires_grad_()
        self.prepare()

    @abstractmethod
    def prepare(self) -> None:
        """Leaves, modules and whatever does not depend on the tokens."""

    @abstractmethod
    def forward(self) -> Tensor:
        """``(T, H)``: what is timed."""

    @abstractmethod
    def leaves(self) -> Sequence[Tensor]:
        """What gradients are asked for: x, the gate weights, then the weights in this contestant's own form."""

    def named(self, grads: Sequence[Tensor]) -> dict[str, Tensor]:
        """Gradients of :meth:`leaves` as x ``(T, H)``, gates ``(T, K)``, gate_up ``(E, 2F, H)``, down ``(E, H, F)``."""
        x, gates, gate_up, down = grads
        return {"x": x, "gates": gates, "gate_up": gate_up, "down": down}

    def around(self) -> contextlib.AbstractContextManager[None]:
        """What forward and backward have to run in."""
        return contextlib.nullcontext()

    def results(self) -> dict[str, Tensor]:
        """Output and gradients of one step, by name, for the check."""
        with self.around():
            y = self.forward()
            grads = torch.autograd.grad(y, list(self.leaves()), self.problem.grad)
        return {"y": y.detach(), **self.named(grads)}

    def truth(self, given: Truth) -> Truth:
        """What :meth:`results` is compared with: the case's truth, unless this contestant computes something else."""
        return given


class _Stacked(Contestant):
    """Leaves as the problem has them; gate weights in ``gate_dtype``."""

    gate_dtype = torch.bfloat16

    def prepare(self) -> None:
        problem = self.problem
        self.gates = problem.gates.to(self.gate_dtype).requires_grad_()
        self.gate_up = problem.gate_up.detach().requires_grad_()
        self.down = problem.down.detach().requires_grad_()

    def leaves(self) -> Sequence[Tensor]:
        return self.x, self.gates, self.gate_up, self.down


class Dmoe(_Stacked):
    """``dmoe.functional.moe_mlp`` with the given routing; the plan is part of what is timed."""

    gate_dtype = torch.float32
    #: of ``moe_mlp``
    backend: str | None = None

    def prepare(self) -> None:
        super().prepare()
        E, width, H = self.down.shape[0], self.down.shape[2], self.down.shape[1]
        self.gate_up = self.gate_up.detach().view(E, 2, width, H).requires_grad_()

    def forward(self) -> Tensor:
        weights = dmoe.ExpertWeights(self.gate_up, self.down)
        return dmoe.functional.moe_mlp(self.x, self.problem.indices, self.gates, weights, backend=self.backend)

    def named(self, grads: Sequence[Tensor]) -> dict[str, Tensor]:
        named = super().named(grads)
        return {**named, "gate_up": named["gate_up"].flatten(1, 2)}


class DmoeLayer(Contestant):
    """``dmoe.MoE`` with its own router: the whole layer, without auxiliary losses."""

    def prepare(self) -> None:
        problem, shape = self.problem, self.problem.shape
        self.layer = dmoe.MoE(
            hidden_size=shape.hidden,
            ffn_hidden_size=shape.ffn,
            num_experts=shape.experts,
            top_k=shape.top_k,
            gate_normalization=1.0,
            load_balancing_coefficient=0.0,
            device="meta",
            dtype=torch.bfloat16,
        )
        parameters = {
            "gate_up_proj": problem.gate_up.view(shape.experts, 2, shape.ffn, shape.hidden),
            "down_proj": problem.down,
        }
        for name, value in parameters.items():  # shared with the problem: no second copy of the weights
            setattr(self.layer.experts, name, nn.Parameter(value.detach()))
        self.layer.router.weight = nn.Parameter(problem.router_weight())

    def forward(self) -> Tensor:
        y = self.layer(self.x)
        assert isinstance(y, Tensor)
        return y

    def leaves(self) -> Sequence[Tensor]:
        experts = self.layer.experts
        router = self.layer.get_parameter("router.weight")
        return self.x, router, experts.get_parameter("gate_up_proj"), experts.down_proj

    def named(self, grads: Sequence[Tensor]) -> dict[str, Tensor]:
        return {"x": grads[0], "router": grads[1], "gate_up": grads[2].flatten(1, 2), "down": grads[3]}

    def truth(self, given: Truth) -> Truth:
        """The truth of this router's own choices; x's gradient has a second way, through the gate weights.

        Raises:
            ValueError: the router did not choose experts of largest probability.
        """
        problem, weight = self.problem, self.layer.get_parameter("router.weight")
        router_module: Any = self.layer.router
        with torch.no_grad():
            indices = router_module(self.x).expert_indices
        x, router = problem.x.double().requires_grad_(), weight.detach().double().requires_grad_()
        probs = (x @ router.t()).softmax(-1)
        chosen = probs.gather(1, indices)
        best = probs.topk(problem.shape.top_k, dim=1).values
        # A near tie may be decided either way; the chosen probabilities are the largest, up to float32's rounding.
        if not torch.allclose(chosen.sort(1, descending=True).values, best, rtol=1e-4, atol=0):
            raise ValueError("the router did not choose the experts of largest probability")
        gates = chosen / chosen.sum(1, keepdim=True)
        truth = Truth(dataclasses.replace(problem, routing="router", gates=gates.detach(), indices=indices))
        through_gates, truth.router = torch.autograd.grad(gates, (x, router), truth.gates)
        truth.x += through_gates
        return truth


class GroupedMM(Contestant):
    """torchtitan's way on ``F.grouped_mm``: a stable argsort, three grouped products, a weighted ``scatter_add``."""

    def prepare(self) -> None:
        problem, width = self.problem, self.problem.shape.ffn
        self.gates = problem.gates.clone().requires_grad_()
        self.w1 = problem.gate_up[:, :width].contiguous().requires_grad_()
        self.w3 = problem.gate_up[:, width:].contiguous().requires_grad_()
        self.down = problem.down.detach().requires_grad_()

    def leaves(self) -> Sequence[Tensor]:
        return self.x, self.gates, self.w1, self.w3, self.down

    def named(self, grads: Sequence[Tensor]) -> dict[str, Tensor]:
        x, gates, w1, w3, down = grads
        return {"x": x, "gates": gates, "gate_up": torch.cat([w1, w3], 1), "down": down}

    def forward(self) -> Tensor:
        shape, x, ids = self.problem.shape, self.x, self.problem.indices.flatten()
        order = torch.argsort(ids, stable=True)
        # histc needs no look at the largest id, as bincount does; on the CPU it has no integers.
        counted = ids.float() if ids.device.type == "cpu" else ids
        counts = torch.histc(counted, bins=shape.experts, min=0, max=shape.experts - 1)
        ends = counts.cumsum(0, dtype=torch.int32)
        token = order // shape.top_k
        rows = x[token]
        gate = grouped_mm(rows, self.w1.transpose(1, 2), offs=ends)
        hidden = silu(gate) * grouped_mm(rows, self.w3.transpose(1, 2), offs=ends)
        out = grouped_mm(hidden, self.down.transpose(1, 2), offs=ends)
        out = (out.float() * self.gates.flatten()[order, None]).to(x.dtype)
        return torch.zeros_like(x).scatter_add(0, token[:, None].expand(-1, shape.hidden), out)


class HuggingFace(_Stacked):
    """Transformers' Qwen3-MoE experts with one of its experts implementations."""

    implementation: str

    def prepare(self) -> None:
        super().prepare()
        try:
            from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
            from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
        except ImportError as error:
            raise AbsentError(f"transformers with Qwen3MoeExperts does not import: {error}") from error
        shape = self.problem.shape
        if self.implementation == "batched_mm":
            _require_memory(self.x.device, 2 * shape.rows * shape.weight_bytes // shape.experts)
        options: dict[str, Any] = {
            "hidden_size": shape.hidden,
            "moe_intermediate_size": shape.ffn,
            "num_experts": shape.experts,
            "num_experts_per_tok": shape.top_k,
            "hidden_act": "silu",
            "experts_implementation": self.implementation,
        }
        config = Qwen3MoeConfig(**options)
        if config._experts_implementation != self.implementation:
            raise AbsentError(f"transformers took {config._experts_implementation!r} for {self.implementation!r}")
        with torch.device("meta"):
            self.experts = Qwen3MoeExperts(config)
        self.experts.gate_up_proj = nn.Parameter(self.gate_up.detach())
        self.experts.down_proj = nn.Parameter(self.down.detach())

    def leaves(self) -> Sequence[Tensor]:
        return self.x, self.gates, self.experts.gate_up_proj, self.experts.down_proj

    def forward(self) -> Tensor:
        return self.experts(self.x, self.problem.indices, self.gates)


class HuggingFaceGrouped(HuggingFace):
    """``grouped_mm``: sort, two grouped products, unsort, sum."""

    implementation = "grouped_mm"


class HuggingFaceBatched(HuggingFace):
    """``batched_mm``: a copy of its expert's weights for every row."""

    implementation = "batched_mm"


class DenseChain(Contestant):
    """The ceiling: cuBLAS products of the same FLOPs on R rows of one expert, into tensors that exist; nothing else."""

    def prepare(self) -> None:
        shape, device = self.problem.shape, self.x.device
        R, H, width = shape.rows, shape.hidden, shape.ffn

        def normal(*size: int) -> Tensor:
            return torch.randn(size, device=device, dtype=torch.bfloat16)

        def empty(*size: int) -> Tensor:
            return torch.empty(size, device=device, dtype=torch.bfloat16)

        rows, hidden, grad, pre = normal(R, H), normal(R, width), normal(R, H), normal(R, 2 * width)
        up, down = self.problem.gate_up[0], self.problem.down[0]
        self.forward_calls = [(rows, up.t(), empty(R, 2 * width)), (hidden, down.t(), empty(R, H))]
        self.backward_calls = [
            (grad, down, empty(R, width)),
            (grad.t(), hidden, empty(H, width)),
            (pre, up, self.forward_calls[1][2]),  # the same room: nobody reads the results
            (pre.t(), rows, empty(2 * width, H)),
        ]
        for calls, flops in zip((self.forward_calls, self.backward_calls), shape.flops, strict=True):
            total = sum(2 * a.shape[0] * a.shape[1] * b.shape[1] for a, b, _ in calls)
            if total != flops:
                raise RuntimeError(f"dense chain: expected {flops} FLOPs, got {total}")

    def leaves(self) -> Sequence[Tensor]:
        return ()

    def forward(self) -> Tensor:
        for a, b, out in self.forward_calls:
            torch.mm(a, b, out=out)
        return out

    def backward(self) -> None:
        """The four products of backward."""
        for a, b, out in self.backward_calls:
            torch.mm(a, b, out=out)

    def results(self) -> dict[str, Tensor]:
        """Nothing to compare: another function. One row of each product is checked here instead."""
        for calls in (self.forward_calls, self.backward_calls):
            for a, b, out in calls:
                torch.mm(a, b, out=out)
                exact = a[-1].double() @ b.double()
                error = (out[-1].double() - exact).norm() / exact.norm()
                if not error <= 1e-2:
                    raise ValueError(f"dense chain: a product is off by {float(error):.1e}")
        return {}


def _require_memory(device: torch.device, needed: int) -> None:
    if device.type != "cuda":
        return
    gc.collect()
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info(device)[0]
    if needed > 0.9 * free:
        raise AbsentError(
            f"needs {needed / 2**30:.0f} GiB for a copy of the weights per row and its gradient; "
            f"{free / 2**30:.0f} GiB are free"
        )


OWN = ("dmoe", "dmoe layer", "dmoe torch", "dmoe 2026-11 shapes")  # a wrong one fails the run
CEILING = "dense cuBLAS"
CONTESTANTS: dict[str, Callable[[Problem], Contestant]] = {
    "dmoe": Dmoe,
    "dmoe layer": DmoeLayer,
    "grouped_mm": GroupedMM,
    "HF grouped_mm": HuggingFaceGrouped,
    "HF batched_mm": HuggingFaceBatched,
    CEILING: DenseChain,
}
