"""``moe_mlp`` with low-rank adapters beside its projections: ``W_e + s B_e A_e``, multiplied factor by factor.

Per row, with the names of :mod:`dmoe.ops.moe_mlp` (``b`` biases)::

    pre = W_up x + s B_up (A_up x) + b_up        o = W_down a + s B_down (A_down a) + b_down

Saved for backward is what ``moe_mlp`` saves (x, pre, the plan, the gate weights) and the r numbers a row of ``A x`` and
``A a``. A projection that is frozen costs backward one product, not two, and has no gradient that
would be as large as all experts. It is :mod:`dmoe.ops.moe_mlp_torch`'s composition on this library's grouped products.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dmoe.ops._moe_mlp_call import WEIGHTS, Call
from dmoe.ops._moe_mlp_parts import save_values, saved_values
from dmoe.ops.grouped_gemm import grouped_gemm, grouped_gemm_sum, grouped_gemm_weight
from dmoe.ops.moe_mlp import under_autocast
from dmoe.ops.moe_mlp_torch import Pass, backward_data_of, backward_weights_of, forward_of
from dmoe.ops.permute import permute, unpermute
from dmoe.ops.row_activation import row_activation, row_activation_backward


class Factors(NamedTuple):
    """Of one projection: ``a (E, r, in)``, ``b (E, out, r)`` ``out`` in the order of its results' columns."""

    a: Tensor
    b: Tensor
    scale: float


class GroupedProducts:
    """Every expert's products by this library's own kernels."""

    def __init__(self, expert_offsets: Tensor) -> None:
        self.expert_offsets = expert_offsets

    def rows(self, a: Tensor, b: Tensor) -> Tensor:
        """See :class:`dmoe.ops.expert_products.ExpertProducts`."""
        return grouped_gemm(a, b, self.expert_offsets, trans_b=False)

    def sums(self, a: Tensor, b: Tensor, *, columns_first: bool = False) -> Tensor:
        """See :class:`dmoe.ops.expert_products.ExpertProducts`."""
        return self.sums(b, a).mT if columns_first else grouped_gemm_weight(a, b, self.expert_offsets)

    def row_sums(self, a: Tensor) -> Tensor:
        """See :class:`dmoe.ops.expert_products.ExpertProducts`."""
        return self.sums(a, a.new_ones(a.shape[0], 1)).squeeze(2)


class AdaptedPass(Pass):
    """A pass whose projections have adapters."""

    def __init__(self, call: Call, up: Factors | None, down: Factors | None) -> None:
        products = GroupedProducts(call.expert_offsets)
        super().__init__(call, products)
        self.up, self.down = _Adapter(up, products), _Adapter(down, products)

    def gathered(self, source: Tensor) -> Tensor:
        """In one operation."""
        return permute(source, self.call.row_to_token, self.call.token_offsets, self.call.token_rows)

    def summed(self, rows: Tensor, weigh: bool, residual: Tensor | None = None) -> Tensor:
        """In one operation."""
        call = self.call
        gates = call.gate_weights if weigh else None
        y = unpermute(rows, gates, call.row_to_token, call.row_to_slot, call.token_offsets, call.token_rows)
        return y if residual is None else y.add_(residual)

    def hidden_of(self, pre: Tensor) -> Tensor:
        """In one operation, where nothing is dropped."""
        if self.call.activation_dropout:
            return super().hidden_of(pre)
        scale = self.gate.flatten() if self.call.gate_weight_on == "activation" else None
        return row_activation(pre, scale, self.call.activation, self.call.gated)

    def back_through_activation(self, grad_hidden: Tensor, pre: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """In one operation, where nothing is dropped: rows without a token are zeros, as these products make them."""
        if self.call.activation_dropout:
            return super().back_through_activation(grad_hidden, pre)
        scale = None if self.call.gate_weight_on == "input" else self.gate.flatten()
        grad_pre, *others = row_activation_backward(grad_hidden, pre, scale, self.call.activation, self.call.gated)
        return self.weights.as_multiplied(grad_pre), *others

    def through_up(self, rows: Tensor) -> Tensor:
        """With the adapter's share."""
        return self.up.through(rows, self.weights.up, super().through_up)

    def through_down(self, hidden: Tensor) -> Tensor:
        """With the adapter's share."""
        return self.down.through(hidden, (self.weights.down,), super().through_down)

    def back_through_down(self, grad_out: Tensor) -> Tensor:
        """With the adapter's share."""
        return self.down.back_through(grad_out, (self.weights.down,), super().back_through_down)

    def back_through_up(self, grad_pre: Tensor) -> Tensor:
        """With the adapter's share."""
        return self.up.back_through(grad_pre, self.weights.up, super().back_through_up)

    def expect_backward(self, inner_up: Tensor | None, inner_down: Tensor | None) -> None:
        """Before the ways back, with what forward kept, so that these make b's gradients too, of rows they have."""
        if inner_down is not None and self.call.gate_weight_on == "output":  # forward's was not weighed yet
            inner_down = (inner_down * self.gate).to(inner_down.dtype)
        self.up.inner, self.down.inner = inner_up, inner_down

    def factor_grads(self, hidden: Tensor) -> tuple[Tensor | None, ...]:
        """Of both projections' a and b, after the ways back; None where there is no adapter."""
        return *self.up.grads(self.inputs), *self.down.grads(lambda: hidden)


class _Adapter:
    """One projection's factors, or none, and the r numbers a row that both directions make of them."""

    def __init__(self, factors: Factors | None, products: GroupedProducts) -> None:
        self.factors, self.products = factors, products
        self.inner: Tensor | None = None  # s A times the projection's rows; in backward those times the gate
        self.back: Tensor | None = None  # s B^T times the gradients of its results
        self.b_grad: Tensor | None = None

    def through(self, rows: Tensor, weights: Sequence[Tensor], plain: Callable[[Tensor], Tensor]) -> Tensor:
        """``rows W^T + s (rows A^T) B^T``; ``plain`` makes the first, where W is no single matrix or there is no A."""
        if self.factors is None:
            return plain(rows)
        self.inner = self.products.rows(rows, self.factors.a.mT).mul_(self.factors.scale)
        if len(weights) > 1:
            return plain(rows).add_(self.products.rows(self.inner, self.factors.b.mT))
        return grouped_gemm_sum(rows, weights[0], self.inner, self.factors.b, self.products.expert_offsets, True)

    def back_through(self, grads: Tensor, weights: Sequence[Tensor], plain: Callable[[Tensor], Tensor]) -> Tensor:
        """``grads W + s (grads B) A``, and of the same rows b's gradient, if the inner numbers are there."""
        if self.factors is None:
            return plain(grads)
        if self.inner is not None:
            self.b_grad = self.products.sums(grads, self.inner)
        self.back = self.products.rows(grads, self.factors.b).mul_(self.factors.scale)
        if len(weights) > 1:
            return plain(grads).add_(self.products.rows(self.back, self.factors.a))
        return grouped_gemm_sum(grads, weights[0], self.back, self.factors.a, self.products.expert_offsets, False)

    def grads(self, rows: Callable[[], Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """Of a and b; the projection's rows are made only if they are needed."""
        return None if self.back is None else self.products.sums(self.back, rows()), self.b_grad


class _AdaptedMLP(torch.autograd.Function):
    """Arguments: the scales, the four factors (None without an adapter), and the fields of :class:`Call`."""

    @staticmethod
    def forward(ctx: Any, scales: tuple[float, float], *arguments: Any) -> Tensor:
        """``(T, H)``."""
        now = _pass(scales, arguments)
        y, pre = forward_of(now)
        # As moe_mlp: y is linear in the residual, which backward does not read.
        call = Call(*arguments[4:])._replace(residual=None)
        save_values(ctx, (pre, now.up.inner, now.down.inner, *arguments[:4], *call))
        ctx.scales = scales
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of what is trained."""
        if grad_y is None:
            return (None,) * len(ctx.needs_input_grad)
        pre, inner_up, inner_down, *kept = saved_values(ctx)
        now, grad_y = _pass(ctx.scales, kept), grad_y.contiguous()
        trained = any(ctx.needs_input_grad[1:5])
        if trained:
            now.expect_backward(inner_up, inner_down)
        grad_x, grad_gate, grad_pre, hidden = backward_data_of(now, grad_y, pre)
        wanted = dict(zip(Call._fields, ctx.needs_input_grad[5:], strict=False))
        grads: dict[str, Tensor | None] = {"x": grad_x, "gate_weights": grad_gate, "residual": grad_y}
        if any(wanted[name] for name in WEIGHTS):
            of_weights = backward_weights_of(now, grad_y, grad_pre, hidden)
            grads.update(zip(WEIGHTS, of_weights, strict=True))
        factors = now.factor_grads(hidden) if trained else (None,) * 4
        return None, *factors, *(grads.get(name) if want else None for name, want in wanted.items())


def _pass(scales: tuple[float, float], arguments: Sequence[Any]) -> AdaptedPass:
    call = Call(*arguments[4:])
    pairs = zip((arguments[:2], arguments[2:4]), scales, strict=True)
    return AdaptedPass(call, *(None if a is None else Factors(a, b, scale) for (a, b), scale in pairs))


def moe_mlp_adapted(up: Factors | None, down: Factors | None, *arguments: Any) -> Tensor:
    """Run it on the arguments of ``moe_mlp``'s schema; see :func:`dmoe.run_experts` for the public form.

    Args:
        up, down: the projections' factors, in the dtype of the weights; None for a projection without.
        *arguments: in the schema's order, without buffers for main gradients.
    """

    def run(*arguments: Any) -> Tensor:
        call = Call(*arguments)
        factors = [None if f is None else f.to(call.x.dtype) for low in (up, down) for f in (low or (None, None))[:2]]
        scales = tuple(0.0 if low is None else float(low.scale) for low in (up, down))
        return _AdaptedMLP.apply(scales, *factors, *call)

    return under_autocast(run, *arguments)
