"""The router's auxiliary losses: pure functions of tensors, and the two ways a layer hands them over."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dmoe.sums import sum_tokens

# Names of MoEConfig.losses: those that compare router probabilities with loads, and those that are about logit noise.
BALANCE_LOSSES = ("load_balancing", "sequence", "global")
NOISE_LOSSES = ("importance", "load", "load_importance")


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
    """Mean over sequences, or groups, of each one's :func:`load_balancing_loss` (DeepSeek-V3, section 2.1.2).

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


def gshard_loss(router_probs: Tensor, first_choices_per_expert: Tensor) -> Tensor:
    """``E * sum_e(c_e / T * p_e)`` with both shares of all T tokens, also of those that were not routed.

    GShard's (Lepikhin et al. 2021, algorithm 1) as fairseq, DeepSpeed and Tutel compute it: padding that takes no
    expert counts in T and in the mean probability p. Without padding it is :func:`load_balancing_loss` of the first
    choices.

    Args:
        router_probs: ``(T, E)``. Carries the gradient.
        first_choices_per_expert: ``(E,)`` integer, T in all at most.

    Returns:
        A scalar in float32 (float64 for float64), dimensionless: 1 under even routing, 0 for no token.
    """
    num_tokens, num_experts = router_probs.shape
    wide = torch.promote_types(router_probs.dtype, torch.float32)
    mean = sum_tokens(router_probs, wide) / max(num_tokens, 1)
    return (mean * first_choices_per_expert.to(wide)).sum() * (num_experts / max(num_tokens, 1))


def importance_loss(router_probs: Tensor, token_groups: int = 1, token_mask: Tensor | None = None) -> Tensor:
    """Squared coefficient of variation of the experts' total probability (Shazeer et al. 2017, eq. 7; V-MoE, eq. 8).

    Args:
        router_probs: ``(T, E)``, without the noise that the choice was made under. Carries the gradient.
        token_groups: the mean of the losses of so many groups of consecutive tokens.
        token_mask: ``(T,)`` bool, True for tokens that count; None counts all.

    Returns:
        A scalar in float32 (float64 for float64), dimensionless: 0 when all experts weigh alike, E - 1 at most.
    """
    return _squared_variation(_group_sums(router_probs, token_groups, token_mask))


def load_loss(
    router_logits: Tensor,
    noisy_logits: Tensor,
    top_k: int,
    noise_std: float,
    token_groups: int = 1,
    token_mask: Tensor | None = None,
) -> Tensor:
    """Squared coefficient of variation of each expert's expected load under new noise (V-MoE, appendix A.2).

    The load of expert e is ``sum_t P(logit_te + noise >= threshold_t)``, with noise of standard deviation
    ``noise_std / E`` and the K-th largest noisy logit of the token as its threshold, through which gradient flows.

    Args:
        router_logits: ``(T, E)``, without noise. Carries the gradient.
        noisy_logits: ``(T, E)``, that experts were chosen by. Carries the gradient.
        top_k: K.
        noise_std: E times the standard deviation of the noise; positive.
        token_groups, token_mask: as for :func:`importance_loss`.

    Returns:
        A scalar in float32 (float64 for float64), dimensionless, as :func:`importance_loss`.
    """
    wide = torch.promote_types(router_logits.dtype, torch.float32)
    clean, noisy = router_logits.to(wide), noisy_logits.to(wide)
    return _squared_variation(_group_sums(_chance(clean, noisy, top_k, noise_std), token_groups, token_mask))


def load_importance_loss(router_logits: Tensor, noisy_logits: Tensor, top_k: int, noise_std: float) -> Tensor:
    """Tutel's ``load_importance_loss``: the mean of an importance and a load loss of its own making.

    Both are unbiased variance over squared mean (plus 1e-10). Importance sums the probabilities without noise. The
    load compares them, and not their logits, with the K-th largest noisy logit; that is what Tutel computes, and what
    GMoE was trained with.

    Args:
        router_logits: ``(T, E)``, without noise. Carries the gradient.
        noisy_logits: ``(T, E)``, that experts were chosen by; the same ones in evaluation. Carries the gradient.
        top_k: K.
        noise_std: E times the standard deviation of the noise; positive.

    Returns:
        A scalar in float32 (float64 for float64), dimensionless; 0 for a single expert.
    """
    wide = torch.promote_types(router_logits.dtype, torch.float32)
    if router_logits.shape[1] == 1:  # whose variance is no number
        return router_logits.sum(dtype=wide) * 0
    probs, noisy = torch.softmax(router_logits.to(wide), -1), noisy_logits.to(wide)

    def variation(total: Tensor) -> Tensor:
        return total.var() / (total.mean().square() + 1e-10)

    return (variation(sum_tokens(probs)) + variation(sum_tokens(_chance(probs, noisy, top_k, noise_std)))) / 2


def _chance(values: Tensor, noisy: Tensor, top_k: int, noise_std: float) -> Tensor:
    """The probability that a value under new noise reaches the K-th largest noisy logit of its token, ``(T, E)``."""
    threshold = noisy.topk(top_k, -1).values[:, -1:]
    return torch.special.ndtr((values - threshold) * (values.shape[1] / noise_std))


def _group_sums(values: Tensor, groups: int, mask: Tensor | None) -> Tensor:
    """``(T, E)`` to ``(G, E)``: sums over the tokens of each group that count."""
    num_tokens, num_experts = values.shape
    if num_tokens % groups:
        raise ValueError(f"token_groups: expected a divisor of the number of tokens, {num_tokens}, got {groups}")
    if mask is not None:
        values = values.masked_fill(~mask.unsqueeze(1), 0)
    wide = torch.promote_types(values.dtype, torch.float32)
    return sum_tokens(values.view(groups, num_tokens // groups, num_experts), wide)


def _squared_variation(totals: Tensor) -> Tensor:
    """Mean over groups of variance / mean ** 2 over the experts, ``(G, E)`` to a scalar; a group of zeros adds 0."""
    mean = totals.mean(1)
    ratio = totals.var(1, unbiased=False) / mean.square().clamp(min=torch.finfo(totals.dtype).tiny)
    return ratio.mean()


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    coefficient: float = 1.0,
    step: int = 0,
    stop_step: int | None = None,
    seq_length: int | None = None,
) -> Tensor:
    """Staged distillation's term of the loss: ``coefficient * tau ** 2 * mean over tokens of KL(teacher || student)``.

    Both distributions are softened by ``tau = temperature``. Until ``stop_step``, and 0 from there on: the
    student ends on the task's loss alone (MoS: Rajbhandari et al. 2022, section 4.2; the loss is that of
    Megatron-DeepSpeed's ``calculate_mos_loss``).

    Args:
        student_logits: ``(..., V)`` floating point. Carries the gradient.
        teacher_logits: the same shape; a constant.
        temperature: tau, positive.
        coefficient: beta, at least 0.
        step: of training, counted from 0.
        stop_step: the first step without distillation; None never stops.
        seq_length: what the sum over the tokens of a sequence, dimension -2, is divided by instead of their number;
            Megatron-DeepSpeed divides by the whole length also where a curriculum cuts sequences short.

    Returns:
        A scalar in float32 (float64 for float64), nats times tau squared.

    Raises:
        ValueError: shapes that differ, or numbers out of range.
    """
    if student_logits.shape != teacher_logits.shape or student_logits.dim() < 1:
        raise ValueError(
            f"distillation_loss: teacher_logits: expected the student's shape {tuple(student_logits.shape)}, got "
            f"{tuple(teacher_logits.shape)}"
        )
    if not temperature > 0:
        raise ValueError(f"distillation_loss: temperature: expected a positive number, got {temperature}")
    if not coefficient >= 0:
        raise ValueError(f"distillation_loss: coefficient: expected at least 0, got {coefficient}")
    if seq_length is not None and (seq_length < 1 or student_logits.dim() < 2):
        raise ValueError(
            f"distillation_loss: seq_length: expected at least 1, for (..., S, V) logits, got {seq_length}"
        )
    wide = torch.promote_types(student_logits.dtype, torch.float32)
    if not coefficient or (stop_step is not None and step >= stop_step) or not student_logits.numel():
        return student_logits.sum(dtype=wide) * 0
    student = torch.log_softmax(student_logits.to(wide) / temperature, -1)
    teacher = torch.log_softmax(teacher_logits.detach().to(wide) / temperature, -1)
    total = torch.nn.functional.kl_div(student, teacher, log_target=True, reduction="sum")
    tokens = student_logits.numel() // student_logits.shape[-1]
    if seq_length is not None:
        tokens = tokens // student_logits.shape[-2] * seq_length
    return total * (coefficient * temperature**2 / tokens)


class _AttachLoss(torch.autograd.Function):
    """Identity on ``output`` whose backward also sends ``scale`` into ``loss``, and notes the loss."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, loss: Tensor, scale: Tensor, record: Tensor | None) -> Tensor:
        # Not save_for_backward: a training loop may set the scale between forward and backward, and means the new
        # value.
        ctx.scale, ctx.record, ctx.loss_dtype = scale, record, loss.dtype
        ctx.save_for_backward(loss.detach())
        return output.detach()  # shares memory, and is no view, which nobody could change in place

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (loss,) = ctx.saved_tensors
        if ctx.record is not None:
            ctx.record[0] += loss
            ctx.record[1] += 1
        return grad_output, ctx.scale.to(ctx.loss_dtype), None, None


def attach_loss(output: Tensor, loss: Tensor, scale: Tensor, record: Tensor | None = None) -> Tensor:
    """Return ``output`` unchanged, such that its backward also adds the gradient of ``scale * loss``.

    Args:
        output: any tensor that takes part in the task's loss.
        loss: scalar with a graph.
        scale: scalar tensor: what the task's loss is multiplied by before backward (1, or a grad scaler's factor).
        record: ``(2,)`` floating point, to which each backward adds the loss, without the scale, and 1; None: nowhere.
    """
    return _AttachLoss.apply(output, loss, scale, record)
