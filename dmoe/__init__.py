"""dmoe: a dropless Mixture-of-Experts layer for PyTorch."""

from __future__ import annotations

from dmoe import (
    checkpoint,
    dense_copies,
    functional,
    lora,
    losses,
    metrics,
    models,
    monitoring,
    ops,
    optim,
    parallel,
    presets,
    quant,
    routing,
)
from dmoe.activations import ClampedSwiGLU, SoftcappedSwiGLU
from dmoe.adapters import Adapters, LowRank
from dmoe.config import MoEConfig
from dmoe.config_json import config_from_json, config_to_json
from dmoe.expert_weights import ExpertWeights
from dmoe.functional import run_experts
from dmoe.info import info
from dmoe.layer import MoE
from dmoe.model_tools import (
    attach_aux_losses,
    attached_aux_loss,
    aux_loss,
    is_expert_param,
    moe_layers,
    reduce_metrics,
    set_aux_loss_scale,
    update_selection_bias,
)
from dmoe.monitoring import monitor
from dmoe.other_experts import OtherExperts, register_experts
from dmoe.plan import RoutingPlan, device_tile_rows, plan_expert_choice, plan_token_choice
from dmoe.quantized_weight import QuantizedWeight
from dmoe.replace import replace_ffn
from dmoe.replay import record_routing, replay_routing
from dmoe.residual import ResidualMoE
from dmoe.routing import Routing
from dmoe.routing_record import RoutingRecord

__version__ = "0.1.0"

__all__ = [
    "Adapters",
    "ClampedSwiGLU",
    "ExpertWeights",
    "LowRank",
    "MoE",
    "MoEConfig",
    "OtherExperts",
    "QuantizedWeight",
    "ResidualMoE",
    "Routing",
    "RoutingPlan",
    "RoutingRecord",
    "SoftcappedSwiGLU",
    "attach_aux_losses",
    "attached_aux_loss",
    "aux_loss",
    "checkpoint",
    "config_from_json",
    "config_to_json",
    "dense_copies",
    "device_tile_rows",
    "functional",
    "info",
    "is_expert_param",
    "lora",
    "losses",
    "metrics",
    "models",
    "moe_layers",
    "monitor",
    "monitoring",
    "ops",
    "optim",
    "parallel",
    "plan_expert_choice",
    "plan_token_choice",
    "presets",
    "quant",
    "record_routing",
    "reduce_metrics",
    "register_experts",
    "replace_ffn",
    "replay_routing",
    "routing",
    "run_experts",
    "set_aux_loss_scale",
    "update_selection_bias",
]
