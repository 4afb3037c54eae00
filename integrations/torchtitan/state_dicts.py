"""torchtitan's names of a mixture of experts, and dmoe's, one to the other.

================================================  =========================================================
torchtitan, under ``layers.N.moe.``               dmoe, there
================================================  =========================================================
``router.gate.weight``, ``bias``                  ``router.weight``, ``bias``
``expert_bias_E``                                 ``router.selection_bias``
``routed_experts.inner_experts.w1_EFD, w3_EFD``   ``experts.gate_up_proj (E, 2, F, H)``
``... .w2_EDF``                                   ``experts.down_proj (E, H, F)``
``... .mlp1_weight_EGD, mlp1_bias_EG`` (GPT-OSS)  ``experts.gate_up_proj``, ``gate_up_bias``: gate and up apart
``... .mlp2_weight_EDF, mlp2_bias_ED``            ``experts.down_proj``, ``down_bias``
``shared_experts.w1, w3, w2`` (``.weight``)       ``shared_expert.mlp.gate_up_proj``, ``down_proj``, of one expert
================================================  =========================================================

A model trained with ``overrides.experts`` has torchtitan's names already: distributed checkpoints, the conversion to
Hugging Face (``checkpoint.last_save_in_hf``) and ``initial_load_in_hf`` need none of this.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_SAME = {
    "router.gate.weight": "router.weight",
    "router.gate.bias": "router.bias",
    "expert_bias_E": "router.selection_bias",
    "routed_experts.inner_experts.w2_EDF": "experts.down_proj",
    "routed_experts.inner_experts.mlp2_weight_EDF": "experts.down_proj",
    "routed_experts.inner_experts.mlp2_bias_ED": "experts.down_bias",
}
_PAIRS = {  # dmoe's: gate and up there
    "experts.gate_up_proj": ("routed_experts.inner_experts.w1_EFD", "routed_experts.inner_experts.w3_EFD"),
    "shared_expert.mlp.gate_up_proj": ("shared_experts.w1.weight", "shared_experts.w3.weight"),
}
_TURNS = {  # rows of gate and up take turns there
    "routed_experts.inner_experts.mlp1_weight_EGD": "experts.gate_up_proj",
    "routed_experts.inner_experts.mlp1_bias_EG": "experts.gate_up_bias",
}
_SHARED_DOWN = ("shared_experts.w2.weight", "shared_expert.mlp.down_proj")
_LAYER = re.compile(r"(?P<layer>(?:.+\.)?moe\.)(?P<name>.+)")


def to_dmoe(state: Mapping[str, Any]) -> dict[str, Any]:
    """A model's state with dmoe's names for its mixtures of experts; everything else stays as it is.

    Args:
        state: whole tensors by torchtitan's names, of a model, or of one layer under ``moe.``; not changed.

    Returns:
        Tensors, of which those that are put together are new.

    Raises:
        ValueError: half of a pair is missing, a name under ``moe.`` that is not known, or a ``DTensor``.
    """
    found: dict[str, Any] = {}
    waiting: dict[str, dict[int, Tensor]] = {}
    halves = {name: (ours, half) for ours, pair in _PAIRS.items() for half, name in enumerate(pair)}
    for key, value in state.items():
        layer, name = _split(key)
        if layer is None:
            found[key] = value
            continue
        _check_whole("to_dmoe", key, value)
        if name in halves:
            ours, half = halves[name]
            waiting.setdefault(layer + ours, {})[half] = value
        elif name in _TURNS:
            found[layer + _TURNS[name]] = value.unflatten(1, (-1, 2)).transpose(1, 2).contiguous()
        elif name == _SHARED_DOWN[0]:
            found[layer + _SHARED_DOWN[1]] = value.unsqueeze(0)
        elif name in _SAME:
            found[layer + _SAME[name]] = value
        else:
            raise ValueError(f"to_dmoe: {key}: expected a name of torchtitan's MoE, got one that is not known")
    for key, parts in waiting.items():
        layer, ours = _split(key)
        if len(parts) < 2:
            missing = _PAIRS[ours][1 - next(iter(parts))]
            raise ValueError(f"to_dmoe: {layer}{missing}: expected it beside the other half, got none")
        if ours.startswith("shared_expert."):
            parts = {half: part.unsqueeze(0) for half, part in parts.items()}
        found[key] = torch.stack([parts[0], parts[1]], 1)
    return found


def from_dmoe(state: Mapping[str, Any]) -> dict[str, Any]:
    """The way back of :func:`to_dmoe`: a state with torchtitan's names.

    Args:
        state: whole tensors by dmoe's names under ``moe.``; not changed. Experts with biases are GPT-OSS's.

    Returns:
        Tensors, new where dmoe has gate and up in one.

    Raises:
        ValueError: a name under ``moe.`` that torchtitan has nothing for, or a ``DTensor``.
    """
    found: dict[str, Any] = {}
    back = {ours: theirs for theirs, ours in _SAME.items() if "mlp2" not in theirs}
    back_gpt_oss = {ours: theirs for theirs, ours in (_SAME | _TURNS).items() if "mlp" in theirs}
    gpt_oss = {_split(key)[0] for key in state if key.endswith("moe.experts.down_bias")}
    for key, value in state.items():
        layer, name = _split(key)
        if layer is None:
            found[key] = value
            continue
        _check_whole("from_dmoe", key, value)
        if layer in gpt_oss and name in back_gpt_oss:
            turns = name.startswith("experts.gate_up")
            found[layer + back_gpt_oss[name]] = value.transpose(1, 2).flatten(1, 2) if turns else value
        elif name in _PAIRS:
            whole = value.squeeze(0).unbind(0) if name.startswith("shared_expert.") else value.unbind(1)
            found |= {layer + theirs: part.contiguous() for theirs, part in zip(_PAIRS[name], whole, strict=True)}
        elif name == _SHARED_DOWN[1]:
            found[layer + _SHARED_DOWN[0]] = value.squeeze(0)
        elif name in back:
            found[layer + back[name]] = value
        else:
            raise ValueError(f"from_dmoe: {key}: expected a name that torchtitan's MoE has, got one that it has not")
    return found


def _split(key: str) -> tuple[str | None, str]:
    """The layer, ``layers.3.moe.``, and the name in it; None where the key is of no mixture of experts."""
    match = _LAYER.fullmatch(key)
    return (None, key) if match is None else (match["layer"], match["name"])


def _check_whole(operation: str, key: str, value: Any) -> None:
    if type(value).__name__ == "DTensor":
        raise ValueError(
            f"{operation}: {key}: expected a whole tensor, got a DTensor: take value.full_tensor(), or what "
            "torch.distributed.checkpoint loads in one process"
        )
