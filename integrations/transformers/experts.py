"""What Transformers calls for ``experts_implementation="dmoe"``: the experts of any model, on dmoe's operations."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import dmoe
from dmoe.integrations.transformers.composed import composed_experts
from dmoe.integrations.transformers.gates import Gate, apply_gate, gate_of
from dmoe.integrations.transformers.lora import Adapted, adapted, has_own_adapters, own_adapters
from dmoe.integrations.transformers.versions import Layout, layout_of


class Projections(NamedTuple):
    """A module's weights as it has them.

    Attributes:
        up: ``(E, 2 F, H)``, without a gate ``(E, F, H)``; transposed ``(E, H, 2 F)``. Or a ``QuantizedWeight``, whose
            shape is dmoe's: ``(E, 2, F, H)`` or ``(E, F, H)``, whatever the module's was.
        down: ``(E, H, F)``; transposed ``(E, F, H)``; likewise.
        up_bias, down_bias: ``(E, 2 F)`` and ``(E, H)``, or None.
    """

    up: Any
    down: Any
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None


def dmoe_experts(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Every token through its experts, weighted and summed: Transformers' contract for an implementation of experts.

    Args:
        self: the experts module, with its weights and the flags of ``use_experts_implementation``.
        hidden_states: ``(T, H)``; cast to the weights' dtype, as ``grouped_mm`` does, or to autocast's.
        top_k_index: ``(T, K)`` integers; ``num_experts`` marks a choice that takes no expert.
        top_k_weights: ``(T, K)``, used as given.

    Returns:
        ``(T, H)`` in the dtype of ``hidden_states``.

    Raises:
        TypeError: weights that are no plain tensors.
        RuntimeError: on the CPU, an expert id outside [0, E].
    """
    layout, gate = layout_of(self), gate_of(self)
    if gate is None or layout.post_norm:
        projections, adapters = projections_of(self, layout), None
    else:
        projections, adapters = factored(self, layout, gate.interleaved)
    return run_experts(self, layout, gate, projections, hidden_states, top_k_index, top_k_weights, adapters)


def _is_codes(weight: Any) -> bool:
    return isinstance(weight, dmoe.QuantizedWeight)


def run_experts(
    experts: Any,
    layout: Layout,
    gate: Gate | None,
    projections: Projections,
    hidden_states: Tensor,
    index: Tensor,
    gate_weights: Tensor,
    adapters: dmoe.Adapters | None = None,
) -> Tensor:
    """:func:`dmoe_experts` of weights that have been read: as one operation where that knows the gate."""
    if gate is None or layout.post_norm:
        _refuse_composed(experts, projections)
        norm = experts.post_expert_norm if layout.post_norm else None
        own, x = apply_gate(experts, layout), in_dtype_of(projections.up.dtype, hidden_states)
        y = composed_experts(x, index, gate_weights, *projections, own, norm, transposed=layout.transposed)
        return y.to(hidden_states.dtype)
    weights, x_dtype = as_expert_weights(projections, layout, gate.interleaved), hidden_states.dtype
    given: dict[str, Any] = {"adapters": adapters}
    if has_own_adapters(experts):
        given = dict(zip(("adapters", "adapter_ids"), own_adapters(experts, weights.dtype or x_dtype), strict=True))
    return as_one_operation(hidden_states, index, gate_weights, weights, gate, **given)


def _refuse_composed(experts: Any, projections: Projections) -> None:
    if _is_codes(projections.up) or _is_codes(projections.down) or has_own_adapters(experts):
        raise ValueError(
            f"dmoe: {type(experts).__name__}: expected experts whose gate dmoe computes, for codes and for adapters of "
            "dmoe.lora, got others"
        )


def as_one_operation(
    x: Tensor, index: Tensor, gate_weights: Tensor, weights: dmoe.ExpertWeights, gate: Gate, **options: Any
) -> Tensor:
    """``moe_mlp`` in the dtype of the weights, and back in that of x."""
    given = in_dtype_of(weights.dtype, x)
    y = dmoe.functional.moe_mlp(given, index, gate_weights, weights, activation=gate.activation, **options)
    return y.to(x.dtype)


def projections_of(experts: nn.Module, layout: Layout) -> Projections:
    """A module's weights, each read once: reading a parametrized one computes it."""
    return Projections(*(weight_of(experts, name) for name in names_of(layout)), *_biases(experts, layout))


def factored(experts: nn.Module, layout: Layout, interleaved: bool) -> tuple[Projections, dmoe.Adapters | None]:
    """The same with PEFT's factors beside the weights that have some, instead of added up."""
    if has_own_adapters(experts):  # beside which there is room for one kind
        return projections_of(experts, layout), None
    up, down = (_read(experts, name) for name in names_of(layout))
    projections = Projections(up.weight, down.weight, *_biases(experts, layout))
    if up.lhs is None and down.lhs is None:
        return projections, None
    if layout.transposed:
        up, down = up.transposed, down.transposed
    halves = up.low_rank(lambda b: _halves(b, interleaved) if layout.gated else b)
    return projections, dmoe.Adapters(halves, down.low_rank(lambda b: b))


def weight_of(experts: nn.Module, name: str) -> Any:
    """One weight of all experts, as products can read it: with what an adapter adds to it.

    Raises:
        TypeError: a tensor that only stands for its numbers: quantised by torchao, say, or a DTensor.
    """
    return _read(experts, name).total


def names_of(layout: Layout) -> tuple[str, str]:
    """Of the two projections."""
    return ("gate_up_proj" if layout.gated else "up_proj"), "down_proj"


def _biases(experts: nn.Module, layout: Layout) -> tuple[Tensor | None, ...]:
    return tuple(getattr(experts, f"{name}_bias") if layout.biased else None for name in names_of(layout))


def _read(experts: nn.Module, name: str) -> Adapted:
    read = adapted(experts, name)
    if hasattr(read.weight, "__tensor_flatten__"):
        raise TypeError(
            f"dmoe: {type(experts).__name__}.{name}: expected a plain tensor, got {type(read.weight).__name__}; load "
            'the experts unquantised and as local tensors, or choose experts_implementation="eager" for this model'
        )
    return read


def in_dtype_of(dtype: torch.dtype | None, x: Tensor) -> Tensor:
    """x in the weights' dtype; as it is beside codes alone, and under autocast, which says what products run in."""
    autocast = not x.is_meta and torch.is_autocast_enabled(x.device.type)
    return x if autocast or dtype is None else x.to(dtype)


def as_expert_weights(projections: Projections, layout: Layout, interleaved: bool = False) -> dmoe.ExpertWeights:
    """The same memory as :class:`dmoe.ExpertWeights` describes it: views, nothing is copied."""
    up, down, up_bias, down_bias = projections
    if not _is_codes(up):
        up = up.mT if layout.transposed else up
        up = _halves(up, interleaved) if layout.gated else up
    if not _is_codes(down):
        down = down.mT if layout.transposed else down
    if layout.gated:
        up_bias = None if up_bias is None else _halves(up_bias, interleaved)
    return dmoe.ExpertWeights(up, down, up_bias, down_bias, gated=layout.gated)


def _halves(columns: Tensor, interleaved: bool) -> Tensor:
    """``(E, 2 F, ...)`` as gate and up, ``(E, 2, F, ...)``."""
    return columns.unflatten(1, (-1, 2)).transpose(1, 2) if interleaved else columns.unflatten(1, (2, -1))
