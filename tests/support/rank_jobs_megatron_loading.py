"""What a process is told to do about plain state dicts that do not fit: load them as Megatron does."""

from __future__ import annotations

from unittest.mock import patch

import rank_jobs_megatron as jobs
import torch
from megatron.core.transformer.moe.moe_layer import MoELayer

from dmoe.integrations.megatron import convert_state
from dmoe.integrations.megatron.expert_layouts import LAYOUTS
from dmoe.integrations.megatron.loading import guard_megatrons_own_layer


def _told(model, state):
    """Megatron's way: strictly, and once more without where that failed; the sentence that ends it, or None."""
    try:
        try:
            model.load_state_dict(state, strict=True)
        except Exception:
            model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        return str(error)
    return None


def _mlp(state, keep):
    return {name: value for name, value in state.items() if ".mlp." not in name or keep(name)}


def loads(group, case, impls, store):
    """``{impl: {what: sentence or None}}`` of each kind of state dict."""
    jobs.connect(case.ranks, store)
    native = jobs.build(case, "native")[1].state_dict()
    states = {layout: convert_state(native, layout) for layout in LAYOUTS if layout != "grouped" or not _biased(case)}
    router = {name: value for name, value in native.items() if name.endswith("router.weight")}
    before = "decoder.layers.0.mlp."
    states["megablocks"] = _mlp(native, lambda name: False) | {
        f"{before}router.layer.weight": router[f"{before}router.weight"],
        f"{before}experts.mlp.w1": torch.zeros(8),
        f"{before}experts.mlp.w2": torch.zeros(8),
    }
    states["only a router"] = _mlp(native, lambda name: "router" in name)
    states["no router"] = _mlp(states["dmoe"], lambda name: "router" not in name)
    states["one projection"] = _mlp(states["dmoe"], lambda name: "down_proj" not in name)
    states["nothing of the layer"] = {name: value for name, value in native.items() if "embedding" in name}
    found = {}
    with patch.object(MoELayer, "_load_from_state_dict", MoELayer._load_from_state_dict):  # and back
        guard_megatrons_own_layer()
        guard_megatrons_own_layer()  # asked for twice it is there once
        for impl in impls:
            found[impl] = {what: _told(jobs.build(case, impl)[1], state) for what, state in states.items()}
    return found


def _biased(case):
    return case.config.get("add_bias_linear", False)
