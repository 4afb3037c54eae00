"""The expert half without a module: for frameworks that keep their own router, and for the layer's own experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from dmoe.activation_functions import ActivationFunction, check_function
from dmoe.activations import Activation
from dmoe.adapter_factors import factors_of, factors_of_several
from dmoe.adapters import Adapters
from dmoe.config import DropOrder, ExpertCompute, GateWeightOn, SavedActivations
from dmoe.expert_inputs import Options, check_call, check_choices, check_planned
from dmoe.expert_weights import ExpertWeights
from dmoe.ops._library import has_triton
from dmoe.ops.activation import accumulate_dtype
from dmoe.ops.block_sparse import block_size_for
from dmoe.ops.block_sparse_mlp import block_sparse_mlp
from dmoe.ops.moe_mlp import moe_mlp as moe_mlp_op
from dmoe.ops.moe_mlp_composed import moe_mlp_composed
from dmoe.ops.moe_mlp_deferred import moe_mlp_deferred
from dmoe.ops.philox import draw_seed
from dmoe.ops.projection import Codes
from dmoe.outputs import as_output
from dmoe.plan import RoutingPlan, device_tile_rows, plan_token_choice, sort_by_group
from dmoe.quantized_weight import QuantizedWeight
from dmoe.strides import bias_beside, is_interleaved, readable

__all__ = ["ExpertWeights", "moe_mlp", "run_experts"]


def moe_mlp(
    x: Tensor,
    expert_indices: Tensor,
    gate_weights: Tensor,
    weights: ExpertWeights,
    *,
    activation: Activation | ActivationFunction = "silu",
    gate_weight_on: GateWeightOn = "output",
    activation_dropout: float = 0.0,
    expert_dropout: float = 0.0,
    capacity: int | None = None,
    drop_order: DropOrder = "token_major",
    backend: str | None = None,
    residual: Tensor | None = None,
    main_grads: Sequence[Tensor | None] | None = None,
    recompute: bool = False,
    adapters: Adapters | Sequence[Adapters] | None = None,
    adapter_ids: Tensor | None = None,
    expert_compute: ExpertCompute | None = None,
    saved_activations: SavedActivations | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """``y_t = sum_k w_tk * expert_{i_tk}(x_t)``: every token through its experts, weighted and summed.

    Args:
        x: ``(..., H)`` floating point, T tokens in all.
        expert_indices: ``(..., K)`` int32 or int64 in [0, E]; E marks a choice that takes no expert.
        gate_weights: ``(..., K)`` floating point, usually float32. Used as given; a dropped choice adds nothing.
        weights: the experts' :class:`dmoe.ExpertWeights`, in x's dtype.
        activation: ``silu``, ``gelu``, ``gelu_tanh``, ``relu``, ``relu_squared`` or ``sigmoid``; with a gate also a
            :class:`dmoe.ClampedSwiGLU` or :class:`dmoe.SoftcappedSwiGLU`; or an elementwise function of a tensor, on a
            slower path (:class:`dmoe.MoEConfig`).
        gate_weight_on: what the weight multiplies: ``output``, ``activation`` (not ``down_bias``) or ``input``.
        activation_dropout, expert_dropout: dropout probabilities; masks are drawn anew in each call when above 0.
        capacity: the most rows one expert takes; None drops nothing.
        drop_order: which choices come first where the capacity binds; see :class:`dmoe.MoEConfig`.
        backend: who computes; see :class:`dmoe.MoEConfig`.
        residual, main_grads, recompute, adapters, adapter_ids, expert_compute, saved_activations, batch_invariant: see
            :func:`run_experts`; ``residual`` is ``(..., H)``, ``adapter_ids`` has x's leading dimensions.

    Returns:
        ``(..., H)``. Gradients flow to x, gate_weights and the weights; saved for backward are x, the up projection's
        pre-activation, the gate weights and index tensors.

    Raises:
        TypeError: something that is no tensor, or of another kind of numbers.
        ValueError: shapes, dtypes, devices or options that do not fit.
        RuntimeError: on the CPU, an expert id outside [0, E], or an adapter's outside [-1, N); forward-mode
            differentiation.
    """
    options = Options(
        activation,
        gate_weight_on,
        activation_dropout,
        expert_dropout,
        backend,
        residual,
        main_grads,
        recompute,
        adapters,
        adapter_ids,
        expert_compute,
        saved_activations,
        batch_invariant,
    )
    check_choices(x, expert_indices, gate_weights, weights)
    options = check_call(x, x.shape[:-1], expert_indices, gate_weights, weights, options)
    gates = _rows(gate_weights)
    plan = plan_token_choice(
        _rows(expert_indices),
        weights.num_experts,
        capacity=capacity,
        drop_order=drop_order,
        priority=gates,
        tile_rows=device_tile_rows(x.device, gates.numel(), weights.num_experts),
    )
    if residual is not None:
        options = options._replace(residual=_rows(residual))
    if adapter_ids is not None:
        options = options._replace(adapter_ids=adapter_ids.reshape(-1))
    y = _compute(_rows(x), plan, gates, weights, options)
    return as_output(y, (*x.shape[:-1], y.shape[-1]))


def run_experts(
    x: Tensor,
    plan: RoutingPlan,
    gate_weights: Tensor,
    weights: ExpertWeights,
    *,
    activation: Activation | ActivationFunction = "silu",
    gate_weight_on: GateWeightOn = "output",
    activation_dropout: float = 0.0,
    expert_dropout: float = 0.0,
    backend: str | None = None,
    residual: Tensor | None = None,
    main_grads: Sequence[Tensor | None] | None = None,
    recompute: bool = False,
    adapters: Adapters | Sequence[Adapters] | None = None,
    adapter_ids: Tensor | None = None,
    expert_compute: ExpertCompute | None = None,
    saved_activations: SavedActivations | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """Every token through its experts, weighted and summed.

    Args:
        x: ``(T, H)`` floating point.
        plan: where tokens go.
        gate_weights: one per assignment, ``(T, K)`` or flat in the order of ``plan.token_rows``.
        weights: the experts. Those that are codes go with the backends None, ``grouped`` and ``torch``.
        activation, gate_weight_on: see :class:`dmoe.MoEConfig`.
        activation_dropout, expert_dropout: probabilities; 0 outside training.
        backend: who computes; see :class:`dmoe.MoEConfig`.
        residual: ``(T, H)``, added to the sum before it is rounded: a shared expert's output, say.
        main_grads: float32 buffers in the shapes of ``up_proj`` and ``down_proj``, and of ``gate_proj`` where there is
            one. Backward adds these gradients to them, and the weights get none (Megatron's ``main_grad``). A frozen
            projection's is left alone, and may be None. Only with the default backend.
        recompute: save x only, not the pre-activation, and compute that again in backward: ``R * F`` numbers (gated:
            ``R * 2 F``) less memory, a sixth of a training step's products (gated: 22%) more. Only with the default
            backend.
        adapters: low-rank ones beside the projections (:class:`dmoe.Adapters`), multiplied factor by factor; or a list
            of N, one of them chosen by each token. Weights that are frozen then cost backward no gradient. Not with
            ``main_grads``, nor block-sparse products.
        adapter_ids: ``(T,)`` int32 or int64 in [-1, N), which of a list of adapters each token takes; -1 takes none.
        expert_compute: ``fp8`` for products of e4m3 codes, forward and backward to x; gradients of weights, and the
            factors of adapters, stay in x's dtype (``docs/fp8.md``). Not with ``main_grads``, weights that are codes,
            nor the backends ``block_sparse`` and ``reference``.
        saved_activations: ``fp8`` for x and the pre-activation kept for backward as codes, with whatever products. Not
            with ``main_grads``, nor the backends ``block_sparse`` and ``reference``.
        batch_invariant: a token's output, and the gradients of its x and gate weights, have the same bits whatever else
            is in the batch and whichever row it is (``docs/reinforcement.md``). Without dropout, adapters, codes, fp8
            and functions as activations, and on the compiled CPU kernels alone.

    Returns:
        ``(T, H)`` in x's dtype (autocast's under autocast).

    Raises:
        TypeError: something that is no tensor, or of another kind of numbers.
        ValueError: sizes, dtypes, devices or options that do not fit together.
        NotImplementedError: ``batch_invariant`` where nothing promises it.
    """
    options = Options(
        activation,
        gate_weight_on,
        activation_dropout,
        expert_dropout,
        backend,
        residual,
        main_grads,
        recompute,
        adapters,
        adapter_ids,
        expert_compute,
        saved_activations,
        batch_invariant,
    )
    check_planned(plan, gate_weights, weights)
    options = check_call(x, (plan.num_tokens,), plan.token_rows, gate_weights, weights, options)
    return _compute(x, plan, gate_weights, weights, options)


def _rows(tensor: Tensor) -> Tensor:
    """``(..., C)`` as ``(rows, C)``. A view costs microseconds, of which a call for one token has a few dozen."""
    return tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])


def _compute(x: Tensor, plan: RoutingPlan, gate_weights: Tensor, weights: ExpertWeights, options: Options) -> Tensor:
    """Which operation, on which arguments: those of :func:`run_experts`, checked."""
    gate_weights = gate_weights.to(accumulate_dtype(x.dtype))
    packed, gate_proj = bool(weights.ffn_sizes), weights.gate_proj
    up_proj, down_proj = (_operand(weight, packed) for weight in (weights.up_proj, weights.down_proj))
    gate_proj = None if gate_proj is None else _operand(gate_proj, packed)
    composed = options.is_composed(weights)
    if gate_proj is not None and x.is_cuda and not composed and gate_proj.stride() != up_proj.stride():
        gate_proj, up_proj = gate_proj.contiguous(), up_proj.contiguous()  # one kernel reads both, in one way
    up_bias = weights.up_bias
    if up_bias is not None and isinstance(up_proj, Tensor):
        up_bias = bias_beside(up_bias, up_proj)
    up = down = group_offsets = None
    interleaved = weights.gated and gate_proj is None and not packed and _takes_turns(up_proj)
    if isinstance(options.adapters, Adapters):
        up, down = factors_of(options.adapters, weights, interleaved)
    elif options.adapters is not None and options.adapter_ids is not None:
        up, down = factors_of_several(options.adapters, weights, interleaved)
        plan, group_offsets = sort_by_group(plan, options.adapter_ids, len(options.adapters))
    drops = any((options.activation_dropout, options.expert_dropout, *(low.dropout for low in (up, down) if low)))
    seed = draw_seed(x.device) if drops else None
    arguments: tuple[Any, ...] = (
        x.contiguous(),
        gate_weights.contiguous(),
        up_proj,
        down_proj,
        up_bias,
        None if weights.down_bias is None else weights.down_bias.contiguous(),
        plan.expert_offsets,
        plan.row_to_token,
        plan.row_to_slot,
        plan.token_offsets,
        plan.token_rows,
        seed,
        list(weights.ffn_sizes) or None,  # an empty list is what AOTInductor's runtime cannot read back
        options.activation if callable(options.activation) else str(options.activation),
        weights.gated,
        options.gate_weight_on,
        options.activation_dropout,
        options.expert_dropout,
    )
    if callable(options.activation):
        return _with_function(options.activation, up, down, group_offsets, arguments, gate_proj, options)
    if composed:
        return _composed(up, down, group_offsets, arguments, gate_proj, options)
    backend, residual, recompute = options.backend, options.residual, options.recompute
    plain = options.main_grads is None and not recompute and not options.batch_invariant
    if backend == "block_sparse" or (backend is None and plain and _block_sparse_by_default(x, weights)):
        y = block_sparse_mlp(*_in_one_piece(arguments, weights))
        return y if residual is None else y + residual.to(y.dtype)
    up_main_grad, down_main_grad, gate_main_grad = (*(options.main_grads or ()), None, None, None)[:3]
    arguments = (
        *arguments,
        None if residual is None else residual.contiguous(),
        plan.tiles,
        plan.experts_by_load,
        plan.tile_rows,
        up_main_grad,
        down_main_grad,
        gate_proj,
        gate_main_grad,
    )
    if options.batch_invariant:
        return moe_mlp_op(*arguments, recompute=recompute, batch_invariant=True)
    if weights.later is not None and backend in (None, "grouped") and torch.is_grad_enabled():
        return moe_mlp_deferred(weights.later, *arguments, recompute=recompute)
    return moe_mlp_op(*arguments, backend=backend, recompute=recompute)


def _composed(
    up: Any, down: Any, group_offsets: Any, arguments: tuple[Any, ...], gate: Any, options: Options
) -> Tensor:
    """On the composition, which takes what the kernels do not know."""
    behind = (options.residual, None, None, 0, None, None, gate)
    return moe_mlp_composed(
        up,
        down,
        group_offsets,
        *arguments,
        *behind,
        backend=options.backend,
        recompute=options.recompute,
        compute=options.expert_compute,
        saved=options.saved_activations,
    )


def _with_function(function: ActivationFunction, *arguments: Any) -> Tensor:
    """The same with somebody's function, which runs as it is, not as a compiler sees it."""
    return (_outside_graphs if torch.compiler.is_dynamo_compiling() else _checked)(function, *arguments)


def _checked(
    function: ActivationFunction, up: Any, down: Any, group_offsets: Any, arguments: Any, *rest: Any
) -> Tensor:
    x = arguments[0]
    if not is_fake(x):
        check_function(function, "moe_mlp", x.device, accumulate_dtype(x.dtype))
    return _composed(up, down, group_offsets, arguments, *rest)


# torch.compiler.disable would import dynamo with dmoe, which takes seconds.
_outside_graphs: Any = torch._disable_dynamo(_checked)  # type: ignore[attr-defined]


def _operand(weight: Any, packed: bool) -> Any:
    """A projection as operations read it."""
    return weight.operand if isinstance(weight, QuantizedWeight) else readable(weight, packed=packed)


def _takes_turns(up: Tensor | Codes) -> bool:
    return up.interleaved if isinstance(up, Codes) else is_interleaved(up)


def _in_one_piece(arguments: tuple[Any, ...], weights: ExpertWeights) -> tuple[Any, ...]:
    """The same in contiguous memory, gate and up in one: block-sparse products know no other layout."""
    up, down, up_bias = weights.up_proj, weights.down_proj, weights.up_bias
    if weights.gate_proj is not None:
        up = torch.stack([weights.gate_proj, up], 0 if weights.ffn_sizes else 1)
    up_bias = None if up_bias is None else up_bias.contiguous()
    return *arguments[:2], up.contiguous(), down.contiguous(), up_bias, *arguments[5:]


def _block_sparse_by_default(x: Tensor, weights: ExpertWeights) -> bool:
    """Widths that differ, on a GPU: the other way would compute every expert as wide as the widest."""
    suits = x.is_cuda and bool(weights.ffn_sizes) and x.dtype != torch.float64
    return suits and block_size_for(weights.ffn_sizes) is not None and has_triton()
