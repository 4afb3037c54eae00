"""The options of a :class:`dmoe.MoE` that its tensors tell, by their names and shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dmoe.checkpoint.stored import Stored
from dmoe.routing import Cosine


def options_of(layer: Mapping[str, Stored]) -> dict[str, Any]:
    """Fields of :class:`dmoe.MoEConfig` that a layer's tensors, under dmoe's names, settle."""
    experts, hidden, width = layer["experts.down_proj"].shape
    shared = layer.get("shared_expert.mlp.down_proj")
    biased = "experts.up_bias" in layer or "experts.gate_up_bias" in layer or "experts.down_bias" in layer
    told: dict[str, Any] = {
        "hidden_size": hidden,
        "ffn_hidden_size": width,
        "num_experts": experts,
        "gated": "experts.gate_up_proj" in layer,
        "bias": "expert" if biased else "output" if "output_bias" in layer else "none",
        "router_bias": "router.bias" in layer,
        "selection_bias": "router.selection_bias" in layer or "router.qb_beta" in layer,
        "shared_ffn_hidden_size": None if shared is None else shared.shape[-1],
        "shared_expert_gate": "shared_expert.gate.weight" in layer,
    }
    if "router.qb_beta" in layer:
        told["selection_bias_rule"] = "quantile"
    if "router.projection" in layer:
        told["router"] = Cosine(dim=layer["router.projection"].shape[0])
    return told
