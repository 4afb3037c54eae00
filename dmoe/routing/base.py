"""What a router is, and what it hands to the layer: the protocol that every family of routers keeps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from dmoe.buffers import Float32Buffers
from dmoe.config import MoEConfig
from dmoe.ops._checks import check_plain
from dmoe.ops.activation import accumulate_dtype
from dmoe.ops.philox import draw_seed
from dmoe.ops.router_logits import router_logits
from dmoe.plan import RoutingPlan


@dataclass(frozen=True)
class Routing:
    """One forward's routing: the plan, what each assignment weighs, and what the losses need.

    Attributes:
        plan: which token goes where.
        gate_weights: one per assignment, in the order of ``plan.token_rows``: ``(T, K)``, or ``(N,)`` where tokens have
            different numbers of experts. Carries the gradient.
        router_probs: probabilities over experts, ``(T, E)``, rows summing to 1; None when the router has none. Carries
            the gradient.
        log_z: ``logsumexp`` of the router logits, ``(T,)``, when the z-loss wants it.
        expert_indices: ``(T, K)`` as chosen, E where masked; None when experts chose.
        first_choices_per_expert: tokens whose first choice each expert is, ``(E,)`` integer, when the balance loss
            wants them.
        token_mask: ``(T,)`` bool, True for tokens that count.
    """

    plan: RoutingPlan
    gate_weights: Tensor
    router_probs: Tensor | None = None
    log_z: Tensor | None = None
    expert_indices: Tensor | None = None
    first_choices_per_expert: Tensor | None = None
    token_mask: Tensor | None = None


class Router(Protocol):
    """``(T, H)`` to a :class:`Routing`. Families differ only in how they get there."""

    def __call__(
        self,
        x: Tensor,
        *,
        token_mask: Tensor | None = None,
        token_ids: Tensor | None = None,
        expert_indices: Tensor | None = None,
    ) -> Routing:
        """Route tokens.

        Args:
            x: ``(T, H)``.
            token_mask: ``(T,)`` bool; False takes no expert and counts in no loss.
            token_ids: ``(T,)`` integer, for routers that look at the token itself.
            expert_indices: ``(T, K)`` integer: replay this choice; weights still come from the live scores.
        """
        ...

    def update_selection_bias(self) -> None:
        """Move the selection bias by the load since the last call; nothing where there is none."""
        ...


class LinearRouter(Float32Buffers):
    """A learned linear from hidden to router logits; the families below decide what to do with them.

    Args:
        config: sizes, precision, jitter.
        device, dtype: of the parameters.
    """

    def __init__(
        self, config: MoEConfig, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size, device=device, dtype=dtype))
        bias = torch.empty(config.num_experts, device=device, dtype=dtype) if config.router_bias else None
        self.bias = None if bias is None else nn.Parameter(bias)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fresh values, as ``nn.Linear``'s: uniform in +-1/sqrt(H), or normal with ``init_std`` and a zero bias."""
        std = self.config.init_std
        if std is None:
            bound = 1 / math.sqrt(self.config.hidden_size)
            self.weight.uniform_(-bound, bound)
        else:
            self.weight.normal_(0, std)
        if self.bias is not None:
            self.bias.zero_()

    def logits(self, x: Tensor) -> Tensor:
        """Router logits ``(T, E)`` in the router's dtype; jittered in training."""
        check_plain("MoE.router", weight=self.weight)
        if x.device != self.weight.device:
            raise ValueError(f"MoE: expected x on the weights' device {self.weight.device}, got {x.device}")
        jitter = self.config.input_jitter if self.training else 0.0
        seed = draw_seed(x.device) if jitter else None
        dtype = accumulate_dtype(x.dtype) if self.config.router_dtype == "float32" else x.dtype
        return router_logits(
            x, self.weight, self.bias, dtype=dtype, jitter=jitter, seed=seed, backend=self.config.backend
        )

    def _probabilities(self, scores: Tensor) -> Tensor:
        """Scores as a distribution over experts: what the balance loss compares with the load (DeepSeek-V3, eq. 18)."""
        if self.config.score_function == "softmax":
            return scores
        if not self.config.load_balancing_coefficient:  # only metrics read them: nothing to save
            scores = scores.detach()
        return scores / (scores.sum(-1, keepdim=True) + torch.finfo(scores.dtype).tiny)

    def update_selection_bias(self) -> None:
        """No bias to move, unless a family has one."""

    def extra_repr(self) -> str:
        """For ``print(model)``."""
        c = self.config
        return f"num_experts={c.num_experts}, top_k={c.top_k}, hidden_size={c.hidden_size}, {c.score_function}"
