"""What ``decode_cpu.py`` times: Transformers' experts and dmoe on the same parameters, checked against float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AriaTextConfig, MixtralConfig
from transformers.models.aria.modeling_aria import AriaExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import dmoe

from .harness import relative_error, require_close

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {"fp32": 1e-5, "bf16": 3e-2}  # relative norms, as in layer_cpu.py


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    shape: tuple[int, int, int, int]
    dtype: str
    layout: str
    passes: str
    tokens: int

    @property
    def label(self) -> str:
        """What ``--cases`` looks in."""
        hidden, ffn, experts, top_k = self.shape
        return f"{self.dtype} {self.layout} {self.passes} H={hidden} F={ffn} E={experts} K={top_k} T={self.tokens}"


@dataclass(frozen=True)
class Step:
    """One round's input."""

    x: Tensor
    indices: Tensor
    gates: Tensor
    grad: Tensor

    @staticmethod
    def of(case: Case, seed: int) -> Step:
        """Tokens, and the K best of random logits with weights that sum to 1."""
        hidden, _, experts, top_k = case.shape
        generator = torch.Generator().manual_seed(seed)
        x, grad = (torch.randn(case.tokens, hidden, generator=generator) for _ in range(2))
        best = torch.randn(case.tokens, experts, generator=generator).topk(top_k)
        dtype, train = DTYPES[case.dtype], case.passes != "forward"
        leaves = [tensor.to(dtype).requires_grad_(train) for tensor in (x, best.values.softmax(-1))]
        return Step(leaves[0], best.indices, leaves[1], grad.to(dtype))


def build(shape: tuple[int, int, int, int], dtype: str, layout: str) -> nn.Module:
    """Transformers' module with weights of a fixed seed."""
    hidden, ffn, experts, top_k = shape
    if layout == "plain":
        module: nn.Module = MixtralExperts(
            MixtralConfig(
                hidden_size=hidden, intermediate_size=ffn, num_local_experts=experts, num_experts_per_tok=top_k
            )
        )
    else:
        module = AriaExperts(
            AriaTextConfig(hidden_size=hidden, intermediate_size=ffn, moe_num_experts=experts, moe_topk=top_k)
        )
    module = module.to(DTYPES[dtype])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in module.parameters():
            weight.normal_(std=0.5 * weight.shape[1] ** -0.5, generator=generator)
    return module


def run(module: Any, who: str, step: Step) -> Tensor:
    """One forward."""
    if who != "dmoe":
        module.config._experts_implementation = who
        return module(step.x, step.indices, step.gates)
    up, down = module.gate_up_proj, module.down_proj
    if module.is_transposed:
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    weights = dmoe.ExpertWeights(up.unflatten(1, (2, -1)), down)
    return dmoe.functional.moe_mlp(step.x, step.indices, step.gates, weights)


def results_of(module: nn.Module, who: str, step: Step, train: bool) -> dict[str, Tensor]:
    """Output, and gradients by name."""
    leaves = {"x": step.x, "gate_weights": step.gates, **dict(module.named_parameters())} if train else {}
    with torch.set_grad_enabled(train):
        y = run(module, who, step)
        grads = torch.autograd.grad(y, list(leaves.values()), step.grad) if train else ()
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


def exact(module: Any, step: Step, train: bool) -> dict[str, Tensor]:
    """The same in float64: a loop over experts."""
    parameters = {name: weight.detach().double().requires_grad_(train) for name, weight in module.named_parameters()}
    leaves = {"x": step.x.detach().double(), "gate_weights": step.gates.detach().double()}
    leaves = {name: leaf.requires_grad_(train) for name, leaf in leaves.items()} | parameters
    y = torch.zeros(step.x.shape, dtype=torch.float64)
    for expert in step.indices.unique().tolist():
        token, slot = torch.where(step.indices == expert)
        up, down = parameters["gate_up_proj"][expert], parameters["down_proj"][expert]
        up, down = (up, down) if module.is_transposed else (up.T, down.T)
        gate, value = (leaves["x"][token] @ up).chunk(2, -1)
        out = (nn.functional.silu(gate) * value) @ down
        y = y.index_add(0, token, out * leaves["gate_weights"][token, slot, None])
    grads = torch.autograd.grad(y, list(leaves.values()), step.grad.double()) if train else ()
    return {"y": y.detach(), **(dict(zip(leaves, grads, strict=True)) if train else {})}


def check(case: Case, module: nn.Module, names: list[str]) -> dict[str, float]:
    """Worst error of each contestant; CheckError where one is off."""
    step, train = Step.of(case, 7), case.passes != "forward"
    expected, worst = exact(module, step, train), {}
    for who in names:
        got = results_of(module, who, step, train)
        errors = {name: relative_error(got[name], truth) for name, truth in expected.items()}
        require_close(f"decode_cpu, {case.label}, {who}", errors, TOLERANCE[case.dtype])
        worst[who] = max(errors.values())
    return worst
