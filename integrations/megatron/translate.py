"""From Megatron's ``TransformerConfig`` to :class:`dmoe.MoEConfig`: what each option becomes, field by field.

Options that dmoe does not carry are in ``refusals.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F

from dmoe import MoEConfig
from dmoe.integrations.megatron.refusals import LOSSES, refuse, refuse_uncarried
from dmoe.integrations.naming import by_flags
from dmoe.routing import Sinkhorn

# Fields of MoEConfig that Megatron has no option for. With ``bias="output"``, one bias of the whole layer, and
# ``activation="gelu_tanh"`` a layer is as MegaBlocks' fork of Megatron trains it.
OPTIONS = (
    "activation",
    "backend",
    "bias",
    "drop_order",
    "max_rows_received",
    "min_capacity",
    "overlap_degree",
    "recompute_pre_activation",
    "wire_backward",
    "wire_dtype",
)
PREFIX = "moe_dmoe_"  # of the attributes in Megatron's args; the flags are --moe-dmoe-...
# What dmoe's checks of a field are about, to whoever gave flags.
FLAGS = {name: "--" + (PREFIX + name).replace("_", "-") for name in OPTIONS} | {
    "accumulate_main_grad": "--gradient-accumulation-fusion",
    "capacity_factor": "--moe-expert-capacity-factor",
    "ffn_hidden_size": "--moe-ffn-hidden-size",
    "gate_scale": "--moe-router-topk-scaling-factor",
    "hidden_size": "--hidden-size",
    "input_jitter": "--moe-input-jitter-eps",
    "num_experts": "--num-experts",
    "num_groups": "--moe-router-num-groups",
    "selection_bias_decay": "--moe-router-quantile-balancing-ema",
    "top_k": "--moe-router-topk",
    "top_k_groups": "--moe-router-group-topk",
}
_SCORES = {"softmax": "softmax", "sigmoid": "sigmoid", "sqrtsoftplus": "sqrt_softplus"}
EXPERT_OPTIONS = ("activation", "backend", "recompute_pre_activation")  # where router and dispatcher are Megatron's


@by_flags(FLAGS, "dmoe.integrations.megatron: ")
def moe_config(config: Any, options: Mapping[str, Any] | None = None) -> MoEConfig:
    """What a layer of dmoe has to be, to be what a ``TransformerConfig`` asks for.

    Args:
        config: ``megatron.core.transformer.TransformerConfig``.
        options: fields of :class:`dmoe.MoEConfig` that have no name in Megatron, any of :data:`OPTIONS`.

    Raises:
        ValueError: an option that dmoe does not carry, named as Megatron's flag, with a way out.
    """
    refuse_uncarried(config)
    fields = _experts(config) | _router(config) | _capacity(config) | _checked(options)
    return MoEConfig(
        top_k=config.moe_router_topk,
        accumulate_main_grad=_adds_to_main_grad(config, fields),
        # The factors themselves are Megatron's business (losses.py); here they say which values the router hands out.
        load_balancing_coefficient=sum(coefficients(config).values()),
        router_z_loss_coefficient=config.moe_z_loss_coeff or 0.0,
        **fields,
    )


@by_flags(FLAGS, "dmoe.integrations.megatron: ")
def experts_config(config: Any, options: Mapping[str, Any] | None = None) -> MoEConfig:
    """The same for the experts alone, whose tokens Megatron's own router and dispatcher choose and bring.

    Args, Raises: as for :func:`moe_config`; what belongs to router and dispatcher is not looked at.
    """
    refuse_uncarried(config, experts_only=True)
    fields = _experts(config) | _checked(options, EXPERT_OPTIONS)
    return MoEConfig(top_k=1, accumulate_main_grad=_adds_to_main_grad(config, fields), **fields)


def _adds_to_main_grad(config: Any, fields: Mapping[str, Any]) -> bool:
    """Whether gradients go straight into ``main_grad``: the same sums, where dmoe's other options leave that open."""
    whole = fields.get("overlap_degree", 1) == 1 and fields.get("backend") in (None, "grouped")
    return config.gradient_accumulation_fusion and whole


def _checked(options: Mapping[str, Any] | None, known: Sequence[str] = OPTIONS) -> dict[str, Any]:
    if unknown := sorted(set(options or {}) - set(known)):
        raise ValueError(
            f"dmoe.integrations.megatron: options: expected some of {', '.join(known)}, got {', '.join(unknown)}; "
            "what has a name in Megatron is an option of Megatron"
        )
    return dict(options or {})


def coefficients(config: Any) -> dict[str, float]:
    """The balance losses that are on, by Megatron's name, with their coefficients."""
    kinds, factors = config.moe_router_load_balancing_type, config.moe_aux_loss_coeff
    kinds = [kinds] if isinstance(kinds, str) else list(kinds)
    factors = list(factors) if isinstance(factors, list | tuple) else [factors] * len(kinds)
    return {kind: factor for kind, factor in zip(kinds, factors, strict=True) if kind in LOSSES and factor}


def activation_of(function: Any) -> str:
    """dmoe's name of an activation function of Megatron's.

    Raises:
        ValueError: one that dmoe does not have.
    """
    from megatron.core.transformer import utils

    names = {F.silu: "silu", F.gelu: "gelu", F.relu: "relu"}
    for name, kind in (("erf_gelu", "gelu"), ("openai_gelu", "gelu_tanh")):
        if (found := getattr(utils, name, None)) is not None:
            names[found] = kind
    if function in names:
        return names[function]
    keywords = getattr(function, "keywords", {})
    if getattr(function, "func", None) is F.gelu and keywords.get("approximate") == "tanh":
        return "gelu_tanh"
    name = getattr(function, "__name__", repr(function))
    refuse("activation_func", name, "dmoe's experts have silu, gelu, its tanh form and relu", "choose one of these")
    raise AssertionError


def _experts(config: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "hidden_size": config.hidden_size,
        "num_experts": config.num_moe_experts,
        "expert_grad_scale": "sum",  # as Megatron's own experts; its data parallelism divides
        "ffn_hidden_size": config.moe_ffn_hidden_size or config.ffn_hidden_size,
        "activation": activation_of(config.activation_func),
        "gated": bool(config.gated_linear_unit),
        "bias": "expert" if config.add_bias_linear else "none",
    }
    if config.moe_apply_probs_on_input:
        if config.moe_router_topk != 1:
            refuse("moe_apply_probs_on_input", True, "it needs --moe-router-topk 1", "leave it out")
        fields["gate_weight_on"] = "input"
    else:
        # Megatron multiplies the activation, and the bias of the second projection: together that is the output.
        fields["gate_weight_on"] = "output" if config.add_bias_linear else "activation"
    return fields


def _router(config: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "router_bias": config.add_bias_linear,
        "router_dtype": "float32" if config.moe_router_dtype == "fp32" else "input",
        "input_jitter": config.moe_input_jitter_eps or 0.0,
    }
    if config.moe_router_load_balancing_type == "sinkhorn":  # Megatron, too, looks at no other option of scores then
        return fields | {"router": Sinkhorn(), "allow_future_leak": True}
    score_function = _SCORES[config.moe_router_score_function]
    softmax = score_function == "softmax"
    after_topk = softmax and not config.moe_router_pre_softmax
    return fields | {
        "score_function": score_function,
        "softmax_order": "after_topk" if after_topk else "before_topk",
        "gate_normalization": None if softmax or config.moe_router_topk == 1 else 1.0,
        "gate_scale": config.moe_router_topk_scaling_factor or 1.0,
        **_selection_bias(config),
        **_groups(config, after_topk),
    }


def _selection_bias(config: Any) -> dict[str, Any]:
    """The bias that chooses, and what losses count where not the probabilities alone choose."""
    if config.moe_router_load_balancing_type == "quantile_balancing":
        return {
            "selection_bias": True,
            "selection_bias_rule": "quantile",
            "selection_bias_decay": config.moe_router_quantile_balancing_ema,
        }
    chosen_otherwise = config.moe_router_enable_expert_bias or config.moe_router_group_topk
    return {
        "selection_bias": config.moe_router_enable_expert_bias,
        "selection_bias_update_rate": config.moe_router_bias_update_rate,
        "load_balancing_choices": "plain" if chosen_otherwise else "all",
    }


def _groups(config: Any, after_topk: bool) -> dict[str, Any]:
    """Only the best groups of experts: Megatron ranks a group by the sum of its K / groups best scores."""
    if not config.moe_router_group_topk:
        return {}
    best = config.moe_router_topk // config.moe_router_group_topk
    if best not in (1, 2):
        refuse(
            "moe_router_group_topk",
            config.moe_router_group_topk,
            f"with --moe-router-topk {config.moe_router_topk} a group would rank by its {best} best experts, and dmoe "
            "ranks by the best or by the two best",
            "choose as many groups as experts per token, or half as many",
        )
    if best == 2 and after_topk:
        refuse(
            "moe_router_group_topk",
            config.moe_router_group_topk,
            "without --moe-router-pre-softmax a group would rank by a sum of logits, and dmoe ranks by scores",
            "add --moe-router-pre-softmax, or use sigmoid scores",
        )
    return {
        "num_groups": config.moe_router_num_groups,
        "top_k_groups": config.moe_router_group_topk,
        "group_score": "top2_sum" if best == 2 else "max",
    }


def _capacity(config: Any) -> dict[str, Any]:
    factor = config.moe_expert_capacity_factor
    if factor is None:
        return {}
    by_weight = config.moe_token_drop_policy == "probs"
    return {
        "capacity_factor": factor,
        "capacity_formula": "ceil_of_share",
        "drop_order": "normalized_gate_weight" if by_weight else "token_major",
    }
