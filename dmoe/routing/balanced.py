"""BASE: in training a balanced assignment of tokens to experts of the largest total score, else each token's best."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from dmoe.config import MoEConfig
from dmoe.losses import NOISE_LOSSES
from dmoe.ops.balanced_assignment import balanced_assignment
from dmoe.ops.gate_weights import gate_weights
from dmoe.ops.router_scores import router_scores
from dmoe.ops.topk_indices import topk_indices
from dmoe.router_family import RouterFamily, register
from dmoe.routing.base import LinearRouter, Routing
from dmoe.routing.planning import plan_of_choices
from dmoe.routing.rules import check_logits

_NO_MASK = (
    "MoE: token_mask: expected None in training with router='base', which gives each expert as many tokens; take the "
    "padding out of x"
)


@register("base")
@dataclass(frozen=True)
class Base(RouterFamily):
    """BASE layers (Lewis et al. 2021): every expert gets as many tokens in training, and no loss is needed.

    The score of (token, expert) is ``x . centroid``, the weight its sigmoid. The assignment is a constant: centroids
    learn through the weights. In training the host waits for it, also on CUDA, and ``torch.compile`` takes it as one
    operation.

    Args:
        over: whose tokens are assigned together: each rank's own (``local``: T / E of them to every expert, as fairseq,
            which shuffles tokens over the ranks first), or those of all ranks of ``ep_group`` (``group``), each of
            which brings equally many.
    """

    looks_ahead: ClassVar[bool] = True
    most_choices: ClassVar[int | None] = 1
    unread: ClassVar[tuple[str, ...]] = (
        "score_function", "softmax_order", "gate_normalization", "selection_bias", "num_groups",
    )  # fmt: skip
    lacks_losses: ClassVar[tuple[str, ...]] = ("z", *NOISE_LOSSES)

    over: Literal["local", "group"] = "local"

    def build(self, config: MoEConfig, *, ranks: Any = None, device: Any = None, dtype: Any = None) -> nn.Module:
        """See :class:`dmoe.router_family.RouterFamily`."""
        return BaseRouter(config, self, ranks=ranks, device=device, dtype=dtype)


class BaseRouter(LinearRouter):
    """The router of :class:`Base`. ``weight`` holds the centroids, ``(E, H)``, orthogonal of length 0.1 at first."""

    def __init__(
        self,
        config: MoEConfig,
        options: Base,
        *,
        ranks: Any = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(config, device=device, dtype=dtype)
        self.options, self.ranks = options, ranks

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fresh values: orthogonal centroids of gain 0.1 as fairseq's (where there are no more of them than H)."""
        if not self.weight.is_meta:
            exact = torch.empty(self.weight.shape, dtype=torch.float32, device=self.weight.device)
            self.weight.copy_(nn.init.orthogonal_(exact, gain=0.1))
        if self.bias is not None:
            self.bias.zero_()

    def route(
        self,
        router_logits: Tensor,
        *,
        token_mask: Tensor | None = None,
        expert_indices: Tensor | None = None,
        num_sequences: int = 1,
    ) -> Routing:
        """Route by given scores ``(T, E)``; see :meth:`dmoe.routing.LinearRouter.route`.

        Raises:
            ValueError: in training, tokens that E does not divide, or a mask, under which nothing would be balanced.
        """
        config = self.config
        check_logits(router_logits, config, expert_indices)
        chosen = expert_indices
        if chosen is None and self.training:
            chosen = self._assign(router_logits.detach(), token_mask)
        elif chosen is None:
            chosen = topk_indices(router_logits.detach(), 1)
        if token_mask is not None:
            chosen = chosen.masked_fill(~token_mask.unsqueeze(1), config.num_experts)
        scores, _ = router_scores(router_logits, "sigmoid", backend=config.backend)
        plan = plan_of_choices(
            chosen, scores.detach().gather(1, chosen.clamp(max=config.num_experts - 1)), self, num_sequences
        )
        weights = gate_weights(scores, chosen, plan.token_to_rows, scale=config.gate_scale, backend=config.backend)
        return Routing(
            plan=plan,
            gate_weights=weights,
            expert_indices=chosen,
            token_mask=token_mask,
            router_logits=router_logits,
        )

    def _scores_of_all(self, scores: Tensor, masked: bool) -> tuple[Tensor, int]:
        """All ranks' scores, ``(W, T, E)``, and which are this rank's; of different T they could not be gathered."""
        told, _ = self.ranks.gather(torch.tensor([len(scores), masked], device=scores.device))
        counts, masks = told.view(-1, 2).unbind(1)
        if masks.any():  # on every rank alike: one that said so alone would leave the others waiting
            raise ValueError(_NO_MASK)
        if (counts != len(scores)).any():  # the host waits for the assignment anyway
            raise ValueError(
                "MoE: x: expected equally many tokens on all ranks with Base(over='group'), which assigns them "
                f"together, got {counts.flatten().tolist()}"
            )
        return self.ranks.gather(scores)

    def _assign(self, scores: Tensor, token_mask: Tensor | None) -> Tensor:
        num_tokens, num_experts = scores.shape
        together = self.options.over == "group" and self.ranks is not None
        if token_mask is not None and not together:
            raise ValueError(_NO_MASK)
        if together:
            everyone, here = self._scores_of_all(scores, token_mask is not None)
            chosen = balanced_assignment(everyone.flatten(0, 1)).view(-1, num_tokens)[here]
        else:
            if num_tokens % num_experts:
                raise ValueError(
                    f"MoE: x: expected a number of tokens divisible by num_experts = {num_experts} in training with "
                    f"router='base', got {num_tokens}"
                )
            chosen = balanced_assignment(scores)
        return chosen.unsqueeze(1)
