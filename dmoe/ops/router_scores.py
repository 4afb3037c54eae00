"""``router_scores``: logits to scores and, when a loss wants it, the log-partition.

One operation, so that what is saved is one ``(T, E)`` tensor: all functions are differentiated from their results. Only
the z-loss of a router without softmax needs the logits as well.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dmoe.ops._checks import check_floating
from dmoe.ops._library import define, refuse_double_backward, register_autograd

SCORE_FUNCTIONS = ("softmax", "sigmoid", "sqrt_softplus")


def _sqrt_softplus(logits: Tensor) -> Tensor:
    """``sqrt(ln(1 + e^x))``; where e^x is small beside 1, its root ``e^(x / 2)``, which does not underflow as soon."""
    low = logits < math.log(torch.finfo(logits.dtype).eps)
    root = torch.nn.functional.softplus(logits.masked_fill(low, 0)).sqrt()
    return torch.where(low, (logits.masked_fill(~low, 0) / 2).exp(), root)


def _exp_of_negative(logits: Tensor) -> Tensor:
    """``e^-|x|``, of which the functions below are made where bits must not depend on an element's place.

    PyTorch computes the last few elements of a tensor, or of a thread's share, one by one, and there ``sigmoid``,
    ``softplus`` and ``pow`` round otherwise than in its vectors. Single sums and products are rounded once in any way,
    and ``exp``, ``expm1``, ``log1p`` and ``tanh`` fill a vector for the last elements, too.
    """
    return (-logits.abs()).exp()


def _sigmoid_by_element(logits: Tensor) -> Tensor:
    small = _exp_of_negative(logits)
    return torch.where(logits < 0, small, torch.ones_like(small)) / (1 + small)


def _sqrt_softplus_by_element(logits: Tensor) -> Tensor:
    low = logits < math.log(torch.finfo(logits.dtype).eps)
    root = (logits.clamp(min=0) + torch.log1p(_exp_of_negative(logits))).sqrt()
    return torch.where(low, (logits.masked_fill(~low, 0) / 2).exp(), root)


def _sqrt_softplus_slope(scores: Tensor) -> Tensor:
    """``sigmoid(x) / (2 y)`` from y alone: sigmoid(x) = 1 - exp(-y^2), which is y^2 where y is small."""
    squares = scores.square()
    small = squares < torch.finfo(scores.dtype).eps
    return torch.where(small, scores / 2, -torch.expm1(-squares) / (2 * scores.masked_fill(small, 1)))


def router_scores_ref(logits: Tensor, score_function: str, with_log_z: bool) -> tuple[Tensor, Tensor]:
    """The plain-PyTorch meaning of :func:`router_scores`."""
    if score_function == "softmax":
        scores = torch.softmax(logits, -1)
    elif score_function == "sigmoid":
        scores = torch.sigmoid(logits)
    else:
        scores = _sqrt_softplus(logits)
    return scores, torch.logsumexp(logits, -1) if with_log_z else logits.new_empty(0)


def router_scores_invariant_ref(logits: Tensor, score_function: str, with_log_z: bool) -> tuple[Tensor, Tensor]:
    """:func:`router_scores_ref` with the same bits for a token in any batch; softmax and logsumexp have them."""
    if score_function == "softmax":
        return router_scores_ref(logits, score_function, with_log_z)
    scores = (_sigmoid_by_element if score_function == "sigmoid" else _sqrt_softplus_by_element)(logits)
    return scores, torch.logsumexp(logits, -1) if with_log_z else logits.new_empty(0)


def router_scores_backward_ref(
    grad_scores: Tensor, grad_log_z: Tensor | None, scores: Tensor, logits: Tensor | None, score_function: str
) -> Tensor:
    """Gradient of the logits."""
    if score_function == "softmax":
        grad = torch.ops.aten._softmax_backward_data(grad_scores, scores, -1, scores.dtype)
        probs = scores
    else:
        if score_function == "sigmoid":
            # Not aten's, which fuses a product and a sum in float64, for the last elements only.
            grad = grad_scores * (scores * (1 - scores))
        else:
            grad = grad_scores * _sqrt_softplus_slope(scores)
        probs = scores if logits is None else torch.softmax(logits, -1)
    return grad if grad_log_z is None else grad + grad_log_z.unsqueeze(-1) * probs


_forward = define(
    "router_scores(Tensor logits, str score_function, bool with_log_z) -> (Tensor, Tensor)",
    router_scores_ref,
    fake=lambda logits, score_function, with_log_z: (
        logits.new_empty(logits.shape),
        logits.new_empty(logits.shape[0] if with_log_z else 0),
    ),
)
_backward = define(
    "router_scores_backward(Tensor grad_scores, Tensor? grad_log_z, Tensor scores, Tensor? logits, str score_function)"
    " -> Tensor",
    router_scores_backward_ref,
    fake=lambda grad_scores, grad_log_z, scores, logits, score_function: scores.new_empty(scores.shape),
)
refuse_double_backward(_backward)
_invariant = define(
    "router_scores_invariant(Tensor logits, str score_function, bool with_log_z) -> (Tensor, Tensor)",
    router_scores_invariant_ref,
    fake=lambda logits, score_function, with_log_z: (
        logits.new_empty(logits.shape),
        logits.new_empty(logits.shape[0] if with_log_z else 0),
    ),
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, ctx.score_function, ctx.with_log_z = inputs
    needs_logits = ctx.with_log_z and ctx.score_function != "softmax"
    ctx.save_for_backward(output[0], logits if needs_logits else None)


def _autograd(ctx: Any, grad_scores: Tensor, grad_log_z: Tensor) -> tuple[Tensor, None, None]:
    scores, logits = ctx.saved_tensors
    grad = _backward(grad_scores, grad_log_z if ctx.with_log_z else None, scores, logits, ctx.score_function)
    return grad, None, None


register_autograd(_forward, _autograd, _setup_context)
register_autograd(_invariant, _autograd, _setup_context)


def router_scores(
    router_logits: Tensor,
    score_function: str = "softmax",
    *,
    with_log_z: bool = False,
    backend: str | None = None,
    batch_invariant: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Scores of every expert for every token.

    A row with a NaN, or with +inf under softmax, scores NaN throughout; -inf scores 0.

    Args:
        router_logits: ``(T, E)`` floating point.
        score_function: ``softmax``, ``sigmoid`` or ``sqrt_softplus`` (``sqrt(ln(1 + e^x))``, DeepSeek-V4).
        with_log_z: also return ``logsumexp`` of each row.
        backend: ``reference`` for plain PyTorch under its own autograd.
        batch_invariant: a token's scores, and their gradients, have the same bits in any batch on the CPU.

    Returns:
        scores ``(T, E)`` and log_z ``(T,)`` or None, in the logits' dtype.

    Raises:
        TypeError: logits that are not floating point.
        ValueError: unknown score function, or logits that are not ``(T, E)``.
    """
    if score_function not in SCORE_FUNCTIONS:
        raise ValueError(f"router_scores: score_function: expected one of {SCORE_FUNCTIONS}, got {score_function!r}")
    check_floating("router_scores", router_logits=router_logits)
    if router_logits.dim() != 2:
        raise ValueError(f"router_scores: router_logits: expected shape (T, E), got {tuple(router_logits.shape)}")
    run = router_scores_ref if backend == "reference" else _invariant if batch_invariant else _forward
    scores, log_z = run(router_logits, score_function, with_log_z)
    return scores, log_z if with_log_z else None
