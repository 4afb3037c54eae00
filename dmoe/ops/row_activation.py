"""``row_activation``: the experts' activation over rows of a pre-activation, weighed, in one pass; and its backward.

With gate weights w of rows (1 without)::

    hidden_r = w_r act(pre_r)        backward, from the gradient g_r of act(pre_r) times w_r, without w_r:
    grad_pre_r = w_r act'(pre_r) g_r        dots_r = <act(pre_r), g_r>, the gradient of w_r

``moe_mlp`` does this between its products and keeps nothing of it in memory; it is for compositions of the pieces.
"""

from __future__ import annotations

from torch import Tensor

from dmoe.ops._library import define, refuse_double_backward
from dmoe.ops.activation import accumulate_dtype, activate, activate_backward


def row_activation_ref(pre: Tensor, row_scale: Tensor | None, activation: str, gated: bool) -> Tensor:
    """Plain-PyTorch meaning of :data:`row_activation`."""
    value = activate(pre, activation, gated)
    return (value if row_scale is None else value * row_scale.unsqueeze(1)).to(pre.dtype)


def row_activation_backward_ref(
    grad_hidden: Tensor, pre: Tensor, row_scale: Tensor | None, activation: str, gated: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Plain-PyTorch meaning of :data:`row_activation_backward`."""
    grad = grad_hidden.to(accumulate_dtype(pre.dtype))
    value = activate(pre, activation, gated)
    dots = (value * grad).sum(1)
    if row_scale is not None:
        value, grad = value * row_scale.unsqueeze(1), grad * row_scale.unsqueeze(1)
    grad_pre = activate_backward(grad, pre, activation, gated)
    return grad_pre.to(pre.dtype), value.to(pre.dtype), dots


def _fake_hidden(pre: Tensor, row_scale: Tensor | None, activation: str, gated: bool) -> Tensor:
    return pre.new_empty(pre.shape[0], pre.shape[1] // (2 if gated else 1))


# Arguments: pre (R, C) contiguous, C = 2 F (gate, then up) with a gate, else F; row_scale (R,) float32 (float64 for
# float64) or None; the activation as dmoe.activations writes it. Returns hidden (R, F) in pre's dtype, rounded once.
row_activation = define(
    "row_activation(Tensor pre, Tensor? row_scale, str activation, bool gated) -> Tensor",
    row_activation_ref,
    fake=_fake_hidden,
)
# The same beside grad_hidden (R, F); returns grad_pre (R, C), hidden (R, F) and dots (R,) in row_scale's dtype.
row_activation_backward = define(
    "row_activation_backward(Tensor grad_hidden, Tensor pre, Tensor? row_scale, str activation, bool gated)"
    " -> (Tensor, Tensor, Tensor)",
    row_activation_backward_ref,
    fake=lambda grad_hidden, pre, *rest: (
        pre.new_empty(pre.shape),
        grad_hidden.new_empty(grad_hidden.shape),
        pre.new_empty(pre.shape[0], dtype=accumulate_dtype(pre.dtype)),
    ),
)
refuse_double_backward(row_activation)
refuse_double_backward(row_activation_backward)
