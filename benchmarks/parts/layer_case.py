"""One line of the layer's tables on the CPU: its size, weights and tokens, which depend on seeds alone, and the truth.

The layer is Qwen3-MoE's: linear router, softmax over all experts, the K best renormalised to sum to 1, SiLU-gated
experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

# Tokens of one step share a random direction, as those of one text do, of this size beside their own unit variance. It
# makes the load differ between experts and from step to step, which decides the shapes of the products.
COMMON_DIRECTION = 0.25


@dataclass(frozen=True)
class Case:
    """One size and dtype, and what is run: ``training`` is forward and backward, ``inference`` forward alone."""

    tokens: int
    hidden: int
    ffn: int
    experts: int
    top_k: int
    dtype: str
    passes: str = "training"

    @property
    def training(self) -> bool:
        """Whether backward is part of it."""
        return self.passes == "training"

    @property
    def shape(self) -> str:
        """The size, for tables and for ``--cases``."""
        return f"T={self.tokens} H={self.hidden} F={self.ffn} E={self.experts} K={self.top_k}"

    @property
    def label(self) -> str:
        """Size, dtype and passes."""
        return f"{self.shape} {self.dtype} {self.passes}"

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
        """Of the experts' products: three in forward, six in backward."""
        return (18 if self.training else 6) * self.rows * self.hidden * self.ffn

    @property
    def expert_bytes(self) -> int:
        """Of one expert's weights."""
        return 3 * self.hidden * self.ffn * self.torch_dtype.itemsize


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
    """Output, and in training gradients, in float64, expert by expert: what every contestant is compared with."""
    weights = {name: w.double().requires_grad_(case.training) for name, w in make_weights(case).items()}
    x, grad = make_step(case, weights["router"].detach(), seed)
    x = x.double().requires_grad_(case.training)
    gates, indices = route(x, weights["router"], case.top_k)
    y = torch.zeros_like(x)
    for expert in indices.unique().tolist():
        gate_of_expert = (gates * (indices == expert)).sum(1)
        tokens = (indices == expert).any(1).nonzero().squeeze(1)
        gate, up = linear(x[tokens], weights["gate_up"][expert]).chunk(2, -1)
        out = linear(silu(gate) * up, weights["down"][expert])
        y = y.index_add(0, tokens, out * gate_of_expert[tokens, None])
    if not case.training:
        return {"y": y}
    y.backward(grad.double())
    grads = {name: w.grad for name, w in weights.items() if w.grad is not None}
    assert x.grad is not None
    return {"y": y.detach(), "x": x.grad, **grads}
