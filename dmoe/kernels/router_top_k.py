"""The router behind its linear: scores, selection and gate weights of a few tokens per program, and their gradient.

A program holds all scores of its tokens. Their columns are groups of experts, each padded to a power of two, so that a
group's best can be found by a reduction. Experts are compared as 64-bit integers: a score's bits, in an order that
integers share, above the expert's id, lowest first. So keys never tie, and NaN has its place: above every number.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dmoe.kernels._launch import launch

_TILE = 2048  # scores that a program holds, as long as one token has fewer
_NO_KEY = tl.constexpr(-(2**63))  # below every key


@triton.jit
def _exp(x):
    """``exp(x)`` for x <= 0 to a few ulp; ``tl.exp`` rounds ``x * log2(e)``, which costs |x| ulp."""
    x = tl.where(x < -104.0, -104.0, x)  # exp(-104) is 0 in float32; NaN stays
    whole = tl.floor(x * 1.4426950408889634 + 0.5)
    rest = (x - whole * 0.693359375) + whole * 2.1219444005469057e-4  # ln 2 in two parts: the first product is exact
    return tl.exp2(rest * 1.4426950408889634) * tl.exp2(whole)


@triton.jit
def _score(logits, largest, total, SOFTMAX: tl.constexpr):
    """Scores of logits whose row has this largest element and this sum of ``exp(logit - largest)``."""
    if SOFTMAX:
        return _exp(logits - largest) / total
    decay = _exp(-tl.abs(logits))
    return tl.where(logits >= 0, 1.0, decay) / (1.0 + decay)


@triton.jit
def _key(value, ids):
    """Sorts as (value, lowest id first), NaN above every number. Scores are never -0, so neither are these values."""
    bits = value.to(tl.int32, bitcast=True)
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    order = tl.where(value != value, 0x7FFFFFFF, order)
    return (order.to(tl.int64) << 32) | (ids ^ 0x7FFFFFFF).to(tl.int64)  # a lower id makes a larger key


@triton.jit
def _value(key):
    """The value in a key."""
    order = (key >> 32).to(tl.int32)
    return tl.where(order < 0, order ^ 0x7FFFFFFF, order).to(tl.float32, bitcast=True)


@triton.jit
def _norm(picked, p, NORM: tl.constexpr):
    """The p-norm of each row, never 0. NORM: 1 and 2 say what p is, 3 says anything else."""
    largest = tl.max(picked, 1)
    # Powers of small scores would underflow. The number (2**-126) stands here because Triton 3.6 hashes a global that
    # only a called function uses into its caller or not, by what was hashed before: a kernel would not be found again.
    largest = tl.where(largest > 1.1754943508222875e-38, largest, 1.1754943508222875e-38)
    share = picked / largest[:, None]
    if NORM == 1:
        norm = tl.sum(share, 1)
    elif NORM == 2:
        norm = tl.sqrt(tl.sum(share * share, 1))
    else:
        norm = tl.exp2(tl.log2(tl.sum(tl.exp2(tl.log2(share) * p), 1)) / p)
    return largest * tl.where(norm < 1, 1.0, norm)


@triton.jit
def _keep_best_groups(key, ids, num_groups, kept_groups, TOP2: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr):
    """Keys with the value -inf outside the best groups of each token; a group ranks by its best, or its two best."""
    TOKENS: tl.constexpr = key.shape[0]
    members = tl.reshape(key, (TOKENS, GROUPS, GROUP))
    best = tl.max(members, 2)
    rank = _value(best)
    if TOP2:
        rank += _value(tl.max(tl.where(members == best[:, :, None], _NO_KEY, members), 2))
    group = tl.arange(0, GROUPS)[None, :]
    group_key = tl.where(group < num_groups, _key(rank, group), _NO_KEY)
    keep = tl.zeros((TOKENS, GROUPS), tl.int32)
    for _ in range(kept_groups):
        won = group_key == tl.max(group_key, 1)[:, None]
        keep = tl.where(won, 1, keep)
        group_key = tl.where(won, _NO_KEY, group_key)
    keep = tl.reshape(tl.broadcast_to(keep[:, :, None], (TOKENS, GROUPS, GROUP)), (TOKENS, GROUPS * GROUP))
    last = _key(tl.full((TOKENS, GROUPS * GROUP), float("-inf"), tl.float32), ids)
    return tl.where((keep == 1) | (key == _NO_KEY), key, last)


@triton.jit(do_not_specialize=["num_tokens"])
def router_top_k_kernel(
    logits,
    selection_bias,
    token_mask,
    given,
    scores,
    log_z,
    expert_indices,
    gate_weights,
    first_counts,
    num_tokens,
    num_experts,
    top_k,
    num_groups,
    group_size,
    kept_groups,
    p,
    scale,
    SOFTMAX: tl.constexpr,
    LOG_Z: tl.constexpr,
    BIASED: tl.constexpr,
    MASKED: tl.constexpr,
    REPLAY: tl.constexpr,
    COUNT_FIRST: tl.constexpr,
    LIMITED: tl.constexpr,
    TOP2: tl.constexpr,
    NORM: tl.constexpr,
    TOKENS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    CHOICES: tl.constexpr,
):
    """TOKENS tokens, whole: scores (T, E), log_z (T,), chosen ids and weights (T, K), counts of first choices."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    here = (token < num_tokens)[:, None]
    row = tl.minimum(token, num_tokens - 1).to(tl.int64)[
        :, None
    ]  # behind the end: the last token once more, not stored
    column = tl.arange(0, GROUPS * GROUP)[None, :]
    expert = column // GROUP * group_size + column % GROUP
    real = (column % GROUP < group_size) & (column // GROUP < num_groups)
    choice = tl.arange(0, CHOICES)[None, :]

    x = tl.load(logits + row * num_experts + expert, mask=real, other=float("-inf"))
    largest = tl.max(x, 1)[:, None]
    total = largest
    if SOFTMAX or LOG_Z:
        total = tl.sum(_exp(x - largest), 1)[:, None]
    if LOG_Z:
        z = tl.where(tl.abs(largest) == float("inf"), largest, largest + tl.log(total))
        z = tl.where(tl.max((x != x).to(tl.int32), 1)[:, None] == 1, float("nan"), z)
        tl.store(log_z + row, z, mask=here)
    score = _score(x, largest, total, SOFTMAX)
    tl.store(scores + row * num_experts + expert, score, mask=here & real)

    if REPLAY:
        wanted = tl.load(given + row * top_k + choice, mask=choice < top_k, other=-1).to(tl.int64)
        chosen = tl.where((wanted < 0) | (wanted > num_experts), num_experts, wanted).to(tl.int32)
    else:
        value = score
        if BIASED:
            value += tl.load(selection_bias + expert, mask=real, other=0.0)
        key = tl.where(real, _key(value, expert), _NO_KEY)
        if LIMITED:
            key = _keep_best_groups(key, expert, num_groups, kept_groups, TOP2, GROUPS, GROUP)
        chosen = tl.zeros((TOKENS, CHOICES), tl.int32) + num_experts
        for k in range(top_k):
            best = tl.max(key, 1)[:, None]
            chosen = tl.where(choice == k, (best & 0x7FFFFFFF).to(tl.int32) ^ 0x7FFFFFFF, chosen)
            key = tl.where(key == best, _NO_KEY, key)
    if MASKED:
        chosen = tl.where(tl.load(token_mask + row) != 0, chosen, num_experts)
    stored = here & (choice < top_k)
    tl.store(expert_indices + row * top_k + choice, chosen.to(tl.int64), mask=stored)
    if COUNT_FIRST:
        counted = stored & (choice == 0) & (chosen < num_experts)
        tl.atomic_add(first_counts + chosen, 1, mask=counted, sem="relaxed")

    # The chosen logits are read again: that is cheaper than to find their scores among the others.
    weighed = (choice < top_k) & (chosen < num_experts)
    again = tl.load(logits + row * num_experts + chosen, mask=weighed, other=0.0)
    picked = tl.where(weighed, _score(again, largest, total, SOFTMAX), 0.0)
    weight = picked * scale
    if NORM != 0:
        weight = weight / _norm(picked, p, NORM)[:, None]
    tl.store(gate_weights + row * top_k + choice, weight, mask=stored)


@triton.jit(do_not_specialize=["num_tokens"])
def router_top_k_backward_kernel(
    grad_scores,
    grad_log_z,
    grad_weights,
    scores,
    logits,
    expert_indices,
    grad_logits,
    num_tokens,
    num_experts,
    top_k,
    p,
    scale,
    SOFTMAX: tl.constexpr,
    GRAD_SCORES: tl.constexpr,
    GRAD_LOG_Z: tl.constexpr,
    GRAD_WEIGHTS: tl.constexpr,
    NORM: tl.constexpr,
    TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr,
    CHOICES: tl.constexpr,
):
    """Gradient of TOKENS tokens' logits, from those of scores, log_z and weights: the formulas of the operations."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    row = tl.minimum(token, num_tokens - 1).to(tl.int64)[:, None]
    expert = tl.arange(0, EXPERTS)[None, :]
    real = expert < num_experts
    at = row * num_experts + expert

    score = tl.load(scores + at, mask=real, other=0.0)
    grad = tl.zeros((TOKENS, EXPERTS), tl.float32)
    if GRAD_SCORES:
        grad = tl.load(grad_scores + at, mask=real, other=0.0)
    if GRAD_WEIGHTS:
        if NORM != 0:
            choice = tl.arange(0, CHOICES)[None, :]
            slot = row * top_k + choice
            chosen = tl.load(expert_indices + slot, mask=choice < top_k, other=num_experts)
            picked = tl.load(scores + row * num_experts + chosen, mask=chosen < num_experts, other=0.0)
            given = tl.load(grad_weights + slot, mask=chosen < num_experts, other=0.0) * scale
            norm = _norm(picked, p, NORM)[:, None]
            share = tl.sum(given * picked, 1)[:, None] / norm
        for k in range(top_k):
            chosen_k = tl.load(expert_indices + row * top_k + k)
            add = tl.load(grad_weights + row * top_k + k) * scale
            if NORM != 0:
                ratio = tl.load(scores + row * num_experts + chosen_k, mask=chosen_k < num_experts, other=0.0) / norm
                if NORM == 1:
                    add -= share
                elif NORM == 2:
                    add -= share * ratio
                else:
                    add -= share * tl.exp2(tl.log2(ratio) * (p - 1))
                add = add / norm
            grad += tl.where((expert == chosen_k) & real, add, 0.0)  # id E is a padding column

    slope = grad * (1.0 - score)
    if SOFTMAX:
        slope = grad - tl.sum(score * grad, 1)[:, None]
    result = score * slope
    if GRAD_LOG_Z:
        probability = score
        if not SOFTMAX:
            x = tl.load(logits + at, mask=real, other=float("-inf"))
            powers = _exp(x - tl.max(x, 1)[:, None])
            probability = powers / tl.sum(powers, 1)[:, None]
        result += tl.load(grad_log_z + row) * probability
    tl.store(grad_logits + at, result, mask=real & (token < num_tokens)[:, None])


def _tile(columns: int) -> tuple[int, int]:
    """Tokens of a program, and its warps."""
    return max(1, min(_TILE // columns, 64)), 4 if columns <= _TILE else 8


def _norm_kind(p: float) -> int:
    return int(p) if p in (0, 1, 2) else 3


def launch_router_top_k(
    logits: Tensor,
    selection_bias: Tensor | None,
    token_mask: Tensor | None,
    expert_indices: Tensor | None,
    scores: Tensor,
    log_z: Tensor | None,
    chosen: Tensor,
    gate_weights: Tensor,
    first_counts: Tensor | None,
    *,
    score_function: str,
    num_groups: int,
    top_k_groups: int,
    group_score: str,
    normalization: float,
    scale: float,
) -> None:
    """Fill ``scores (T, E)``, ``log_z (T,)``, ``chosen (T, K)`` int64 and ``gate_weights (T, K)``; add to the counts.

    Everything is contiguous; floating-point tensors are float32. What is None is not read or not written.
    """
    num_tokens, num_experts = logits.shape
    top_k = chosen.shape[1]
    limited = top_k_groups < num_groups
    num_groups = num_groups if limited else 1
    group_size = num_experts // num_groups
    groups, group = triton.next_power_of_2(num_groups), triton.next_power_of_2(group_size)
    tokens, warps = _tile(groups * group)
    launch(
        router_top_k_kernel,
        (triton.cdiv(num_tokens, tokens),),
        logits,
        selection_bias,
        token_mask,
        expert_indices,
        scores,
        log_z,
        chosen,
        gate_weights,
        first_counts,
        num_tokens,
        num_experts,
        top_k,
        num_groups,
        group_size,
        top_k_groups,
        normalization,
        scale,
        SOFTMAX=score_function == "softmax",
        LOG_Z=log_z is not None,
        BIASED=selection_bias is not None,
        MASKED=token_mask is not None,
        REPLAY=expert_indices is not None,
        COUNT_FIRST=first_counts is not None,
        LIMITED=limited,
        TOP2=group_score == "top2_sum" and group_size > 1,
        NORM=_norm_kind(normalization),
        TOKENS=tokens,
        GROUPS=groups,
        GROUP=group,
        CHOICES=triton.next_power_of_2(top_k),
        num_warps=warps,
        num_stages=1,
    )


def launch_router_top_k_backward(
    grad_scores: Tensor | None,
    grad_log_z: Tensor | None,
    grad_weights: Tensor | None,
    scores: Tensor,
    logits: Tensor | None,
    expert_indices: Tensor,
    grad_logits: Tensor,
    *,
    score_function: str,
    normalization: float,
    scale: float,
) -> None:
    """Fill ``grad_logits (T, E)`` from the gradients that are not None; ``logits`` for log_z's under sigmoid."""
    num_tokens, num_experts = scores.shape
    experts = triton.next_power_of_2(num_experts)
    tokens, warps = _tile(experts)
    launch(
        router_top_k_backward_kernel,
        (triton.cdiv(num_tokens, tokens),),
        grad_scores,
        grad_log_z,
        grad_weights,
        scores,
        logits,
        expert_indices,
        grad_logits,
        num_tokens,
        num_experts,
        expert_indices.shape[1],
        normalization,
        scale,
        SOFTMAX=score_function == "softmax",
        GRAD_SCORES=grad_scores is not None,
        GRAD_LOG_Z=grad_log_z is not None,
        GRAD_WEIGHTS=grad_weights is not None,
        NORM=_norm_kind(normalization),
        TOKENS=tokens,
        EXPERTS=experts,
        CHOICES=triton.next_power_of_2(expert_indices.shape[1]),
        num_warps=warps,
        num_stages=1,
    )
