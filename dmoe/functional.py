"""The expert half without a module, for frameworks that keep their own router."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dmoe.config import Activation, DropOrder, GateWeightOn
from dmoe.expert_weights import ExpertWeights
from dmoe.experts import run_experts
from dmoe.ops._checks import check_tensors
from dmoe.plan import device_tile_rows, plan_token_choice

__all__ = ["ExpertWeights", "moe_mlp"]


def moe_mlp(
    x: Tensor,
    expert_indices: Tensor,
    gate_weights: Tensor,
    weights: ExpertWeights,
    *,
    activation: Activation = "silu",
    gate_weight_on: GateWeightOn = "output",
    activation_dropout: float = 0.0,
    expert_dropout: float = 0.0,
    capacity: int | None = None,
    drop_order: DropOrder = "token_major",
    backend: str | None = None,
    residual: Tensor | None = None,
    main_grads: Sequence[Tensor | None] | None = None,
    recompute: bool = False,
) -> Tensor:
    """``y_t = sum_k w_tk * expert_{i_tk}(x_t)``: every token through its experts, weighted and summed.

    Args:
        x: ``(..., H)`` floating point, T tokens in all.
        expert_indices: ``(..., K)`` int32 or int64 in [0, E]; E marks a choice that takes no expert.
        gate_weights: ``(..., K)`` floating point, usually float32. Used as given; a dropped choice adds nothing.
        weights: the experts' :class:`dmoe.ExpertWeights`, in x's dtype.
        activation: ``silu``, ``gelu``, ``gelu_tanh`` or ``relu``.
        gate_weight_on: what the weight multiplies: ``output``, ``activation`` (not ``down_bias``) or ``input``.
        activation_dropout, expert_dropout: dropout probabilities; masks are drawn anew in each call when above 0.
        capacity: the most rows one expert takes; None drops nothing.
        drop_order: which choices come first where the capacity binds; see :class:`dmoe.MoEConfig`.
        backend: ``reference`` for plain PyTorch, differentiable twice; ``block_sparse`` for block-sparse products; None
            or ``grouped`` otherwise.
        residual, main_grads, recompute: see :func:`dmoe.experts.run_experts`; ``residual`` is ``(..., H)``.

    Returns:
        ``(..., H)``. Gradients flow to x, gate_weights and the weights; saved for backward are x, the up projection's
        pre-activation, the gate weights and index tensors.

    Raises:
        TypeError: something that is no tensor, or of another kind of numbers.
        ValueError: shapes, dtypes, devices or options that do not fit.
        RuntimeError: on the CPU, an expert id outside [0, E].
    """
    if activation not in ("gelu", "gelu_tanh", "relu", "silu"):
        raise ValueError(f"moe_mlp: activation: expected gelu, gelu_tanh, relu or silu, got {activation!r}")
    if gate_weight_on not in ("output", "activation", "input"):
        raise ValueError(f"moe_mlp: gate_weight_on: expected output, activation or input, got {gate_weight_on!r}")
    for name, p in (("activation_dropout", activation_dropout), ("expert_dropout", expert_dropout)):
        if not isinstance(p, int | float) or not 0 <= p < 1:
            raise ValueError(f"moe_mlp: {name}: expected 0 <= p < 1, got {p!r}")
    check_tensors("moe_mlp", x=x, expert_indices=expert_indices, gate_weights=gate_weights)
    if not isinstance(weights, ExpertWeights):
        raise TypeError(f"moe_mlp: weights: expected ExpertWeights, got {type(weights).__name__}")
    if expert_indices.shape != gate_weights.shape or expert_indices.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            "moe_mlp: expected x (..., H), expert_indices (..., K) and gate_weights (..., K), got "
            f"{tuple(x.shape)}, {tuple(expert_indices.shape)} and {tuple(gate_weights.shape)}"
        )
    top_k = expert_indices.shape[-1]
    if top_k < 1:
        raise ValueError(
            f"moe_mlp: expert_indices: expected shape (..., K) with K >= 1, got {tuple(expert_indices.shape)}"
        )
    if residual is not None:
        check_tensors("moe_mlp", residual=residual)
        if residual.shape != x.shape:
            raise ValueError(f"moe_mlp: residual: expected x's shape {tuple(x.shape)}, got {tuple(residual.shape)}")
    gates = gate_weights.reshape(-1, top_k)
    plan = plan_token_choice(
        expert_indices.reshape(-1, top_k),
        weights.num_experts,
        capacity=capacity,
        drop_order=drop_order,
        priority=gates,
        tile_rows=device_tile_rows(x.device, gates.numel(), weights.num_experts),
    )
    y = run_experts(
        x.reshape(-1, x.shape[-1]),
        plan,
        gates,
        weights,
        activation=activation,
        gate_weight_on=gate_weight_on,
        activation_dropout=activation_dropout,
        expert_dropout=expert_dropout,
        backend=backend,
        residual=None if residual is None else residual.reshape(-1, residual.shape[-1]),
        main_grads=main_grads,
        recompute=recompute,
    )
    return y.view(*x.shape[:-1], y.shape[-1])
