"""What the experts' computation accepts, checked once, at its doors: ``moe_mlp`` and ``run_experts``.

Weights check themselves, where they are made (:class:`dmoe.ExpertWeights`). Errors name ``moe_mlp``, the computation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from dmoe.activation_functions import ActivationFunction, name_of, read_given
from dmoe.activations import Activation
from dmoe.adapters import Adapters, check_adapters
from dmoe.config import CODED_BACKENDS, COMPOSED_BACKENDS, Backend, ExpertCompute, GateWeightOn, SavedActivations
from dmoe.expert_weights import ExpertWeights
from dmoe.ops._checks import check_floating, check_tensors
from dmoe.ops.moe_mlp import has_tangent
from dmoe.plan import RoutingPlan
from dmoe.strides import is_interleaved, is_transposed

_GATE_WEIGHT_ON, _BACKENDS = get_args(GateWeightOn), get_args(Backend)


class Options(NamedTuple):
    """One call beside its tokens, routing and weights; the fields are described at :func:`dmoe.run_experts`."""

    activation: Activation | ActivationFunction
    gate_weight_on: str
    activation_dropout: float
    expert_dropout: float
    backend: str | None
    residual: Tensor | None
    main_grads: Sequence[Tensor | None] | None
    recompute: bool
    adapters: Adapters | Sequence[Adapters] | None
    adapter_ids: Tensor | None
    expert_compute: str | None = None
    saved_activations: str | None = None
    batch_invariant: bool = False

    def beyond_kernels(self, weights: ExpertWeights) -> dict[str, bool]:
        """What the kernels do not know, and the composition does, in errors' words: whether it is asked for.

        For errors; :meth:`is_composed` is asked in every call, and makes no text.
        """
        function = name_of(self.activation) if callable(self.activation) else ""
        return {
            "weights that are codes": weights.is_quantized,
            f"expert_compute={self.expert_compute!r}": self.expert_compute is not None,
            f"saved_activations={self.saved_activations!r}": self.saved_activations is not None,
            "adapters": self.adapters is not None,
            f"the function {function} as activation": bool(function),
        }

    def is_composed(self, weights: ExpertWeights) -> bool:
        """Whether the composition computes."""
        in_fp8 = self.expert_compute is not None or self.saved_activations is not None
        return self.adapters is not None or in_fp8 or callable(self.activation) or weights.is_quantized


def check_choices(x: Tensor, expert_indices: Tensor, gate_weights: Tensor, weights: ExpertWeights) -> None:
    """Tokens and their choices, as :func:`dmoe.functional.moe_mlp` takes them: tensors whose shapes agree.

    Raises:
        TypeError: something that is no tensor, or no ExpertWeights.
        ValueError: other shapes.
    """
    check_tensors("moe_mlp", x=x, expert_indices=expert_indices, gate_weights=gate_weights)
    if not isinstance(weights, ExpertWeights):
        raise TypeError(f"moe_mlp: weights: expected ExpertWeights, got {type(weights).__name__}")
    if expert_indices.shape != gate_weights.shape or expert_indices.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            "moe_mlp: expected x (..., H), expert_indices (..., K) and gate_weights (..., K), got "
            f"{tuple(x.shape)}, {tuple(expert_indices.shape)} and {tuple(gate_weights.shape)}"
        )
    if expert_indices.shape[-1] < 1:
        raise ValueError(
            f"moe_mlp: expert_indices: expected shape (..., K) with K >= 1, got {tuple(expert_indices.shape)}"
        )


def check_planned(plan: RoutingPlan, gate_weights: Tensor, weights: ExpertWeights) -> None:
    """A routing, as :func:`dmoe.run_experts` takes it: it fits the gate weights and the experts.

    Raises:
        ValueError: another number of experts, or of gate weights.
    """
    if plan.num_experts != weights.num_experts:
        raise ValueError(f"moe_mlp: the routing has {plan.num_experts} experts, the weights {weights.num_experts}")
    if gate_weights.numel() != plan.token_rows.numel():
        raise ValueError(
            f"moe_mlp: gate_weights: expected one for each of {plan.token_rows.numel()} assignments, got shape "
            f"{tuple(gate_weights.shape)}"
        )


def check_call(
    x: Tensor,
    leading: Sequence[int],
    indices: Tensor,
    gate_weights: Tensor,
    weights: ExpertWeights,
    options: Options,
) -> Options:
    """What both doors take.

    Args:
        x: tokens, ``(*leading, H)``.
        leading: dimensions of the routing's tokens.
        indices: one of the routing's index tensors, for its device.
        gate_weights: in any shape.
        weights, options: of the call.

    Returns:
        The options, with the activation that a function computes by its name.

    Raises:
        TypeError: something that is no tensor, or of another kind of numbers.
        ValueError: sizes, dtypes, devices or options that do not fit together.
        RuntimeError: forward-mode differentiation.
    """
    options = options._replace(activation=read_given(options.activation, "moe_mlp", weights.gated))
    _check_options(options)
    check_floating("moe_mlp", x=x, gate_weights=gate_weights)
    expected = (*leading, weights.hidden_size)
    if x.shape != expected:
        raise ValueError(
            f"moe_mlp: x: expected shape {expected} (tokens of the routing, hidden size of the weights), got "
            f"{tuple(x.shape)}"
        )
    if has_tangent(x):
        raise RuntimeError("moe_mlp: forward-mode differentiation (jvp) is not supported; use reverse mode")
    devices = {x.device, weights.up_proj.device, gate_weights.device, indices.device}
    if len(devices) > 1:
        raise ValueError(
            f"moe_mlp: expected all tensors on one device, got x on {x.device}, weights on {weights.up_proj.device}, "
            f"gate_weights on {gate_weights.device}, indices on {indices.device}"
        )
    if weights.dtype not in (None, x.dtype) and not torch.is_autocast_enabled(x.device.type):
        raise ValueError(
            f"moe_mlp: expected x and weights of one dtype, got {x.dtype} and {weights.dtype}; convert one, or use "
            "torch.autocast"
        )
    if options.residual is not None:
        _check_residual(options.residual, x)
    if options.adapters is not None or options.adapter_ids is not None:
        check_adapters(options.adapters, options.adapter_ids, weights, leading)
    if options.is_composed(weights):
        _check_composed(options, weights)
    if options.main_grads is not None:
        _check_main_grads(options.main_grads, weights)
    if options.batch_invariant:
        _check_invariant(options, weights)
    return options


def _check_options(options: Options) -> None:
    """Those that are no tensors."""
    backend, recompute = options.backend, options.recompute
    if options.gate_weight_on not in _GATE_WEIGHT_ON:
        raise ValueError(
            f"moe_mlp: gate_weight_on: expected output, activation or input, got {options.gate_weight_on!r}"
        )
    for name in ("activation_dropout", "expert_dropout"):
        p = getattr(options, name)
        if not isinstance(p, int | float) or not 0 <= p < 1:
            raise ValueError(f"moe_mlp: {name}: expected 0 <= p < 1, got {p!r}")
    if backend is not None and backend not in _BACKENDS:
        raise ValueError(f"moe_mlp: backend: expected None or one of {', '.join(_BACKENDS)}, got {backend!r}")
    for name, known in (("expert_compute", ExpertCompute), ("saved_activations", SavedActivations)):
        if getattr(options, name) not in (None, *get_args(known)):
            raise ValueError(f"moe_mlp: {name}: expected None or 'fp8', got {getattr(options, name)!r}")
    for name in ("recompute", "batch_invariant"):
        if not isinstance(getattr(options, name), bool):
            raise TypeError(f"moe_mlp: {name}: expected True or False, got {getattr(options, name)!r}")
    if backend in ("block_sparse", "reference") and (recompute or options.main_grads is not None):
        name, allowed = ("recompute", "False") if recompute else ("main_grads", "None")
        raise ValueError(
            f"moe_mlp: {name}: expected {allowed} with backend={backend!r}, whose backward has no such option"
        )


def _check_composed(options: Options, weights: ExpertWeights) -> None:
    """What the kernels do not know goes with what the composition knows."""
    if weights.is_quantized and options.expert_compute is not None:
        raise ValueError(
            f"moe_mlp: expert_compute: expected None beside weights that are codes, got {options.expert_compute!r}: "
            "their products decode them to x's dtype"
        )
    there = [what for what, is_there in options.beyond_kernels(weights).items() if is_there]
    if options.main_grads is not None:
        raise ValueError(f"moe_mlp: main_grads: expected None beside {there[0]}, got buffers")
    in_codes = weights.is_quantized or options.expert_compute is not None or options.saved_activations is not None
    allowed = CODED_BACKENDS if in_codes else COMPOSED_BACKENDS
    if options.backend not in (None, *allowed):
        raise ValueError(
            f"moe_mlp: backend: expected None, {' or '.join(allowed)} beside {there[0]}, got {options.backend!r}"
        )


def _check_invariant(options: Options, weights: ExpertWeights) -> None:
    """Who cannot promise that a token's bits are its own says so."""
    why = "with batch_invariant=True, which the compiled CPU kernels alone promise"
    if options.backend not in (None, "grouped"):
        raise ValueError(f"moe_mlp: backend: expected None or grouped {why}, got {options.backend!r}")
    if options.is_composed(weights):
        there = next(what for what, is_there in options.beyond_kernels(weights).items() if is_there)
        raise ValueError(f"moe_mlp: expected no {there} {why}: they run on a composition, whose sums follow the batch")
    for name in ("activation_dropout", "expert_dropout"):
        if getattr(options, name):
            raise ValueError(
                f"moe_mlp: {name}: expected 0 with batch_invariant=True, as masks are drawn by a token's place in the "
                f"batch, got {getattr(options, name)!r}"
            )


def _check_residual(residual: Tensor, x: Tensor) -> None:
    check_tensors("moe_mlp", residual=residual)
    if residual.shape != x.shape or residual.device != x.device:
        raise ValueError(
            f"moe_mlp: residual: expected x's shape {tuple(x.shape)} on {x.device}, got {tuple(residual.shape)} on "
            f"{residual.device}"
        )
    # Older PyTorch refuses to say it of meta.
    cast = not x.is_meta and torch.is_autocast_enabled(x.device.type) and residual.is_floating_point()
    if residual.dtype != x.dtype and not cast:
        raise ValueError(f"moe_mlp: residual: expected x's dtype {x.dtype}, got {residual.dtype}")


def _check_main_grads(main_grads: Sequence[Tensor | None], weights: ExpertWeights) -> None:
    projections = {"up_proj": weights.up_proj, "down_proj": weights.down_proj}
    if weights.gate_proj is not None:
        projections["gate_proj"] = weights.gate_proj
    if not isinstance(main_grads, tuple | list) or len(main_grads) != len(projections):
        got = f"{len(main_grads)} of them" if isinstance(main_grads, tuple | list) else type(main_grads).__name__
        many = "a pair of buffers, for" if len(projections) == 2 else "three buffers, for"
        raise TypeError(f"moe_mlp: main_grads: expected {many} {' and '.join(projections)}, got {got}")
    for (name, weight), buffer in zip(projections.items(), main_grads, strict=True):
        if buffer is None and not weight.requires_grad:
            continue
        if not isinstance(buffer, Tensor):
            raise TypeError(f"moe_mlp: main_grads: {name}: expected a tensor, got {type(buffer).__name__}")
        alike = buffer.stride() == weight.stride() and (is_transposed(weight) or is_interleaved(weight))
        dense = buffer.is_contiguous() or alike
        fits = buffer.shape == weight.shape and buffer.device == weight.device and dense
        if not fits or buffer.dtype != torch.float32:
            strided = "" if buffer.is_contiguous() else f" with strides {buffer.stride()}"
            order = "contiguous" if weight.is_contiguous() else f"contiguous (or with strides {weight.stride()})"
            raise ValueError(
                f"moe_mlp: main_grads: {name}: expected {order} float32 {tuple(weight.shape)} on {weight.device}, "
                f"got {buffer.dtype} {tuple(buffer.shape)} on {buffer.device}{strided}"
            )
