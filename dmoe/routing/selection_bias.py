"""A bias that chooses and does not weigh: what a forward counts for it, and how an update moves it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dmoe.ops.topk_indices import topk_indices


class _CountInBackward(torch.autograd.Function):
    """Identity on the gate weights that adds to a counter when, and each time, backward runs.

    Counting in forward would count a checkpointed layer twice and an evaluation once.
    """

    @staticmethod
    def forward(ctx: Any, weights: Tensor, amounts: Tensor, counter: Tensor) -> Tensor:
        ctx.save_for_backward(amounts)
        ctx.counter = counter
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (amounts,) = ctx.saved_tensors
        ctx.counter.add_(amounts)
        return grad, None, None


def count_in_backward(weights: Tensor, amounts: Tensor, counter: Tensor) -> Tensor:
    """``weights``, such that each backward through them adds ``amounts`` to ``counter``."""
    return _CountInBackward.apply(weights, amounts, counter)


def sign_step(bias: Tensor, load: Tensor, rate: float) -> None:
    """Raise the bias of experts below the mean load and lower the others, in place (DeepSeek-V3, section 2.1.2)."""
    bias += rate * torch.sign(load.mean() - load)


def quantile_choice(logits: Tensor, bias: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The K experts with the largest biased logits, ``(T, K)``, and the biased logit that was next, ``(T,)``."""
    biased = logits.detach().float() + bias
    chosen = topk_indices(biased, top_k + 1)
    return chosen[:, :top_k].contiguous(), biased.gather(1, chosen[:, top_k:]).squeeze(1)


def balanced_bias(logits: Tensor, cutoff: Tensor, top_k: int, token_mask: Tensor | None) -> Tensor:
    """The bias under which these tokens, their cutoffs as they are, would give each expert ``T * K / E`` of them.

    Expert e is chosen where ``logit + bias > cutoff``: minus its bias is the (T * K / E + 1)-th largest of
    ``logit - cutoff`` (Su 2025, "Quantile Balancing"; Megatron-Core's ``qb_dual_update``).

    Args:
        logits: ``(T, E)``, without the bias.
        cutoff: ``(T,)``, from :func:`quantile_choice`.
        top_k: K.
        token_mask: ``(T,)`` bool, True for tokens that count.

    Returns:
        ``(E + 1,)`` float32: the bias, and 1 behind it: what :func:`quantile_step` takes, added up over batches.
    """
    num_tokens, num_experts = logits.shape
    one = logits.new_ones(1, dtype=torch.float32)
    if num_tokens == 0:
        return torch.zeros_like(one.expand(num_experts + 1))
    margin = logits.detach().float() - cutoff.unsqueeze(1)
    if token_mask is None:
        rank = torch.full((1,), num_tokens * top_k // num_experts, device=logits.device)
    else:
        margin = margin.masked_fill(~token_mask.unsqueeze(1), -torch.inf)
        rank = (token_mask.sum() * top_k // num_experts).view(1)
        one = token_mask.any().float().view(1)
    ordered = margin.sort(dim=0, descending=True).values
    found = -ordered.index_select(0, rank.clamp(max=num_tokens - 1)).squeeze(0)
    return torch.cat([torch.where(one > 0, found, 0), one])


def quantile_step(bias: Tensor, counted: Tensor, decay: float) -> None:
    """Put the bias at the mean of what batches found balanced, keeping ``decay`` of it, in place; its mean is 0.

    What is not finite moves nothing, or one bad batch would spoil the bias for good: an expert that a batch could not
    have used, its logits being -inf, keeps its bias; where the logits were NaN all do.

    Args:
        bias: ``(E,)``.
        counted: ``(E + 1,)``, the sum over batches and ranks of what :func:`balanced_bias` returned; 0 moves nothing.
        decay: share of the old bias that stays.
    """
    batches, total = counted[-1], counted[:-1]
    found = decay * bias + (1 - decay) * total / batches.clamp(min=1)
    moves = (batches > 0) & total.isfinite()
    new = torch.where(moves, found, bias)
    bias.copy_(torch.where(moves.any(), new - new.mean(), bias))
