"""``moe_mlp`` with low-rank adapters beside its projections: ``W_e + s B_e A_e``, multiplied factor by factor.

Per row, with the names of :mod:`dmoe.ops.moe_mlp` (``b`` biases)::

    pre = W_up x + s B_up (A_up x) + b_up        o = W_down a + s B_down (A_down a) + b_down

Saved for backward is what ``moe_mlp`` saves: x, pre, the plan and the gate weights; the r numbers of ``A x`` and
``A a`` are computed again. A projection that is frozen costs backward one product, not two, and has no gradient that
would be as large as all experts. It is :mod:`dmoe.ops.moe_mlp_torch`'s composition on this library's grouped products.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dmoe.ops._moe_mlp_call import WEIGHTS, Call
from dmoe.ops.grouped_gemm import grouped_gemm, grouped_gemm_weight
from dmoe.ops.moe_mlp import under_autocast
from dmoe.ops.moe_mlp_torch import Pass, backward_data_of, backward_weights_of, forward_of


class Factors(NamedTuple):
    """Of one projection: ``a (E, r, in)``, ``b (E, out, r)`` ``out`` in the order of its results' columns."""

    a: Tensor
    b: Tensor
    scale: float

    def after(self, products: GroupedProducts, rows: Tensor) -> Tensor:
        """``s (rows A^T) B^T``."""
        return products.rows(products.rows(rows, self.a.mT).mul_(self.scale), self.b.mT)

    def before(self, products: GroupedProducts, grads: Tensor) -> Tensor:
        """The gradient of those rows: ``s (grads B) A``."""
        return products.rows(products.rows(grads, self.b).mul_(self.scale), self.a)

    def grads(self, products: GroupedProducts, rows: Tensor, grads: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of a and b, given the projection's rows and the gradient of its results."""
        of_a = products.sums(products.rows(grads, self.b).mul_(self.scale), rows)
        return of_a, products.sums(grads, products.rows(rows, self.a.mT).mul_(self.scale))


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
        self.ours = GroupedProducts(call.expert_offsets)
        super().__init__(call, self.ours)
        self.up, self.down = up, down

    def through_up(self, rows: Tensor) -> Tensor:
        """With the adapter's share."""
        out = super().through_up(rows)
        return out if self.up is None else out.add_(self.up.after(self.ours, rows))

    def through_down(self, hidden: Tensor) -> Tensor:
        """With the adapter's share."""
        out = super().through_down(hidden)
        return out if self.down is None else out.add_(self.down.after(self.ours, hidden))

    def back_through_down(self, grad_out: Tensor) -> Tensor:
        """With the adapter's share."""
        out = super().back_through_down(grad_out)
        return out if self.down is None else out.add_(self.down.before(self.ours, grad_out))

    def back_through_up(self, grad_pre: Tensor) -> Tensor:
        """With the adapter's share."""
        out = super().back_through_up(grad_pre)
        return out if self.up is None else out.add_(self.up.before(self.ours, grad_pre))

    def factor_grads(self, grad_y: Tensor, grad_pre: Tensor, hidden: Tensor) -> list[Tensor | None]:
        """Of both projections' a and b; None where there is no adapter."""
        grads: list[Tensor | None] = [None] * 4
        if self.up is not None:
            grads[:2] = self.up.grads(self.ours, self.inputs(), grad_pre)
        if self.down is not None:
            grads[2:] = self.down.grads(self.ours, hidden, self.drop_outputs(self.gathered(grad_y)))
        return grads


class _AdaptedMLP(torch.autograd.Function):
    """Arguments: the scales, the four factors (None without an adapter), and the fields of :class:`Call`."""

    @staticmethod
    def forward(ctx: Any, scales: tuple[float, float], *arguments: Any) -> Tensor:
        """``(T, H)``."""
        y, pre = forward_of(_pass(scales, arguments))
        # As moe_mlp: y is linear in the residual, which backward does not read.
        kept = [*arguments[:4], *Call(*arguments[4:])._replace(residual=None)]
        ctx.are_tensors = [isinstance(value, Tensor) for value in kept]
        ctx.others = [None if isinstance(value, Tensor) else value for value in kept]
        ctx.save_for_backward(pre, *(value for value in kept if isinstance(value, Tensor)))
        ctx.scales = scales
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of what is trained."""
        if grad_y is None:
            return (None,) * len(ctx.needs_input_grad)
        pre, *given = ctx.saved_tensors
        tensors = iter(given)
        kept = [next(tensors) if is_one else v for is_one, v in zip(ctx.are_tensors, ctx.others, strict=True)]
        now, grad_y = _pass(ctx.scales, kept), grad_y.contiguous()
        grad_x, grad_gate, grad_pre, hidden = backward_data_of(now, grad_y, pre)
        wanted = dict(zip(Call._fields, ctx.needs_input_grad[5:], strict=False))
        grads: dict[str, Tensor | None] = {"x": grad_x, "gate_weights": grad_gate, "residual": grad_y}
        if any(wanted[name] for name in WEIGHTS):
            of_weights = backward_weights_of(now, grad_y, grad_pre, hidden)
            grads.update(zip(WEIGHTS, of_weights, strict=True))
        factors = now.factor_grads(grad_y, grad_pre, hidden) if any(ctx.needs_input_grad[1:5]) else [None] * 4
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
