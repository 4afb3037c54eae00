"""What the mixtures in the blocks are: the example's own, or a preset's at this run's sizes."""

from __future__ import annotations

import math
from typing import Any

import dmoe
from dmoe import MoEConfig
from dmoe.routing import Hash

from .settings import BALANCE, TOP_K, Settings, UsageError

VOCABULARY = 256  # every byte is a token


def moe_configs(settings: Settings, **more: Any) -> list[MoEConfig]:
    """The options of each layer's mixture, from input to output; ``more`` of them from the caller.

    Raises:
        UsageError: there is no such preset, or these sizes are none that it can have.
    """
    s = settings
    build = _own if s.preset is None else _preset
    for name in ("expert_compute", "saved_activations"):
        if getattr(s, name) is not None:
            more[name] = getattr(s, name)
    try:
        return [build(s, experts, more) for experts in s.layer_experts]
    except ValueError as error:
        raise UsageError(f"{'the layer' if s.preset is None else f'--preset {s.preset}'}: {error}") from error


def experts_of_a_token(config: MoEConfig) -> float:
    """How many experts a token visits; where experts choose, on average."""
    if config.family.experts_choose and config.capacity_factor is not None:
        return config.capacity_factor
    return config.top_k


def sees_later_tokens(config: MoEConfig) -> str | None:
    """Why a token's output in evaluation may depend on bytes behind it; None where it cannot.

    Routers that balance a batch in training alone, as BASE and Sinkhorn do, are greedy in evaluation.
    """
    if config.family.experts_choose:
        return "experts choose their tokens out of the whole batch, also in evaluation"
    tokens = 1 << 20
    most = config.capacity_for(tokens, training=False)
    if most is None or most >= tokens:
        return None
    in_order = config.drop_order == "token_major" or (config.drop_order == "choice_major" and config.top_k == 1)
    if in_order:
        return None
    return f"what exceeds an expert's capacity is dropped by {config.drop_order}, also in evaluation"


def _own(s: Settings, experts: int, more: dict[str, Any]) -> MoEConfig:
    top_k = s.top_k or TOP_K
    return MoEConfig(
        hidden_size=s.hidden,
        ffn_hidden_size=s.ffn,
        num_experts=experts,
        top_k=top_k,
        # A token's gate weights sum to 1: the output is as large as one FFN's. Of one expert alone the weight would
        # always be 1, and nothing but the balance loss would teach the router.
        gate_normalization=1.0 if (s.gate_normalization or ("sum" if top_k > 1 else "none")) == "sum" else None,
        num_moe_layers=s.layers,
        load_balancing_coefficient=BALANCE if s.balance is None else s.balance,
        router_z_loss_coefficient=s.z_loss or 0.0,
        shared_ffn_hidden_size=s.shared or None,
        **more,
    )


def _preset(s: Settings, experts: int, more: dict[str, Any]) -> MoEConfig:
    names = dmoe.presets.NAMES
    if s.preset is None or s.preset not in names:
        raise UsageError(f"--preset must be one of {', '.join(names)}, got {s.preset}")
    options = {**_at_this_size(names[s.preset](), s, experts), **more}
    if s.top_k is not None:
        options["top_k"] = s.top_k
    if "hash" in s.preset:
        options["router"] = Hash(vocab_size=VOCABULARY)
    return names[s.preset](hidden_size=s.hidden, ffn_hidden_size=s.ffn, num_experts=experts, **options)


def _at_this_size(published: MoEConfig, s: Settings, experts: int) -> dict[str, Any]:
    """What a preset says in numbers of experts and features besides the three that are given, in their proportion.

    A standard deviation is of weights that sum over ``hidden_size`` inputs: of fewer they sum to as much if it is
    larger by the root.
    """
    options: dict[str, Any] = {}
    if published.init_std is not None:
        options["init_std"] = published.init_std * math.sqrt(published.hidden_size / s.hidden)
    if published.shared_ffn_hidden_size is not None:
        width = published.shared_ffn_hidden_size * s.ffn // max(published.ffn_sizes)
        options["shared_ffn_hidden_size"] = max(1, width)
    if published.num_groups > 1:
        groups = published.num_groups
        while groups > 1 and (experts % groups or experts // groups < 2):
            groups //= 2
        options["num_groups"] = groups
        if published.top_k_groups is not None:
            options["top_k_groups"] = math.ceil(published.top_k_groups * groups / published.num_groups)
    return options
