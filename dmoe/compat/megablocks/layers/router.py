"""The learned router, and its z-loss."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from dmoe.compat._not_offered import attributes_of
from dmoe.compat.megablocks.layers import common
from dmoe.compat.megablocks.layers.arguments import Arguments
from dmoe.compat.megablocks.layers.saved import Rounds
from dmoe.ops.activation import accumulate_dtype
from dmoe.ops.gate_weights import gate_weights
from dmoe.ops.topk_indices import topk_indices

__getattr__ = attributes_of(__name__)

_LOGITS = Rounds("router z-loss", "clear_router_zloss")


def clear_router_zloss() -> None:
    """Forget the router logits of the last round."""
    _LOGITS.clear()


def batched_router_zloss(args: Arguments) -> Tensor | int:
    """``moe_zloss_weight * mean_t logsumexp(logits_t)**2`` of each router (Zoph et al. 2022, eq. 5).

    Returns:
        one value for each router that ran in training since the last clearing, ``(L,)``, in the logits' dtype or, with
        ``moe_zloss_in_fp32``, float32; a scalar 0 where none did; 0 with a warning when the weight is 0. Of several
        forwards of a model the first one's values come first.

    Raises:
        RuntimeError: the routers ran under ``no_grad``, and this does not.
    """
    if args.moe_zloss_weight == 0:
        warnings.warn("batched_router_zloss: moe_zloss_weight is 0, so there is no z-loss", stacklevel=2)
        return 0
    _LOGITS.check_recorded()
    losses = []
    for logits in _LOGITS.values():
        logits = logits.float() if args.moe_zloss_in_fp32 and logits.dtype != torch.float64 else logits
        losses.append(torch.logsumexp(logits, dim=1).square().sum() / max(logits.shape[0], 1))
    return args.moe_zloss_weight * torch.stack(losses) if losses else torch.zeros(())


def _uniform_expert_assignment(x: Tensor, num_experts: int) -> Tensor:
    """Ids 0, 1, 2, ... modulo ``num_experts``, in the shape, dtype and device of ``x``."""
    return torch.arange(x.numel(), dtype=x.dtype, device=x.device).view(x.shape) % num_experts


class LearnedRouter(nn.Module):
    """Softmax scores of a linear, and each token's K best experts; ties take the lowest id.

    Args:
        args: sizes, jitter, normalisation. Scores have the input's dtype, float32 under autocast.
    """

    def __init__(self, args: Arguments) -> None:
        super().__init__()
        self.args = args
        self.layer = nn.Linear(
            args.hidden_size, args.moe_num_experts, bias=False, dtype=common.dtype(args), device=args.device
        )
        args.init_method(self.layer.weight)

    def jitter(self, x: Tensor) -> Tensor:
        """Uniform noise in [1 - eps, 1 + eps) of x's shape and dtype."""
        eps = self.args.moe_jitter_eps or 0.0
        return torch.empty_like(x).uniform_(1.0 - eps, 1.0 + eps)

    def _top_k(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """The K best scores of each token and their experts' ids, ``(T, K)`` both, of ``(T, E)``."""
        experts = topk_indices(scores, self.args.moe_top_k)
        return gate_weights(scores, experts), experts

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Route ``(..., H)``, T tokens in all.

        Returns:
            scores ``(T, E)``, the chosen experts' weights ``(T, K)``, and their ids ``(T, K)`` int64.
        """
        args = self.args
        if self.training and args.moe_jitter_eps is not None:
            x = x * self.jitter(x)
        logits = self.layer(x.reshape(-1, x.shape[-1]))
        # CUDA's autocast runs a softmax in float32 by itself, the CPU's does not.
        wide = accumulate_dtype(logits.dtype) if common.autocast_is_on(logits.device.type) else logits.dtype
        scores = logits.softmax(-1, dtype=wide)
        weights, experts = self._top_k(scores)
        if args.moe_normalize_expert_weights:
            every = torch.arange(weights.shape[1], device=weights.device).expand(weights.shape)
            weights = gate_weights(weights, every, normalization=args.moe_normalize_expert_weights)
        if self.training and args.moe_zloss_weight:
            _LOGITS.save(logits, self, args, weights)
        if args.uniform_expert_assignment:
            experts = _uniform_expert_assignment(experts, args.moe_num_experts)
        return scores, weights, experts
