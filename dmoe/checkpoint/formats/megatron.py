"""Megatron-Core's three ways to keep experts: a module each, Transformer Engine's grouped linear, one matrix for all.

Names stand behind the layer's own prefix, as ``decoder.layers.0.mlp.``; X is F, or 2 F where experts are gated (gate,
then up). Ranks hold E / W experts each under local numbers, in order. ``_extra_state``, what Transformer Engine keeps
beside its weights, has no counterpart and is left out.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from dmoe.checkpoint.formats.rank_files import RankFiles
from dmoe.checkpoint.layers import Layout, Row
from dmoe.checkpoint.maps import FLAT_TRANSPOSED, Map
from dmoe.checkpoint.stored import mapped, reshaped
from dmoe.config import MoEConfig

# (H, E X) whose memory is (E, H, X): the shape says what the memory does not
_GROUPED = Map(
    lambda parts, sizes: mapped(
        [reshaped(parts[0], (sizes.experts, parts[0].shape[0], parts[0].shape[1] // sizes.experts))],
        lambda tensors: tensors[0].mT,
        by_rows=True,
    ),
    lambda ours, _: [
        reshaped(
            mapped([ours], lambda tensors: tensors[0].mT, by_rows=True), (ours.shape[2], ours.shape[0] * ours.shape[1])
        )
    ],
)
ROUTER = (
    Row("router.weight", ("router.weight",)),
    Row("router.bias", ("router.bias",)),
    Row("router.selection_bias", ("router.expert_bias",)),
    Row("router.qb_beta", ("router.qb_beta",)),
)
SHARED = (
    Row("shared_gate", ("shared_experts.gate_weight",)),
    Row("shared_up", ("shared_experts.linear_fc1.weight",)),
    Row("shared_up_bias", ("shared_experts.linear_fc1.bias",)),
    Row("shared_down", ("shared_experts.linear_fc2.weight",)),
    Row("shared_down_bias", ("shared_experts.linear_fc2.bias",)),
)
EXPERTS = {
    "sequential": (
        Row("up", ("experts.local_experts.{e}.linear_fc1.weight",)),
        Row("up_bias", ("experts.local_experts.{e}.linear_fc1.bias",)),
        Row("down", ("experts.local_experts.{e}.linear_fc2.weight",)),
        Row("down_bias", ("experts.local_experts.{e}.linear_fc2.bias",)),
    ),
    "te": (
        Row("up", ("experts.linear_fc1.weight{e}",)),
        Row("up_bias", ("experts.linear_fc1.bias{e}",)),
        Row("down", ("experts.linear_fc2.weight{e}",)),
        Row("down_bias", ("experts.linear_fc2.bias{e}",)),
    ),
    "grouped": (
        Row("up", ("experts.weight1",), _GROUPED, counted=True),
        Row("down", ("experts.weight2",), FLAT_TRANSPOSED, counted=True),
    ),
}
LEFT_OUT = r"\._extra_state$"
LAYOUTS = {name: Layout(name, (*ROUTER, *rows, *SHARED), left_out=LEFT_OUT) for name, rows in EXPERTS.items()}
_ABOUT = {
    "sequential": "Megatron-Core's SequentialMLP: a module for each expert",
    "te": "Megatron-Core's TEGroupedMLP: Transformer Engine's weight0, weight1, ...",
    "grouped": "Megatron-Core's GroupedMLP (up to 0.16): one matrix for all experts",
}


def _config(beside: Mapping[str, Any], **facts: Any) -> MoEConfig:
    """What Megatron's ``args`` say of the layers, where a file holds them; else its defaults."""
    args = beside.get("args")
    told: dict[str, Any] = {"top_k": 2, "softmax_order": "after_topk"}
    if isinstance(args, Namespace):
        known = vars(args)
        score = known.get("moe_router_score_function", "softmax")
        told = {
            "top_k": known.get("moe_router_topk", 2),
            "score_function": {"sqrtsoftplus": "sqrt_softplus"}.get(score, score),
            "gate_scale": known.get("moe_router_topk_scaling_factor") or 1.0,
            "activation": _activation(known),
        }
        if score == "softmax":
            told["softmax_order"] = "before_topk" if known.get("moe_router_pre_softmax") else "after_topk"
        elif told["top_k"] > 1:
            told["gate_normalization"] = 1.0
    elif not facts["gated"]:
        told["activation"] = "gelu"
    return MoEConfig(**{**told, **facts})


def _activation(args: Mapping[str, Any]) -> str:
    if args.get("swiglu"):
        return "silu"
    if args.get("squared_relu"):
        return "relu_squared"
    return "gelu_tanh" if args.get("openai_gelu") else "gelu"


FORMATS = [
    RankFiles(f"megatron-{name}", _ABOUT[name], (layout,), _config, container="model")
    for name, layout in LAYOUTS.items()
]
