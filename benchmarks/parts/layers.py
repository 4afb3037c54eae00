"""The layer of ``layer_case.py`` in several hands: on the same weights, in training and in inference."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import grouped_mm, linear, silu

import dmoe

from .layer_case import Case, route


class Contestant(ABC):
    """One way to run the layer, on given weights. In inference all of it runs under ``torch.inference_mode()``."""

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


class ModuleContestant(Contestant):
    """A module. In training gradients start from None, as after ``zero_grad()``; in inference it evaluates."""

    def __init__(self, case: Case, module: nn.Module) -> None:
        self.case, self.module = case, module.train(case.training)

    def prepare(self, x: Tensor, grad: Tensor) -> Callable[[], None]:
        if not self.case.training:

            def forward() -> None:
                self.y = self.forward(x)

            return forward
        self.x = x.detach().requires_grad_()
        self.module.zero_grad(set_to_none=True)

        def run() -> None:
            self.y = self.forward(self.x)
            self.backward(grad)

        return run

    def backward(self, grad: Tensor) -> None:
        """From the output's gradient."""
        self.y.backward(grad)

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)

    def parameters(self) -> Iterable[Tensor]:
        return self.module.parameters()

    def results(self) -> dict[str, Tensor]:
        return {"y": self.y, **({"x": grad_of(self.x), **self.weight_grads()} if self.case.training else {})}

    @abstractmethod
    def weight_grads(self) -> dict[str, Tensor]:
        """router, gate_up and down."""


def grad_of(tensor: Tensor) -> Tensor:
    """The gradient; zeros where nothing reached the tensor (an expert without tokens)."""
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


class Dmoe(ModuleContestant):
    """``dmoe.MoE`` without auxiliary losses: what the others compute."""

    coefficient = 0.0
    backend: Any = None

    def __init__(self, case: Case, weights: dict[str, Tensor]) -> None:
        layer = dmoe.MoE(
            hidden_size=case.hidden,
            ffn_hidden_size=case.ffn,
            num_experts=case.experts,
            top_k=case.top_k,
            gate_normalization=1.0,
            load_balancing_coefficient=self.coefficient,
            backend=self.backend,
            dtype=case.torch_dtype,
        )
        super().__init__(case, layer)
        self.parameter = dict(layer.named_parameters())
        with torch.no_grad():
            self.parameter["router.weight"].copy_(weights["router"])
            gate_up = self.parameter["experts.gate_up_proj"]  # (E, 2, F, H)
            gate_up.copy_(weights["gate_up"].view_as(gate_up))
            self.parameter["experts.down_proj"].copy_(weights["down"])

    def weight_grads(self) -> dict[str, Tensor]:
        return {
            "router": grad_of(self.parameter["router.weight"]),
            "gate_up": grad_of(self.parameter["experts.gate_up_proj"]).flatten(1, 2),
            "down": grad_of(self.parameter["experts.down_proj"]),
        }


class DmoeComposed(Dmoe):
    """The experts in PyTorch's own operations alone, as they run where no kernel of dmoe's does."""

    backend = "torch"


class DmoeWithLoss(Dmoe):
    """The same with its load-balancing loss, as a training loop runs it; only the losses' own gradients differ."""

    coefficient = 0.01
    compared = ("y", "gate_up", "down")

    def backward(self, grad: Tensor) -> None:
        """Of the loss too."""
        torch.autograd.backward([self.y, dmoe.aux_loss(self.module)], [grad, None])


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


class Loop(ModuleContestant):
    """The textbook: for each expert ``where``, two linears, ``index_add``. One parameter for each expert's matrix.

    (On slices of a stacked parameter, as Hugging Face's eager experts have it, each slice's backward also fills a
    gradient of the full size.)
    """

    def __init__(self, case: Case, weights: dict[str, Tensor]) -> None:
        self.experts = _PlainExperts(case, weights)
        super().__init__(case, self.experts)

    def weight_grads(self) -> dict[str, Tensor]:
        return {
            "router": grad_of(self.experts.router),
            "gate_up": torch.stack([grad_of(w) for w in self.experts.gate_up]),
            "down": torch.stack([grad_of(w) for w in self.experts.down]),
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


class GroupedMM(ModuleContestant):
    """Sort by expert, then ``F.grouped_mm``."""

    def __init__(self, case: Case, weights: dict[str, Tensor]) -> None:
        self.experts = _SortedExperts(case, weights)
        super().__init__(case, self.experts)

    def weight_grads(self) -> dict[str, Tensor]:
        experts = self.experts
        return {"router": grad_of(experts.router), "gate_up": grad_of(experts.gate_up), "down": grad_of(experts.down)}


class HuggingFace(ModuleContestant):
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
        super().__init__(case, self.block)
        with torch.no_grad():
            self.block.gate.weight.copy_(weights["router"])
            self.block.experts.gate_up_proj.copy_(weights["gate_up"])
            self.block.experts.down_proj.copy_(weights["down"])

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x.unsqueeze(0)).squeeze(0)

    def weight_grads(self) -> dict[str, Tensor]:
        experts = self.block.experts
        return {
            "router": grad_of(self.block.gate.weight),
            "gate_up": grad_of(experts.gate_up_proj),
            "down": grad_of(experts.down_proj),
        }
