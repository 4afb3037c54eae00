"""``router_top_k``: everything between a router's logits and its plan, as one differentiable operation.

Scores, selection (with bias, in the best groups), token mask, gate weights and, where a loss wants them, the
log-partition and the counts of first choices. In half precision, under ``backend="reference"`` and where gate weights
need the plan first, the separate operations serve: :func:`router_scores`, :func:`topk_indices`, :func:`gate_weights`,
:func:`histogram`. On CUDA (float32 alone) the whole is one launch, and its gradient another; on the CPU, with
``csrc/``, one pass over the logits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dmoe.ops._checks import check_integer
from dmoe.ops._library import define, has_kernel, on_gpu, refuse_double_backward, register_autograd
from dmoe.ops._trust import Subject
from dmoe.ops.gate_weights import gate_weights, gate_weights_backward_ref
from dmoe.ops.histogram import histogram
from dmoe.ops.router_scores import router_scores, router_scores_backward_ref
from dmoe.ops.topk_indices import topk_indices

_MOST_EXPERTS = 4096  # whose scores fit in one program's registers


class TopKRule(NamedTuple):
    """How experts are scored, chosen and weighed.

    Attributes:
        top_k: K, chosen experts of a token.
        score_function: of :func:`dmoe.ops.router_scores.router_scores`.
        num_groups: the experts stand in so many groups of equal size.
        top_k_groups: a token chooses inside its so many best groups; ``num_groups`` for no limit.
        group_score: a group ranks by its best expert (``max``) or by the sum of its two best (``top2_sum``).
        normalization: p of the p-norm that gate weights are divided by; 0 for none.
        scale: factor of the gate weights.
    """

    top_k: int
    score_function: str = "softmax"
    num_groups: int = 1
    top_k_groups: int = 1
    group_score: str = "top2_sum"
    normalization: float = 0.0
    scale: float = 1.0


class RouterChoice(NamedTuple):
    """What :func:`router_top_k` returns.

    Attributes:
        scores: ``(T, E)``. Carries the gradient.
        log_z: ``logsumexp`` of the logits, ``(T,)``, or None. Carries the gradient.
        expert_indices: ``(T, K)`` integer, best first; E where masked.
        gate_weights: ``(T, K)``, 0 where masked, or None. Carries the gradient.
        first_choices_per_expert: tokens whose first choice each expert is, ``(E,)`` int32, or None.
    """

    scores: Tensor
    log_z: Tensor | None
    expert_indices: Tensor
    gate_weights: Tensor | None
    first_choices_per_expert: Tensor | None


def select_experts(scores: Tensor, rule: TopKRule, selection_bias: Tensor | None = None) -> Tensor:
    """The K chosen experts of each token, ``(T, K)`` int64, best first; ties take the lowest id.

    Args:
        scores: ``(T, E)``.
        rule: K and the groups.
        selection_bias: ``(E,)``, added to the scores for the choice alone; None for none.
    """
    scores = scores.detach()
    if selection_bias is not None:
        scores = scores + selection_bias.to(scores.dtype)
    if rule.top_k_groups < rule.num_groups:
        grouped = scores.view(scores.shape[0], rule.num_groups, scores.shape[1] // rule.num_groups)
        best = 2 if rule.group_score == "top2_sum" and grouped.shape[2] > 1 else 1
        rank = grouped.topk(best, dim=-1).values.sum(-1)
        kept = torch.zeros_like(rank, dtype=torch.bool).scatter_(1, topk_indices(rank, rule.top_k_groups), True)
        scores = grouped.masked_fill(~kept.unsqueeze(-1), -torch.inf).view(scores.shape)
    return topk_indices(scores, rule.top_k)


def _separately(
    logits: Tensor,
    rule: TopKRule,
    selection_bias: Tensor | None,
    token_mask: Tensor | None,
    expert_indices: Tensor | None,
    *,
    with_log_z: bool,
    with_weights: bool,
    count_first: bool,
    backend: str | None,
    batch_invariant: bool = False,
) -> RouterChoice:
    num_experts = logits.shape[1]
    scores, log_z = router_scores(
        logits, rule.score_function, with_log_z=with_log_z, backend=backend, batch_invariant=batch_invariant
    )
    chosen = select_experts(scores, rule, selection_bias) if expert_indices is None else expert_indices
    if token_mask is not None:
        chosen = chosen.masked_fill(~token_mask.unsqueeze(1), num_experts)
    weights = first = None
    if with_weights:
        norm = rule.normalization or None
        weights = gate_weights(scores, chosen, normalization=norm, scale=rule.scale, backend=backend)
    if count_first:
        first = histogram(chosen[:, 0].contiguous(), num_experts + 1)[:-1]  # the last bin: masked tokens
    return RouterChoice(scores, log_z, chosen, weights, first)


_Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def router_top_k_ref(
    logits: Tensor,
    selection_bias: Tensor | None,
    token_mask: Tensor | None,
    expert_indices: Tensor | None,
    with_log_z: bool,
    count_first: bool,
    *rule: Any,
) -> _Results:
    """The plain-PyTorch meaning of the fused operation; what was not asked for is empty."""
    found = _separately(
        logits,
        TopKRule(*rule),
        selection_bias,
        token_mask,
        expert_indices,
        with_log_z=with_log_z,
        with_weights=True,
        count_first=count_first,
        backend="reference",
    )
    assert found.gate_weights is not None
    chosen = found.expert_indices.to(torch.int64, copy=found.expert_indices is expert_indices)
    log_z, first = found.log_z, found.first_choices_per_expert
    return (
        found.scores,
        logits.new_empty(0) if log_z is None else log_z,
        chosen,
        found.gate_weights,
        chosen.new_empty(0, dtype=torch.int32) if first is None else first.clone(),
    )


def _fake(
    logits: Tensor,
    selection_bias: Tensor | None,
    token_mask: Tensor | None,
    expert_indices: Tensor | None,
    with_log_z: bool,
    count_first: bool,
    top_k: int,
    *_: Any,
) -> _Results:
    num_tokens, num_experts = logits.shape
    return (
        logits.new_empty(num_tokens, num_experts),
        logits.new_empty(num_tokens if with_log_z else 0),
        logits.new_empty((num_tokens, top_k), dtype=torch.int64),
        logits.new_empty(num_tokens, top_k),
        logits.new_empty((num_experts if count_first else 0,), dtype=torch.int32),
    )


def router_top_k_cuda(
    logits: Tensor,
    selection_bias: Tensor | None,
    token_mask: Tensor | None,
    expert_indices: Tensor | None,
    with_log_z: bool,
    count_first: bool,
    *rule: Any,
) -> _Results:
    """The same in one launch; float32 only. A replayed id outside [0, E] counts as E, which takes no expert."""
    from dmoe.kernels.router_top_k import launch_router_top_k

    how = TopKRule(*rule)
    results = _fake(logits, selection_bias, token_mask, expert_indices, with_log_z, count_first, *rule)
    scores, log_z, chosen, weights, first = results
    launch_router_top_k(
        logits.contiguous(),
        None if selection_bias is None else selection_bias.float().contiguous(),
        None if token_mask is None else token_mask.contiguous(),
        None if expert_indices is None else expert_indices.contiguous(),
        scores,
        log_z if with_log_z else None,
        chosen,
        weights,
        first.zero_() if count_first else None,
        score_function=how.score_function,
        num_groups=how.num_groups,
        top_k_groups=how.top_k_groups,
        group_score=how.group_score,
        normalization=float(how.normalization),
        scale=float(how.scale),
    )
    return results


def router_top_k_backward_ref(
    grad_scores: Tensor | None,
    grad_log_z: Tensor | None,
    grad_weights: Tensor | None,
    scores: Tensor,
    logits: Tensor | None,
    expert_indices: Tensor,
    score_function: str,
    normalization: float,
    scale: float,
) -> Tensor:
    """Gradient of the logits, ``(T, E)``; ``logits`` are needed for log_z's under sigmoid scores only."""
    total = torch.zeros_like(scores) if grad_scores is None else grad_scores
    if grad_weights is not None:
        total = total + gate_weights_backward_ref(
            grad_weights, scores, expert_indices, None, normalization, False, scale
        )
    return router_scores_backward_ref(total, grad_log_z, scores, logits, score_function)


def router_top_k_backward_cuda(
    grad_scores: Tensor | None,
    grad_log_z: Tensor | None,
    grad_weights: Tensor | None,
    scores: Tensor,
    logits: Tensor | None,
    expert_indices: Tensor,
    score_function: str,
    normalization: float,
    scale: float,
) -> Tensor:
    """The same in one launch; float32 only."""
    from dmoe.kernels.router_top_k import launch_router_top_k_backward

    grad_logits = scores.new_empty(scores.shape)
    launch_router_top_k_backward(
        None if grad_scores is None else grad_scores.contiguous(),
        None if grad_log_z is None else grad_log_z.contiguous(),
        None if grad_weights is None else grad_weights.contiguous(),
        scores,
        None if logits is None else logits.contiguous(),
        expert_indices,
        grad_logits,
        score_function=score_function,
        normalization=float(normalization),
        scale=float(scale),
    )
    return grad_logits


_forward = define(
    "router_top_k(Tensor logits, Tensor? selection_bias, Tensor? token_mask, Tensor? expert_indices, bool with_log_z, "
    "bool count_first, int top_k, str score_function, int num_groups, int top_k_groups, str group_score, "
    "float normalization, float scale) -> (Tensor scores, Tensor log_z, Tensor expert_indices, Tensor gate_weights, "
    "Tensor first_choices_per_expert)",
    router_top_k_ref,
    fake=_fake,
    cuda=router_top_k_cuda,
    subjects=lambda *arguments: [Subject("router_top_k", arguments)] if arguments[0].numel() else [],
)
_backward = define(
    "router_top_k_backward(Tensor? grad_scores, Tensor? grad_log_z, Tensor? grad_weights, Tensor scores, "
    "Tensor? logits, Tensor expert_indices, str score_function, float normalization, float scale) -> Tensor",
    router_top_k_backward_ref,
    fake=lambda grad_scores, grad_log_z, grad_weights, scores, *_: scores.new_empty(scores.shape),
    cuda=router_top_k_backward_cuda,
    subjects=lambda *arguments: [Subject("router_top_k_backward", arguments)] if arguments[3].numel() else [],
)
refuse_double_backward(_backward)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: _Results) -> None:
    logits, _, _, _, with_log_z, _, *rule = inputs
    how = TopKRule(*rule)
    ctx.set_materialize_grads(False)  # most calls use one or two of the results
    ctx.with_log_z, ctx.options = with_log_z, (how.score_function, how.normalization, how.scale)
    needs_logits = with_log_z and how.score_function != "softmax"
    ctx.save_for_backward(output[0], logits if needs_logits else None, output[2])


def _autograd(
    ctx: Any, grad_scores: Tensor | None, grad_log_z: Tensor | None, _: None, grad_weights: Tensor | None, __: None
) -> tuple[Tensor | None, ...]:
    grad_log_z = grad_log_z if ctx.with_log_z else None
    return _backward(grad_scores, grad_log_z, grad_weights, *ctx.saved_tensors, *ctx.options), *([None] * 12)


register_autograd(_forward, _autograd, _setup_context)


_IN_ONE_PASS = has_kernel("router_top_k", "CPU")


def _fits_one_launch(logits: Tensor) -> bool:
    if logits.device.type == "cpu" and not on_gpu(logits):
        return _IN_ONE_PASS and logits.dtype in (torch.float32, torch.float64)
    return on_gpu(logits) and logits.dtype == torch.float32 and logits.shape[1] <= _MOST_EXPERTS


def router_top_k(
    router_logits: Tensor,
    rule: TopKRule,
    *,
    selection_bias: Tensor | None = None,
    token_mask: Tensor | None = None,
    expert_indices: Tensor | None = None,
    with_log_z: bool = False,
    with_weights: bool = True,
    count_first: bool = False,
    backend: str | None = None,
    batch_invariant: bool = False,
) -> RouterChoice:
    """Score, choose and weigh the experts of every token.

    A row with a NaN, or with +inf under softmax, scores NaN and goes to the lowest ids; no other row is touched.

    Args:
        router_logits: ``(T, E)`` floating point.
        rule: how; its numbers are not checked here.
        selection_bias: ``(E,)`` floating point, added to the scores for the choice alone.
        token_mask: ``(T,)`` bool; False takes no expert.
        expert_indices: ``(T, K)`` integer in [0, E]: take these instead of the best; a token's are distinct, or E.
        with_log_z: also return ``logsumexp`` of each row.
        with_weights: also return gate weights, normalised over all choices (a plan's drops come later).
        count_first: also count first choices.
        backend: ``reference`` for plain PyTorch under its own autograd, differentiable twice.
        batch_invariant: see :func:`router_scores`.

    Raises:
        TypeError: logits that are not floating point, or ``expert_indices`` that are not int32 or int64.
        ValueError: logits or a score function that :func:`router_scores` refuses.
    """
    if expert_indices is not None:
        check_integer("router_top_k", expert_indices=expert_indices)
    known = rule.score_function in ("softmax", "sigmoid")  # to the kernel
    if (
        not with_weights
        or backend == "reference"
        or batch_invariant
        or not known
        or not _fits_one_launch(router_logits)
    ):
        return _separately(
            router_logits,
            rule,
            selection_bias,
            token_mask,
            expert_indices,
            with_log_z=with_log_z,
            with_weights=with_weights,
            count_first=count_first,
            backend=backend,
            batch_invariant=batch_invariant,
        )
    if selection_bias is not None:
        selection_bias = selection_bias.float()
    scores, log_z, chosen, weights, first = _forward(
        router_logits, selection_bias, token_mask, expert_indices, with_log_z, count_first, *rule
    )
    return RouterChoice(scores, log_z if with_log_z else None, chosen, weights, first if count_first else None)
