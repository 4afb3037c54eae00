"""A layer of torchtitan in dmoe's terms."""

from __future__ import annotations

from typing import Any

from torchtitan.models.common.feed_forward import FeedForward
from torchtitan.models.common.moe import MoE
from torchtitan.models.gpt_oss.moe import GptOssGroupedExperts, GptOssMoE

from dmoe import ClampedSwiGLU, MoEConfig
from dmoe.integrations.torchtitan.expert_weights import check_experts


def moe_config(config: Any) -> MoEConfig:
    """The :class:`dmoe.MoEConfig` of a layer that computes what torchtitan's computes, beside other loops.

    With :func:`to_dmoe`'s state, ``dmoe.MoE(moe_config(config))`` is that layer; only where two experts score alike may
    they choose differently. It has no losses, as torchtitan's has none; ``dmoe.update_selection_bias`` moves its bias
    by a step of torchtitan's size, which torchtitan then also centres.

    Args:
        config: ``MoE.Config`` of torchtitan, as a model's ``layers[i].moe``.

    Raises:
        TypeError: the config of something else.
        ValueError: experts or a shared expert that compute in a way of their own.
    """
    owner = getattr(config, "_owner", None)
    if owner not in (MoE, GptOssMoE):
        raise TypeError(
            f"moe_config: config: expected torchtitan's MoE.Config, got {type(config).__qualname__}"
            if owner is None
            else f"moe_config: config: expected torchtitan's MoE.Config, got that of {owner.__name__}"
        )
    inner, router, shared = config.routed_experts.inner_experts, config.router, config.shared_experts
    check_experts(inner)
    if shared is not None and shared._owner is not FeedForward:
        raise ValueError(
            f"moe_config: shared_experts: expected torchtitan's FeedForward or None, got {shared._owner.__name__}"
        )
    gpt_oss = inner._owner is GptOssGroupedExperts
    return MoEConfig(
        hidden_size=inner.dim,
        ffn_hidden_size=inner.hidden_dim,
        num_experts=config.num_experts,
        top_k=router.top_k,
        activation=ClampedSwiGLU(inner.swiglu_limit) if gpt_oss else "silu",
        bias="expert" if gpt_oss else "none",
        shared_ffn_hidden_size=None if shared is None else shared.w1.out_features,
        score_function=router.score_func,
        gate_normalization=1.0 if router.route_norm else None,
        gate_scale=router.route_scale,
        router_bias=router.gate.bias,
        selection_bias=config.load_balance_coeff is not None,
        selection_bias_update_rate=config.load_balance_coeff or 1e-3,
        num_groups=router.num_expert_groups or 1,
        top_k_groups=router.num_limited_groups,
        load_balancing_coefficient=0.0,
    )
