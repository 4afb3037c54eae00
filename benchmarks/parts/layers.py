"""The contestants of ``layer_cpu.py``: one gated MoE layer in several hands, a dense FFN, and the bare products.

The layer is Qwen3-MoE's: linear router, softmax over all experts, the K best renormalised to sum to 1, SiLU-gated
experts.
Every contestant gets the same weights and inputs, which depend on seeds alone.
"""

from __future__ import annotations

import itertools
import resource
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import grouped_mm, linear, silu

import dmoe
from parts.harness import available_memory, relative_error, saved_bytes, stopwatch

# Tokens of one step share a random direction, as those of one text do, of this size beside their own unit variance. It
# makes the load differ between experts and from step to step, which decides the shapes of the products.
COMMON_DIRECTION = 0.25


@dataclass(frozen=True)
class Case:
    """One size and dtype."""

    tokens: int
    hidden: int
    ffn: int
    experts: int
    top_k: int
    dtype: str

    @property
    def shape(self) -> str:
        """The size, for tables and for ``--cases``."""
        return f"T={self.tokens} H={self.hidden} F={self.ffn} E={self.experts} K={self.top_k}"

    @property
    def label(self) -> str:
        """Size and dtype."""
        return f"{self.shape} {self.dtype}"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype itself."""
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[self.dtype]

    @property
    def rows(self) -> int:
        """R."""
        return self.tokens * self.top_k

    @property
    def flops(self) -> int:
        """Of the experts' products, forward and backward."""
        return 18 * self.rows * self.hidden * self.ffn


def make_weights(case: Case) -> dict[str, Tensor]:
    """router (E, H), gate_up (E, 2F, H) and down (E, H, F), uniform as ``nn.Linear``'s."""
    generator = torch.Generator().manual_seed(1)

    def uniform(*shape: int) -> Tensor:
        values = torch.rand(shape, generator=generator) * 2 - 1
        return (values * shape[-1] ** -0.5).to(case.torch_dtype)

    E, H, width = case.experts, case.hidden, case.ffn
    return {"router": uniform(E, H), "gate_up": uniform(E, 2 * width, H), "down": uniform(E, H, width)}


def make_step(case: Case, router: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """x and the gradient of the output, both (T, H).

    A token whose K-th and next logit are so close that rounding decides between them is drawn again: contestants that
    round differently would send it to different experts, and then have nothing to agree on.
    """
    generator = torch.Generator().manual_seed(1000 + seed)
    T, H = case.tokens, case.hidden
    common = COMMON_DIRECTION * torch.randn(H, generator=generator)
    x = torch.empty(T, H, dtype=case.torch_dtype)
    unsure = torch.ones(T, dtype=torch.bool)
    rounding = max(torch.finfo(case.torch_dtype).eps, 1e-5)
    while unsure.any():
        fresh = torch.randn(int(unsure.sum()), H, generator=generator) + common
        x[unsure] = fresh.to(x.dtype)
        ranked = (x.float() @ router.float().t()).sort(1, descending=True).values
        if case.top_k == case.experts:
            break
        gap = ranked[:, case.top_k - 1] - ranked[:, case.top_k]
        unsure = gap <= rounding * ranked.abs().amax(1)
    grad = torch.randn(T, H, generator=generator).to(case.torch_dtype)
    return x, grad


def route(x: Tensor, router: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Gate weights (T, K) and expert ids (T, K) in plain PyTorch, in float32 (float64 for float64)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    probs = linear(x.to(wide), router.to(wide)).softmax(-1)
    weights, indices = probs.topk(top_k)
    return weights / weights.sum(-1, keepdim=True), indices


def reference(case: Case, seed: int) -> dict[str, Tensor]:
    """Output and gradients in float64, expert by expert: what every contestant is compared with."""
    weights = {name: w.double().requires_grad_() for name, w in make_weights(case).items()}
    x, grad = make_step(case, weights["router"].detach(), seed)
    x = x.double().requires_grad_()
    gates, indices = route(x, weights["router"], case.top_k)
    y = torch.zeros_like(x)
    for expert in range(case.experts):
        gate_of_expert = (gates * (indices == expert)).sum(1)
        tokens = (indices == expert).any(1).nonzero().squeeze(1)
        gate, up = linear(x[tokens], weights["gate_up"][expert]).chunk(2, -1)
        out = linear(silu(gate) * up, weights["down"][expert])
        y = y.index_add(0, tokens, out * gate_of_expert[tokens, None])
    y.backward(grad.double())
    grads = {name: w.grad for name, w in weights.items() if w.grad is not None}
    assert x.grad is not None
    return {"y": y.detach(), "x": x.grad, **grads}


class Contestant(ABC):
    """One way to run the layer, on given weights."""

    #: tensors of :func:`reference` that it must reproduce
    compared: tuple[str, ...] = ("y", "x", "router", "gate_up", "down")

    @abstractmethod
    def prepare(self, x: Tensor, grad: Tensor) -> Callable[[], None]:
        """What is timed, with everything that does not belong to it done."""

    @abstractmethod
    def results(self) -> dict[str, Tensor]:
        """Output and gradients of the last run."""

    def parameters(self) -> Iterable[Tensor]:
        """What the saved-activation count leaves out."""
        return ()


class _Module(Contestant):
    """A module under autograd: gradients start from None, as after ``zero_grad()``."""

    module: nn.Module

    def prepare(self, x: Tensor, grad: Tensor) -> Callable[[], None]:
        self.x = x.detach().requires_grad_()
        self.module.zero_grad(set_to_none=True)

        def run() -> None:
            self.y = self.forward(self.x)
            self.y.backward(grad)

        return run

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)

    def parameters(self) -> Iterable[Tensor]:
        return self.module.parameters()

    def results(self) -> dict[str, Tensor]:
        return {"y": self.y, "x": _grad(self.x), **self.weight_grads()}

    @abstractmethod
    def weight_grads(self) -> dict[str, Tensor]:
        """router, gate_up and down."""


def _grad(tensor: Tensor) -> Tensor:
    """The gradient; zeros where nothing reached the tensor (an expert without tokens)."""
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


class Dmoe(_Module):
    """``dmoe.MoE`` without auxiliary losses: what the others compute."""

    coefficient = 0.0
    backend: Any = None

    def __init__(self, case: Case, weights: dict[str, Tensor]) -> None:
        self.module = self.layer = dmoe.MoE(
            hidden_size=case.hidden,
            ffn_hidden_size=case.ffn,
            num_experts=case.experts,
            top_k=case.top_k,
            gate_normalization=1.0,
            load_balancing_coefficient=self.coefficient,
            backend=self.backend,
            dtype=case.torch_dtype,
        )
        self.parameter = dict(self.layer.named_parameters())
        with torch.no_grad():
            self.parameter["router.weight"].copy_(weights["router"])
            gate_up = self.parameter["experts.gate_up_proj"]  # (E, 2, F, H)
            gate_up.copy_(weights["gate_up"].view_as(gate_up))
            self.parameter["experts.down_proj"].copy_(weights["down"])

    def weight_grads(self) -> dict[str, Tensor]:
        return {
            "router": _grad(self.parameter["router.weight"]),
            "gate_up": _grad(self.parameter["experts.gate_up_proj"]).flatten(1, 2),
            "down": _grad(self.parameter["experts.down_proj"]),
        }


class DmoeComposed(Dmoe):
    """The experts in PyTorch's own operations alone, as they run where no kernel of dmoe's does."""

    backend = "torch"


class DmoeWithLoss(Dmoe):
    """The same with its load-balancing loss, as a training loop runs it; only the losses' own gradients differ."""

    coefficient = 0.01
    compared = ("y", "gate_up", "down")

    def prepare(self, x: Tensor, grad: Tensor) -> Callable[[], None]:
        self.x = x.detach().requires_grad_()
        self.module.zero_grad(set_to_none=True)

        def run() -> None:
            self.y = self.module(self.x)
            torch.autograd.backward([self.y, dmoe.aux_loss(self.module)], [grad, None])

        return run


class _PlainExperts(nn.Module):
    """Each expert's matrices as parameters of their own, and the router."""

    def __init__(self, case: Case, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.case = case
        self.router = nn.Parameter(weights["router"].clone())
        self.gate_up = nn.ParameterList(w.clone() for w in weights["gate_up"])
        self.down = nn.ParameterList(w.clone() for w in weights["down"])

    def forward(self, x: Tensor) -> Tensor:
        gates, indices = route(x, self.router, self.case.top_k)
        y = torch.zeros_like(x)
        for expert, (gate_up, down) in enumerate(zip(self.gate_up, self.down, strict=True)):
            token, choice = torch.where(indices == expert)
            gate, up = linear(x[token], gate_up).chunk(2, -1)
            out = linear(silu(gate) * up, down)
            y.index_add_(0, token, (out * gates[token, choice, None]).to(y.dtype))
        return y


class Loop(_Module):
    """The textbook: for each expert ``where``, two linears, ``index_add``. One parameter for each expert's matrix.

    (On slices of a stacked parameter, as Hugging Face's eager experts have it, each slice's backward also fills a
    gradient of the full size.)
    """

    def __init__(self, case: Case, weights: dict[str, Tensor]) -> None:
        self.module = self.experts = _PlainExperts(case, weights)

    def weight_grads(self) -> dict[str, Tensor]:
        return {
            "router": _grad(self.experts.router),
            "gate_up": torch.stack([_grad(w) for w in self.experts.gate_up]),
            "down": torch.stack([_grad(w) for w in self.experts.down]),
        }


class _SortedExperts(nn.Module):
    """Rows sorted by expert, and two grouped products, as torchtitan has it."""

    def __init__(self, case: Case, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.case = case
        self.router = nn.Parameter(weights["router"].clone())
        self.gate_up = nn.Parameter(weights["gate_up"].clone())
        self.down = nn.Parameter(weights["down"].clone())

    def forward(self, x: Tensor) -> Tensor:
        K, E = self.case.top_k, self.case.experts
        gates, indices = route(x, self.router, K)
        ids = indices.flatten()
        order = torch.argsort(ids, stable=True)
        ends = torch.bincount(ids, minlength=E).cumsum(0).int()
        token = order // K
        gate, up = grouped_mm(x[token], self.gate_up.transpose(1, 2), offs=ends).chunk(2, -1)
        out = grouped_mm(silu(gate) * up, self.down.transpose(1, 2), offs=ends)
        weighted = (out * gates.flatten()[order, None]).to(x.dtype)
        return torch.zeros_like(x).index_add_(0, token, weighted)


class GroupedMM(_Module):
    """Sort by expert, then ``F.grouped_mm``."""

    def __init__(self, case: Case, weights: dict[str, Tensor]) -> None:
        self.module = self.experts = _SortedExperts(case, weights)

    def weight_grads(self) -> dict[str, Tensor]:
        experts = self.experts
        return {"router": _grad(experts.router), "gate_up": _grad(experts.gate_up), "down": _grad(experts.down)}


class HuggingFace(_Module):
    """Transformers' Qwen3-MoE block with one of its experts implementations; its router's product is in x's dtype."""

    def __init__(self, case: Case, weights: dict[str, Tensor], implementation: str) -> None:
        from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

        options: dict[str, Any] = {
            "hidden_size": case.hidden,
            "moe_intermediate_size": case.ffn,
            "num_experts": case.experts,
            "num_experts_per_tok": case.top_k,
            "norm_topk_prob": True,
            "hidden_act": "silu",
            "experts_implementation": implementation,
        }
        config = Qwen3MoeConfig(**options)
        if config._experts_implementation != implementation:
            raise RuntimeError(f"transformers took {config._experts_implementation!r} for {implementation!r}")
        self.block = Qwen3MoeSparseMoeBlock(config).to(case.torch_dtype)
        self.module = self.block
        with torch.no_grad():
            self.block.gate.weight.copy_(weights["router"])
            self.block.experts.gate_up_proj.copy_(weights["gate_up"])
            self.block.experts.down_proj.copy_(weights["down"])

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x.unsqueeze(0)).squeeze(0)

    def weight_grads(self) -> dict[str, Tensor]:
        experts = self.block.experts
        return {
            "router": _grad(self.block.gate.weight),
            "gate_up": _grad(experts.gate_up_proj),
            "down": _grad(experts.down_proj),
        }


class Dense(_Module):
    """A dense SiLU-gated FFN of width K * F: the same FLOPs for every token, no router, another function."""

    compared = ()

    def __init__(self, case: Case, weights: dict[str, Tensor]) -> None:
        width, dtype = case.top_k * case.ffn, case.torch_dtype
        self.up = nn.Linear(case.hidden, 2 * width, bias=False, dtype=dtype)
        self.down = nn.Linear(width, case.hidden, bias=False, dtype=dtype)
        self.module = nn.ModuleList([self.up, self.down])

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.up(x).chunk(2, -1)
        return self.down(silu(gate) * up)

    def weight_grads(self) -> dict[str, Tensor]:
        return {}


class Floor(Contestant):
    """The experts' matrix products and nothing else: ``torch.mm`` of each expert's rows into outputs that exist."""

    # Six products an expert: up and down; then the gradients of hidden, of the rows and of both weights. No router, no
    # gather, no activation, no sum over a token's rows, no allocation.
    compared = ("gate_up", "down")

    def __init__(self, case: Case, weights: dict[str, Tensor]) -> None:
        self.case, self.weights = case, weights
        dtype, rows = case.torch_dtype, case.rows
        self.pre = torch.zeros(rows, 2 * case.ffn, dtype=dtype)
        self.out = torch.zeros(rows, case.hidden, dtype=dtype)
        self.grad_hidden = torch.zeros(rows, case.ffn, dtype=dtype)
        self.grad_rows = torch.zeros(rows, case.hidden, dtype=dtype)
        self.grad_gate_up = torch.zeros_like(weights["gate_up"])
        self.grad_down = torch.zeros_like(weights["down"])

    def prepare(self, x: Tensor, grad: Tensor) -> Callable[[], None]:
        """Lay out the rows and slices of this routing, with the true operands: so the results can be checked."""
        case, weights = self.case, self.weights
        gates, indices = route(x, weights["router"], case.top_k)
        order = torch.argsort(indices.flatten(), stable=True)
        bounds = [0, *torch.bincount(indices.flatten(), minlength=case.experts).cumsum(0).tolist()]
        token, gate_of_row = order // case.top_k, gates.flatten()[order, None]
        spans = [slice(a, b) for a, b in itertools.pairwise(bounds)]
        rows, grad_out = x[token], grad[token]
        wide = torch.float32
        pre = torch.cat([rows[s] @ w.t() for s, w in zip(spans, weights["gate_up"], strict=True)]).to(wide)
        grad_hidden = torch.cat([grad_out[s] @ w for s, w in zip(spans, weights["down"], strict=True)]).to(wide)
        grad_hidden = grad_hidden * gate_of_row
        gate, up = pre.chunk(2, -1)
        sigmoid = gate.sigmoid()
        slope = sigmoid * (1 + gate * (1 - sigmoid))
        hidden = (gate * sigmoid * up).to(x.dtype)
        weighted_hidden = (gate * sigmoid * up * gate_of_row).to(x.dtype)
        grad_pre = torch.cat([grad_hidden * up * slope, grad_hidden * gate * sigmoid], -1).to(x.dtype)
        calls = []
        for e, s in enumerate(spans):
            gate_up, down = weights["gate_up"][e], weights["down"][e]
            calls += [
                (rows[s], gate_up.t(), self.pre[s]),
                (hidden[s], down.t(), self.out[s]),
                (grad_out[s], down, self.grad_hidden[s]),
                (grad_pre[s], gate_up, self.grad_rows[s]),
                (grad_pre[s].t(), rows[s], self.grad_gate_up[e]),
                (grad_out[s].t(), weighted_hidden[s], self.grad_down[e]),
            ]
        flops = sum(2 * a.shape[0] * a.shape[1] * b.shape[1] for a, b, _ in calls)
        if flops != case.flops:
            raise RuntimeError(f"floor: expected {case.flops} FLOPs, got {flops}")
        # Forward first, then backward, as a step has it.
        forward = [call for i, call in enumerate(calls) if i % 6 < 2]
        backward = [call for i, call in enumerate(calls) if i % 6 >= 2]

        def run() -> None:
            mm = torch.mm
            for a, b, out in forward:
                mm(a, b, out=out)
            for a, b, out in backward:
                mm(a, b, out=out)

        return run

    def results(self) -> dict[str, Tensor]:
        return {"gate_up": self.grad_gate_up, "down": self.grad_down}


def _hugging_face(implementation: str) -> Callable[[Case, dict[str, Tensor]], Contestant]:
    return lambda case, weights: HuggingFace(case, weights, implementation)


CONTESTANTS: dict[str, Callable[[Case, dict[str, Tensor]], Contestant]] = {
    "dmoe": Dmoe,
    "dmoe + balance loss": DmoeWithLoss,
    "dmoe torch": DmoeComposed,
    "expert loop": Loop,
    "sort + grouped_mm": GroupedMM,
    "HF eager": _hugging_face("eager"),
    "HF batched_mm": _hugging_face("batched_mm"),
    "HF grouped_mm": _hugging_face("grouped_mm"),
    "dense FFN": Dense,
    "floor": Floor,
}
RIVALS = ("expert loop", "sort + grouped_mm", "HF eager", "HF batched_mm", "HF grouped_mm")


class Bench:
    """What one worker process runs: a contestant by name, on one case after another."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.contestant: Contestant | None = None

    def build(self, case: Case, memory: int) -> str:
        """Get ready for a case; a reason why this contestant cannot run it, or nothing.

        Args:
            case: the case.
            memory: bytes that it may use.
        """
        self.contestant = None
        if self.name == "HF batched_mm":
            # It gathers both weights for every row, and backward makes the gradient of the same size.
            needed = 2 * case.rows * 3 * case.ffn * case.hidden * case.torch_dtype.itemsize
            memory = min(memory, available_memory() or memory)
            if needed > memory:
                have, want = memory / 2**30, needed / 2**30
                return (
                    f"needs {want:.1f} GiB for a copy of the weights per row and its gradient; {have:.1f} GiB allowed"
                )
        self.case, self.weights = case, make_weights(case)
        self.contestant = CONTESTANTS[self.name](case, self.weights)
        return ""

    def _step(self, seed: int) -> Callable[[], None]:
        if self.contestant is None:
            raise RuntimeError(f"{self.name}: no case is built")
        return self.contestant.prepare(*make_step(self.case, self.weights["router"], seed))

    def errors(self, seed: int, path: str) -> dict[str, float]:
        """Relative errors against :func:`reference`, stored at ``path``."""
        self._step(seed)()
        assert self.contestant is not None
        expected = torch.load(path)
        got = self.contestant.results()
        return {name: relative_error(got[name], expected[name]) for name in self.contestant.compared}

    def saved_bytes(self) -> int:
        """Bytes kept for backward beside the parameters, each storage once; -1 where autograd is not used."""
        assert self.contestant is not None
        if isinstance(self.contestant, Floor):
            return -1
        return saved_bytes(self._step(0), self.contestant.parameters())

    def time(self, seeds: list[int]) -> tuple[float, int]:
        """Run the steps of these seeds one after another; seconds and page faults of the last.

        The steps before the last wake the threads and bring the weights back into the caches, as the step before does
        in a training loop.
        """
        seconds, faults = 0.0, 0
        for seed in seeds:
            run = self._step(seed)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            seconds = stopwatch(run)
            faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        return seconds, faults
