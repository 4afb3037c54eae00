"""``moe_mlp`` of what its kernels do not know: adapters, weights held as codes, a user's own activation, fp8.

Per row, with the names of :mod:`dmoe.ops.moe_mlp` (``b`` biases)::

    pre = W_up x + s B_up (A_up x) + b_up        o = W_down a + s B_down (A_down a) + b_down

Saved for backward is what ``moe_mlp`` saves (x, pre, the plan, the gate weights) and the r numbers a row of ``A x`` and
``A a``. Backward computes the gradients that are wanted and no others: a frozen projection costs it one product, not
two, and nothing that would be as large as all experts. It is :mod:`dmoe.ops.moe_mlp_torch`'s composition on the
products of :mod:`dmoe.ops.projection`, or in fp8 on those of :mod:`dmoe.ops.fp8_products`.

Where x and pre are saved as fp8 codes, backward reads what these stand for. So does forward of x, if it computes in
fp8: both directions then have one x. Otherwise forward is as exact as ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dmoe.ops._moe_mlp_call import WEIGHTS, Call
from dmoe.ops._moe_mlp_parts import Stacked, dropout_mask, save_values, saved_values, stacked_weights
from dmoe.ops.activation import accumulate_dtype
from dmoe.ops.fp8_products import Fp8Products, Fp8Rows, quantized
from dmoe.ops.grouped_gemm import grouped_gemm
from dmoe.ops.moe_mlp import under_autocast
from dmoe.ops.moe_mlp_ref import AddedRows, moe_mlp_twice_differentiable
from dmoe.ops.moe_mlp_torch import Pass, backward_data_of, backward_weights_of, forward_of, pre_activation_of
from dmoe.ops.permute import permute, unpermute
from dmoe.ops.philox import DOWN_ADAPTER_DROPOUT, UP_ADAPTER_DROPOUT
from dmoe.ops.projection import Codes, Factors, GroupedProducts, Projection, TorchProducts, masked_rows
from dmoe.ops.row_activation import row_activation, row_activation_backward
from dmoe.strides import in_memory_order, is_interleaved, matrices


class _Beside(NamedTuple):
    """The tensors of a call beside :class:`Call`'s: factors, which may be trained, their groups' offsets, codes."""

    up_a: Tensor | None
    up_b: Tensor | None
    down_a: Tensor | None
    down_b: Tensor | None
    group_offsets: Tensor | None
    up_codes: Tensor | None
    up_scales: Tensor | None
    up_zeros: Tensor | None
    down_codes: Tensor | None
    down_scales: Tensor | None
    down_zeros: Tensor | None
    gate_codes: Tensor | None
    gate_scales: Tensor | None
    gate_zeros: Tensor | None


_FACTORS, _BESIDE = 4, len(_Beside._fields)
_CODED = ("up_proj", "down_proj", "gate_proj")  # in the order of those fields


class _How(NamedTuple):
    """What is no tensor of one call's adapters and codes, and how it is computed."""

    backend: str | None
    recompute: bool
    scales: tuple[float, ...]
    dropouts: tuple[float, ...]
    formats: tuple[Any, ...]  # of each projection, the fields of Codes behind its tensors, or None
    compute: str | None
    saved: str | None


class ComposedPass(Pass):
    """A pass in PyTorch's own operations whose projections may be codes, have adapters, or be multiplied in fp8."""

    def __init__(
        self,
        call: Call,
        up: Factors | None,
        down: Factors | None,
        group_offsets: Tensor | None,
        products: type[GroupedProducts] | type[TorchProducts],
        in_fp8: bool = False,
        tokens: Fp8Rows | None = None,
    ) -> None:
        weights, self.tokens = _stacked(call), tokens
        of_experts = _products_of(products, call.expert_offsets, call.x, *weights.up, weights.down)
        of_experts = Fp8Products(of_experts) if in_fp8 else of_experts
        super().__init__(call, of_experts, weights)
        thin = of_experts
        if group_offsets is not None:
            thin = _products_of(products, group_offsets, *(f for low in (up, down) if low for f in low[:2]))
        self.up = Projection(weights.up, of_experts, up, thin, self._dropping(up, UP_ADAPTER_DROPOUT))
        self.down = Projection((weights.down,), of_experts, down, thin, self._dropping(down, DOWN_ADAPTER_DROPOUT))

    def _dropping(self, factors: Factors | None, stream: int) -> Any:
        """Rows of a projection's input under its adapter's dropout, whose mask is made again wherever it is needed."""
        p = 0.0 if factors is None else factors.dropout
        if not p:
            return lambda rows: rows

        def dropped(rows: Tensor) -> Tensor:
            width = rows.shape[1]

            def mask_of(part: slice) -> Tensor | None:
                return dropout_mask(self.call, stream, p, self.assignment[part], width, self.wide)

            return masked_rows(rows, mask_of, list(self.chunks(width)))

        return dropped

    def before_bias(self) -> Tensor:
        """With the adapter's share. In fp8 x is quantised token by token, and its codes are gathered."""
        if not isinstance(self.products, Fp8Products) or self.call.gate_weight_on == "input":
            return self.up.through(self.inputs)
        tokens = self.products.taken(self.call.x) if self.tokens is None else self.tokens
        codes = self.gathered(tokens.codes.view(torch.uint8)).view(tokens.codes.dtype)
        return self.up.through(self.inputs, Fp8Rows(codes, self.gathered(tokens.scales.unsqueeze(1)).flatten()))

    def through_down(self, hidden: Tensor) -> Tensor:
        """With the adapter's share."""
        return self.down.through(lambda: hidden)

    def back_through_down(self, grad_out: Tensor) -> Tensor:
        """With the adapter's share."""
        return self.down.back_through(grad_out)

    def back_through_up(self, grad_pre: Tensor) -> Tensor:
        """With the adapter's share."""
        return self.up.back_through(grad_pre)

    def expect_backward(self, inner_up: Tensor | None, inner_down: Tensor | None, trained: Sequence[bool]) -> None:
        """Before the ways back, with what forward kept, so that these make b's gradients too, of rows they have."""
        if inner_down is not None and self.call.gate_weight_on == "output":  # forward's was not weighed yet
            inner_down = (inner_down * self.gate).to(inner_down.dtype)
        self.up.inner, self.down.inner = inner_up, inner_down
        self.up.trained, self.down.trained = any(trained[:2]), any(trained[2:])

    def factor_grads(self, hidden: Tensor) -> tuple[Tensor | None, ...]:
        """Of both projections' a and b, after the ways back; None where there is no adapter, or it is frozen."""
        return *self.up.grads(self.inputs), *self.down.grads(lambda: hidden)


class KernelPass(ComposedPass):
    """The same in this library's own operations."""

    def gathered(self, source: Tensor) -> Tensor:
        """In one operation."""
        return permute(source, self.call.row_to_token, self.call.token_offsets, self.call.token_rows)

    def summed(self, rows: Tensor, weigh: bool, residual: Tensor | None = None) -> Tensor:
        """In one operation."""
        call = self.call
        gates = call.gate_weights if weigh else None
        y = unpermute(rows, gates, call.row_to_token, call.row_to_slot, call.token_offsets, call.token_rows)
        return y if residual is None else y.add_(residual)

    @property
    def _activates_at_once(self) -> bool:
        return not self.call.activation_dropout and isinstance(self.call.activation, str)

    def hidden_of(self, pre: Tensor) -> Tensor:
        """In one operation, where nothing is dropped and the activation is one that it knows."""
        if not self._activates_at_once:
            return super().hidden_of(pre)
        scale = self.gate.flatten() if self.call.gate_weight_on == "activation" else None
        return row_activation(pre, scale, self.call.activation, self.call.gated)

    def back_through_activation(self, grad_hidden: Tensor, pre: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """In one operation likewise: rows without a token are zeros, as these products make them."""
        if not self._activates_at_once:
            return super().back_through_activation(grad_hidden, pre)
        scale = None if self.call.gate_weight_on == "input" else self.gate.flatten()
        grad_pre, *others = row_activation_backward(grad_hidden, pre, scale, self.call.activation, self.call.gated)
        return self.weights.as_multiplied(grad_pre), *others


def _products_of(kind: Any, offsets: Tensor, *operands: Any) -> Any:
    if kind is GroupedProducts:
        return GroupedProducts(offsets)
    return TorchProducts(offsets, *(operand for operand in operands if isinstance(operand, Tensor)))


def _stacked(call: Call) -> Stacked:
    """As :func:`stacked_weights`, where projections are codes."""
    up, gate, bias = call.up_proj, call.gate_proj, call.up_bias
    if not any(isinstance(weight, Codes) for weight in (up, gate, call.down_proj)):
        return stacked_weights(call)
    if isinstance(up, Codes):
        interleaved, of_up = up.interleaved, (up,) if gate is None else (gate, up)
    else:
        interleaved, of_up = call.gated and gate is None and is_interleaved(up), matrices(up, gate, call.gated)
    if bias is not None:
        bias = in_memory_order(bias) if interleaved else bias.reshape(bias.shape[0], -1)
    return Stacked(of_up, call.down_proj, bias, interleaved)


class _ComposedMLP(torch.autograd.Function):
    """Arguments: how, the fields of :class:`_Beside`, the fields of :class:`Call`."""

    @staticmethod
    def forward(ctx: Any, how: _How, *arguments: Any) -> Tensor:
        """``(T, H)``."""
        call, differentiated = Call(*arguments[_BESIDE:]), any(ctx.needs_input_grad)
        ctx.how, ctx.dtype = how, call.x.dtype
        tokens = None
        if how.saved is not None and (differentiated or how.compute is not None):
            tokens = quantized(call.x, how.backend)
            if how.compute is not None:
                arguments = (*arguments[:_BESIDE], tokens.decoded(ctx.dtype), *arguments[_BESIDE + 1 :])
        now = _pass(how, arguments, tokens)
        y, pre = forward_of(now)
        if not differentiated:
            return y
        trained = ctx.needs_input_grad[1 : 1 + _FACTORS]
        inner_up = now.up.inner if any(trained[:2]) and not how.recompute else None
        inner_down = now.down.inner if any(trained[2:]) else None
        # As moe_mlp: y is linear in the residual, which backward does not read.
        call = call._replace(residual=None, x=call.x if tokens is None else tokens.codes)
        kept = (*_kept(None if how.recompute else pre, how), None if tokens is None else tokens.scales)
        save_values(ctx, (*kept, inner_up, inner_down, *arguments[:_BESIDE], *call))
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of what is trained."""
        needed = ctx.needs_input_grad[1:]
        if grad_y is None:
            return (None,) * (1 + len(needed))
        pre, pre_scales, x_scales, inner_up, inner_down, *saved = saved_values(ctx)
        arguments, tokens = list(saved), None  # traced by PyTorch 2.10 the rest is a tuple
        if x_scales is not None:
            tokens = Fp8Rows(arguments[_BESIDE], x_scales)
            arguments[_BESIDE] = tokens.decoded(ctx.dtype)
        now, grad_y = _pass(ctx.how, arguments, tokens), grad_y.contiguous()
        if pre_scales is not None:
            pre = Fp8Rows(pre, pre_scales).decoded(ctx.dtype)
        elif pre is None:
            pre = pre_activation_of(now)
            inner_up = now.up.inner
        now.expect_backward(inner_up, inner_down, needed[:_FACTORS])
        grad_x, grad_gate, grad_pre, hidden = backward_data_of(now, grad_y, pre)
        wanted = dict(zip(Call._fields, needed[_BESIDE:], strict=True))
        grads: dict[str, Tensor | None] = {"x": grad_x, "gate_weights": grad_gate, "residual": grad_y}
        of_weights = [name for name in WEIGHTS if wanted[name]]
        if of_weights:
            computed = backward_weights_of(now, grad_y, grad_pre, hidden, of_weights)
            grads.update(zip(WEIGHTS, computed, strict=True))
        beside = (*now.factor_grads(hidden), *(None,) * (_BESIDE - _FACTORS))
        return None, *beside, *(grads.get(name) if want else None for name, want in wanted.items())


def _kept(pre: Tensor | None, how: _How) -> tuple[Tensor | None, Tensor | None]:
    """What is saved of the pre-activation: itself, or its codes and scales."""
    return (pre, None) if pre is None or how.saved is None else quantized(pre, how.backend)


def _pass(how: _How, arguments: Sequence[Any], tokens: Fp8Rows | None = None) -> ComposedPass:
    beside, fields = _Beside(*arguments[:_BESIDE]), dict(zip(Call._fields, arguments[_BESIDE:], strict=True))
    tensors = beside[_FACTORS + 1 :]
    for number, (name, rest) in enumerate(zip(_CODED, how.formats, strict=True)):
        if rest is not None:
            of_one: Any = tensors[3 * number : 3 * number + 3]
            fields[name] = Codes(*of_one, *rest)
    up, down = (
        None if a is None or b is None else Factors(a, b, scale, p)
        for (a, b), scale, p in zip((beside[:2], beside[2:4]), how.scales, how.dropouts, strict=True)
    )
    of_torch = how.backend == "torch"
    kind, products = (ComposedPass, TorchProducts) if of_torch else (KernelPass, GroupedProducts)
    return kind(Call(**fields), up, down, beside.group_offsets, products, how.compute is not None, tokens)


def _added(call: Call, factors: Sequence[Factors | None], group_offsets: Tensor | None) -> list[AddedRows]:
    """The thin products under autograd."""
    offsets = call.expert_offsets if group_offsets is None else group_offsets

    def product(low: Factors, stream: int) -> AddedRows:
        def added(rows: Tensor, assignment: Tensor) -> Tensor:
            dtype = accumulate_dtype(rows.dtype)
            mask = dropout_mask(call, stream, low.dropout, assignment, rows.shape[1], dtype)
            inner = grouped_gemm(rows if mask is None else (rows * mask).to(rows.dtype), low.a, offsets)
            return grouped_gemm(inner * low.scale, low.b, offsets)

        return added

    streams = (UP_ADAPTER_DROPOUT, DOWN_ADAPTER_DROPOUT)
    return [None if low is None else product(low, stream) for low, stream in zip(factors, streams, strict=True)]


def moe_mlp_composed(
    up: Factors | None,
    down: Factors | None,
    group_offsets: Tensor | None,
    *arguments: Any,
    backend: str | None = None,
    recompute: bool = False,
    compute: str | None = None,
    saved: str | None = None,
) -> Tensor:
    """Run it on the arguments of ``moe_mlp``'s schema; see :func:`dmoe.run_experts` for the public form.

    Args:
        up, down: the projections' factors, ``a (G, r, H)`` and ``b (G, C, r)`` of the up projection, where C is the
            pre-activation's width, ``a (G, r, F)`` and ``b (G, H, r)`` of the down one; floating point, multiplied in
            the dtype of x. None for a projection without.
        group_offsets: ``(G + 1,)`` int32, the first row of each of the factors' groups; None where these are experts.
        *arguments: in the schema's order, without buffers for main gradients. Projections may be :class:`Codes`, and
            the activation a function of a tensor.
        backend: ``torch`` for PyTorch's own operations, ``reference`` for those under their own autograd (no codes).
        recompute: save x only, and compute the pre-activation again in backward.
        compute, saved: ``fp8`` for what multiplies, and what is saved for backward; not with ``reference``, and the
            former not with codes.

    Returns:
        y ``(T, H)`` in the dtype of x; differentiable once, with ``reference`` any number of times. Codes have no
        gradient.

    Raises:
        RuntimeError: offsets that do not ascend, on the CPU; a CUDA graph is being captured where the host would have
            to read them, with ``torch``. What does not fit together is refused before, by :mod:`dmoe.expert_inputs`.
    """

    def run(*arguments: Any) -> Tensor:
        call = Call(*arguments)
        dtype = call.x.dtype
        both = [None if f is None else f._replace(a=f.a.to(dtype), b=f.b.to(dtype)) for f in (up, down)]
        if backend == "reference":
            return moe_mlp_twice_differentiable(*call, added=_added(call, both, group_offsets))
        fields, formats = call._asdict(), []
        codes: list[Tensor | None] = []
        for name in _CODED:
            weight = fields[name]
            coded = isinstance(weight, Codes)
            codes += weight[:3] if coded else (None,) * 3
            formats.append(tuple(weight[3:]) if coded else None)
            fields[name] = None if coded else weight
        scales, dropouts = ([0.0 if f is None else float(f[n]) for f in both] for n in (2, 3))
        how = _How(backend, recompute, tuple(scales), tuple(dropouts), tuple(formats), compute, saved)
        thin = [None if f is None else f[n] for f in both for n in range(2)]
        return _ComposedMLP.apply(how, *thin, group_offsets, *codes, *fields.values())

    return under_autocast(run, *arguments)
