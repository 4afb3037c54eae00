"""A layer's state under DeepSpeed's names, one expert after the other, as its engine saves and loads them.

==============================================  ========================================================================
``router.weight``, other tensors of ``router``  ``deepspeed_moe.gate.wg.weight``, ``deepspeed_moe.gate.*``
``experts.*``                                   ``deepspeed_moe.experts.deepspeed_experts.{n}.`` and ``w1`` (gate),
                                                ``w3`` (up), ``w2`` (down), or ``dense_h_to_4h`` and ``dense_4h_to_h``
                                                where experts have no gate; ``.weight``, ``.bias``
``shared_expert.*``                             ``deepspeed_moe.shared.*``
==============================================  ========================================================================

``n`` counts the experts of this rank. The engine takes whatever has "expert" in its name for a tensor of one of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

import dmoe
from dmoe.functional import ExpertWeights

_STACK = "deepspeed_moe.experts.deepspeed_experts."
_RENAMED = (  # the first that fits
    ("router.weight", "deepspeed_moe.gate.wg.weight"),
    ("router.", "deepspeed_moe.gate."),
    ("shared_expert.", "deepspeed_moe.shared."),
)
_LINEARS: dict[bool, dict[str, tuple[str, ...]]] = {
    True: {"up": ("w1", "w3"), "down": ("w2",)},
    False: {"up": ("dense_h_to_4h",), "down": ("dense_4h_to_h",)},
}


def add_state_hooks(layer: dmoe.MoE) -> None:
    """Let a layer be saved and loaded under DeepSpeed's names from now on; it still loads its own."""
    layer.register_state_dict_post_hook(_rename)
    layer.register_load_state_dict_pre_hook(_rename_back)


def _rename(layer: dmoe.MoE, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name in [name for name in state if name.startswith(prefix)]:
        own = name[len(prefix) :]
        if own.startswith("experts."):
            del state[name]
        else:
            state[prefix + _replaced(own, _RENAMED)] = state.pop(name)
    for expert, name, tensor in _tensors(layer.experts.weights()):
        state[f"{prefix}{_STACK}{expert}.{name}"] = tensor.detach()


def _rename_back(
    layer: dmoe.MoE,
    state: Any,
    prefix: str,
    metadata: Any,
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    back = tuple((theirs, ours) for ours, theirs in _RENAMED)
    if not any(name.startswith(f"{prefix}deepspeed_moe.") for name in state):
        return
    experts: Any = layer.experts
    now: ExpertWeights = experts.weights()
    stacks = {
        field: tensor.detach().to("cpu", copy=True)
        for field in ("up_proj", "down_proj", "up_bias", "down_bias")
        if (tensor := getattr(now, field)) is not None
    }
    for expert, name, part in _tensors(ExpertWeights(**stacks, gated=now.gated, ffn_sizes=now.ffn_sizes)):
        key = f"{prefix}{_STACK}{expert}.{name}"
        if key not in state:
            missing.append(key)
        elif state[key].shape != part.shape:
            errors.append(f"{key}: expected shape {tuple(part.shape)}, got {tuple(state.pop(key).shape)}")
        else:
            part.copy_(state.pop(key))
    for name in [name for name in state if name.startswith(prefix) and not name.startswith(prefix + _STACK)]:
        state[prefix + _replaced(name[len(prefix) :], back)] = state.pop(name)
    names = {"up_proj": experts.up_name, "up_bias": experts.up_bias_name}
    for field, stack in stacks.items():
        state[f"{prefix}experts.{names.get(field, field)}"] = stack


def _tensors(weights: ExpertWeights) -> Iterator[tuple[int, str, Tensor]]:
    """Every expert's tensors: its number, DeepSpeed's name behind it, and a view of the weights."""
    for expert in range(weights.num_experts):
        for field, tensor in weights.of_expert(expert).items():
            projection, kind = field.split("_")
            linears = _LINEARS[weights.gated][projection]
            parts = tuple(tensor) if len(linears) > 1 else (tensor,)  # gate and up are one stack
            for linear, part in zip(linears, parts, strict=True):
                yield expert, f"{linear}.{'weight' if kind == 'proj' else 'bias'}", part


def _replaced(name: str, table: tuple[tuple[str, str], ...]) -> str:
    for start, instead in table:
        if name.startswith(start):
            return instead + name[len(start) :]
    return name
