"""What a router is, and what it hands to the layer: the protocol that every family of routers keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dmoe.buffers import Float32Buffers
from dmoe.config import MoEConfig
from dmoe.expert_states import adapters_without_place
from dmoe.initial import router_weight
from dmoe.losses import NOISE_LOSSES
from dmoe.ops._checks import check_plain
from dmoe.ops.activation import accumulate_dtype
from dmoe.ops.philox import draw_seed
from dmoe.ops.router_logits import router_logits
from dmoe.plan import RoutingPlan

# Losses that `Routing.router_probs` are nothing to; any other may be a family's own, of these.
_WITHOUT_PROBABILITIES = ("z", *NOISE_LOSSES)


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
        chosen_indices: ``(T, K)`` as they were before a policy, or a mask that leaves tokens unrouted, took some away;
            None for ``expert_indices``.
        first_choices_per_expert: tokens whose first choice each expert is, ``(E,)`` integer, when the balance loss
            wants them.
        token_mask: ``(T,)`` bool, True for tokens that count.
        counted_choices: ``(T, K)``, E where masked, that the balance losses count instead of the plan's assignments;
            None for these.
        losses: what the family computed of the losses that the config names, by name: scalars without coefficients.
        router_logits: ``(T, E)``, before noise, that the choice was made of; None when there are none. Carries the
            gradient.
    """

    plan: RoutingPlan
    gate_weights: Tensor
    router_probs: Tensor | None = None
    log_z: Tensor | None = None
    expert_indices: Tensor | None = None
    first_choices_per_expert: Tensor | None = None
    token_mask: Tensor | None = None
    counted_choices: Tensor | None = None
    losses: Mapping[str, Tensor] = field(default_factory=dict)
    chosen_indices: Tensor | None = None
    router_logits: Tensor | None = None


class Router(Protocol):
    """``(T, H)`` to a :class:`Routing`. Families differ only in how they get there.

    One that has ``by_sequence`` true is also told ``num_sequences``, how many equally long sequences the tokens are;
    one that has ``reads_masked`` true gets masked tokens as they are, and not as zeros.
    """

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
        self.config, self.score_function = config, config.score_function
        self.by_sequence = config.token_groups == "sequence"
        self._make_parameters(config, device=device, dtype=dtype)
        self.register_module("lora", None)  # what dmoe.lora puts beside the weight
        self.reset_parameters()

    def _make_parameters(self, config: MoEConfig, **where: Any) -> None:
        """The parameters, without values: :meth:`reset_parameters` gives them."""
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size, **where))
        bias = torch.empty(config.num_experts, **where) if config.router_bias else None
        self.bias = None if bias is None else nn.Parameter(bias)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fresh values as the config's ``init`` or ``init_std`` say, and a zero bias."""
        router_weight(self.weight, self.config.init, self.config.init_std)
        if self.bias is not None:
            self.bias.zero_()

    def logits(self, x: Tensor) -> Tensor:
        """Router logits ``(T, E)`` in the router's dtype; jittered in training."""
        held: Any = self.lora
        if held is None:
            return self.capped(self.project(x, self.weight, self.bias))
        if self.config.batch_invariant:
            raise ValueError("MoE.router: expected no adapter with batch_invariant=True: its products follow the batch")
        logits = held.logits(
            lambda weight: self.project(x, weight, None), self.weight, self.dtype_of(x), self.config.backend
        )
        return self.capped(logits if self.bias is None else logits + self.bias.to(logits.dtype))

    def capped(self, logits: Tensor) -> Tensor:
        """Logits through ``router_logit_softcap``, where the config has one."""
        cap = self.config.router_logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def project(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``x @ weight.T + bias`` in the router's dtype, whatever autocast says; x jittered in training."""
        check_plain("MoE.router", weight=weight)
        if x.device != weight.device:
            raise ValueError(f"MoE: expected x on the weights' device {weight.device}, got {x.device}")
        jitter = self.config.input_jitter if self.training and self.config.input_jitter_on == "router" else 0.0
        seed = draw_seed(x.device) if jitter else None
        return router_logits(
            x,
            weight,
            bias,
            dtype=self.dtype_of(x),
            jitter=jitter,
            seed=seed,
            backend=self.config.backend,
            batch_invariant=self.config.batch_invariant,
        )

    def dtype_of(self, x: Tensor) -> torch.dtype:
        """What the router computes in for such an input."""
        return accumulate_dtype(x.dtype) if self.config.router_dtype == "float32" else x.dtype

    def forward(
        self,
        x: Tensor,
        *,
        token_mask: Tensor | None = None,
        token_ids: Tensor | None = None,
        expert_indices: Tensor | None = None,
        num_sequences: int = 1,
    ) -> Routing:
        """Route ``(T, H)`` by its logits; see :class:`Router`. ``token_ids`` are not looked at."""
        return self.route(
            self.logits(x), token_mask=token_mask, expert_indices=expert_indices, num_sequences=num_sequences
        )

    def route(
        self,
        router_logits: Tensor,
        *,
        token_mask: Tensor | None = None,
        expert_indices: Tensor | None = None,
        num_sequences: int = 1,
    ) -> Routing:
        """Route by given logits ``(T, E)``, without the router's linear: what a family is.

        Args:
            router_logits: ``(T, E)`` floating point.
            token_mask: ``(T,)`` bool; False takes no expert and counts in no loss.
            expert_indices: ``(T, K)`` integer: take these instead of the best; weights come from the logits.
            num_sequences: equally long ones that the tokens are, for ``token_groups="sequence"``.

        Raises:
            ValueError: logits for another number of experts, indices of another shape or type, or tokens that are no
                equal groups.
        """
        raise NotImplementedError(f"{type(self).__name__}: expected a route method, or a forward of its own")

    def _probabilities(self, scores: Tensor) -> Tensor:
        """Scores as a distribution over experts: what the balance loss compares with the load (DeepSeek-V3, eq. 18)."""
        if self.score_function == "softmax":
            return scores
        if all(name in _WITHOUT_PROBABILITIES for name, _ in self.config.coefficients):
            scores = scores.detach()  # only metrics read them: nothing to save
        return scores / (scores.sum(-1, keepdim=True) + torch.finfo(scores.dtype).tiny)

    def update_selection_bias(self) -> None:
        """No bias to move, unless a family has one."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        args[-2].extend(adapters_without_place(state_dict, prefix, self.lora))  # torch's unexpected_keys

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._modules.setdefault("lora", None)

    def extra_repr(self) -> str:
        """For ``print(model)``."""
        c = self.config
        return (
            f"num_experts={c.num_experts}, top_k={c.top_k}, hidden_size={c.hidden_size}, {c.score_function}, {c.router}"
        )
