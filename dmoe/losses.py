"""The router's auxiliary losses: pure functions of tensors, and the two ways a layer hands them over."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dmoe.sums import sum_tokens


def load_balancing_loss(
    router_probs: Tensor,
    tokens_per_expert: Tensor,
    token_mask: Tensor | None = None,
    *,
    num_tokens: Tensor | None = None,
) -> Tensor:
    """Switch-style balance penalty ``E * sum_e(f_e * p_e)`` (Fedus et al. 2021, eq. 4).

    ``f_e`` is the share of assignments that went to expert e and ``p_e`` the mean router probability.

    Args:
        router_probs: probabilities over experts, ``(T, E)`` floating point. Carries the gradient.
        tokens_per_expert: assignments per expert before any drop, ``(E,)`` integer. A constant: counts have no
        gradient.
        token_mask: ``(T,)`` bool, True for tokens that count; None counts all.
        num_tokens: what the sum of the probabilities is divided by, a scalar; None is the number of tokens that count.
            With ``tokens_per_expert`` of a global batch it is the mean number of tokens of a rank: the mean of the
            ranks' losses is then the loss of that batch, and so are their gradients.

    Returns:
        A scalar in float32 (float64 for float64), dimensionless: 1 under even routing, E at most, 0 for no token. The
        caller applies the coefficient.

    Raises:
        ValueError: the two disagree on E.
    """
    num_tokens_here, num_experts = router_probs.shape
    if tokens_per_expert.shape != (num_experts,):
        raise ValueError(
            f"load_balancing_loss: tokens_per_expert: expected shape ({num_experts},) as router_probs "
            f"{tuple(router_probs.shape)} has it, got {tuple(tokens_per_expert.shape)}"
        )
    wide = torch.promote_types(router_probs.dtype, torch.float32)  # half precision cannot count past 65504
    counts = tokens_per_expert.to(wide)
    share = counts / counts.sum().clamp(min=1)
    if token_mask is None:
        total = sum_tokens(router_probs, wide)
    else:  # One masked row may hold NaN; 0 * NaN would spread it to every expert.
        total = sum_tokens(router_probs.masked_fill(~token_mask.unsqueeze(1), 0), wide)
    if num_tokens is None:
        if token_mask is None:
            return (total * (share * (num_experts / max(num_tokens_here, 1)))).sum()
        num_tokens = token_mask.sum()
    tokens = num_tokens.to(wide)
    return (total * (share * (num_experts / torch.where(tokens > 0, tokens, 1)))).sum()


def sequence_load_balancing_loss(
    router_probs: Tensor, expert_indices: Tensor, num_sequences: int, token_mask: Tensor | None = None
) -> Tensor:
    """Mean over sequences of each one's :func:`load_balancing_loss` (DeepSeek-V3, section 2.1.2).

    Args:
        router_probs: ``(B * S, E)``, sequence after sequence. Carries the gradient.
        expert_indices: ``(B * S, K)`` integer, the choices that count, E where there is none.
        num_sequences: B.
        token_mask: ``(B * S,)`` bool, True for tokens that count; a sequence without any adds 0.

    Returns:
        A scalar in float32 (float64 for float64), dimensionless: 1 under even routing; 0 for no sequence.

    Raises:
        ValueError: tokens that are no B sequences of one length.
    """
    num_tokens, num_experts = router_probs.shape
    if num_tokens and (num_sequences < 1 or num_tokens % num_sequences):
        raise ValueError(
            f"sequence_load_balancing_loss: expected {num_tokens} tokens in equally long sequences, got {num_sequences}"
        )
    wide = torch.promote_types(router_probs.dtype, torch.float32)
    if not num_tokens:
        return router_probs.sum(dtype=wide)
    by_sequence = (num_sequences, num_tokens // num_sequences)
    mask = router_probs.new_ones(num_tokens, dtype=torch.bool) if token_mask is None else token_mask
    probs = sum_tokens(router_probs.masked_fill(~mask.unsqueeze(1), 0).view(*by_sequence, num_experts), wide)
    counts = probs.new_zeros(num_sequences, num_experts + 1)
    ids = expert_indices.long().view(num_sequences, -1)
    counts = counts.scatter_add(1, ids, torch.ones_like(ids, dtype=wide))[:, :num_experts]  # sums of ones: exact
    tokens = mask.view(by_sequence).sum(1).clamp(min=1)
    share = counts / counts.sum(1, keepdim=True).clamp(min=1)
    return ((share * probs).sum(1) / tokens).sum() * (num_experts / num_sequences)


def router_z_loss(log_z: Tensor, token_mask: Tensor | None = None) -> Tensor:
    """Mean squared log-partition of the router, which keeps logits small (Zoph et al. 2022, eq. 5).

    Args:
        log_z: ``logsumexp`` of each token's router logits, ``(T,)`` floating point. Carries the gradient.
        token_mask: ``(T,)`` bool, True for tokens that count; None counts all.

    Returns:
        A scalar in float32 (float64 for float64); 0 for an empty batch.
    """
    wide = torch.promote_types(log_z.dtype, torch.float32)
    if token_mask is None:
        return sum_tokens(log_z.to(wide).square().unsqueeze(1)).squeeze(0) / max(log_z.shape[0], 1)
    squares = log_z.masked_fill(~token_mask, 0).to(wide).square()
    return sum_tokens(squares.unsqueeze(1)).squeeze(0) / token_mask.sum().clamp(min=1)


class _AttachLoss(torch.autograd.Function):
    """Identity on ``output`` whose backward also sends ``scale`` into ``loss``."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, loss: Tensor, scale: Tensor) -> Tensor:
        # Not save_for_backward: a training loop may set the scale between forward and backward, and means the new
        # value.
        ctx.scale, ctx.loss_dtype = scale, loss.dtype
        return output.detach()  # shares memory, and is no view, which nobody could change in place

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad_output, ctx.scale.to(ctx.loss_dtype), None


def attach_loss(output: Tensor, loss: Tensor, scale: Tensor) -> Tensor:
    """Return ``output`` unchanged, such that its backward also adds the gradient of ``scale * loss``.

    Args:
        output: any tensor that takes part in the task's loss.
        loss: scalar with a graph.
        scale: scalar tensor: what the task's loss is multiplied by before backward (1, or a grad scaler's factor).
    """
    return _AttachLoss.apply(output, loss, scale)
