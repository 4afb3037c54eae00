"""What the table of families says of a block: its config, and the map of its tensors. A block may be on ``meta``."""

from __future__ import annotations

import functools
from dataclasses import fields
from typing import Any

from torch import Tensor, nn

import dmoe
from dmoe.integrations.transformers.blocks_families import FAMILIES, REFUSED, Family, look
from dmoe.integrations.transformers.blocks_weights import SHARED, Weight, weights_of
from dmoe.integrations.transformers.gates import gate_of


def family_of(block: nn.Module) -> Family | None:
    """The family of a block; None for any other module.

    Raises:
        ValueError: a block of Transformers that dmoe has no options for: which ones, and in whose block.
    """
    kind = type(block)
    if not kind.__module__.startswith("transformers.models."):
        return None
    if kind.__name__ in REFUSED:
        raise ValueError(
            f"to_dmoe: expected a block that dmoe.MoE can be, got {kind.__name__}: {REFUSED[kind.__name__]}"
        )
    return FAMILIES.get(kind.__name__)


def known_family(block: nn.Module) -> Family:
    """The family of a block.

    Raises:
        ValueError: a module of none.
    """
    family = family_of(block)
    if family is None:
        raise ValueError(
            f"to_dmoe: expected a MoE block of Transformers that the table names, got {type(block).__name__}"
        )
    return family


def block_weights(block: nn.Module, family: Family) -> list[Weight]:
    """The map of a block's tensors to those of the :class:`dmoe.MoE` that it is.

    Raises:
        ValueError: the block has a tensor that dmoe has no place for, as adapters and quantisation bring them.
    """
    weights, unknown = weights_of(block.state_dict(keep_vars=True), family.experts)
    if unknown:
        more = ", ..." if len(unknown) > 3 else ""
        raise ValueError(
            f"to_dmoe: expected a {type(block).__name__} without adapters and quantisation, as the newest Transformers "
            f"builds it, got one with {', '.join(unknown[:3])}{more}"
        )
    return weights


def config_of(block: nn.Module, **options: Any) -> dmoe.MoEConfig:
    """The config of the :class:`dmoe.MoE` that computes what a block does.

    Its losses are off (``load_balancing_coefficient=0``): a model that has a loss of its own keeps computing it.

    Args:
        block: a MoE block of Transformers, of a family of the table.
        **options: fields of :class:`dmoe.MoEConfig` that the block says nothing about, such as losses.

    Raises:
        ValueError: another module, a block that is not :class:`dmoe.MoE`'s, or options that the block settles.
        TypeError: options that are no fields.
    """
    family = known_family(block)
    kind = type(block).__name__
    router = getattr(block, family.router)
    find = functools.partial(look, block, router)
    for path, value in family.requires.items():
        if find(path) != value:
            raise ValueError(
                f"to_dmoe: expected a {kind} with {path} = {value!r}, which dmoe.MoE can be, got {find(path)!r}"
            )
    said = {name: value(find) if callable(value) else value for name, value in family.options.items()}
    if "activation" not in said:
        said["activation"] = _activation(block)
    settled = {"top_k": int(find("top_k", "config.moe_topk")), **_sizes(block, family), **said}
    unknown = sorted(set(options) - {each.name for each in fields(dmoe.MoEConfig)})
    if unknown:
        raise TypeError(f"to_dmoe: expected fields of dmoe.MoEConfig, got {', '.join(unknown)}")
    for name, value in options.items():
        if name in settled:
            raise ValueError(
                f"to_dmoe: {name}: expected no value, the model settles it as {settled[name]!r}, got {value!r}"
            )
    return dmoe.MoEConfig(**{"load_balancing_coefficient": 0.0, **settled, **options})


def _sizes(block: nn.Module, family: Family) -> dict[str, Any]:
    """What the names and shapes of the tensors say.

    Raises:
        ValueError: a shared expert that has biases where the experts have none, or the other way round.
    """
    state = block.state_dict(keep_vars=True)
    ours: dict[str, Tensor] = {}
    for weight in block_weights(block, family):
        ours[weight.ours] = weight.to_ours([state[name].detach().to("meta") for name in weight.theirs])
    num_experts, hidden, width = ours["experts.down_proj"].shape
    shared, biased = ours.get("shared_expert.mlp.down_proj"), "experts.down_bias" in ours
    if shared is not None and biased != ("shared_expert.mlp.down_bias" in ours):
        raise ValueError(
            f"to_dmoe: expected a {type(block).__name__} whose experts and shared expert have biases, or neither, got "
            f"{'experts' if biased else 'a shared expert'} with them alone"
        )
    return {
        "hidden_size": hidden,
        "ffn_hidden_size": width,
        "num_experts": num_experts,
        "gated": "experts.gate_up_proj" in ours,
        "bias": "expert" if biased else "none",
        "router_bias": "router.bias" in ours,
        "selection_bias": "router.selection_bias" in ours,
        "shared_ffn_hidden_size": None if shared is None else shared.shape[-1],
        "shared_expert_gate": "shared_expert.gate.weight" in ours,
    }


def _activation(block: Any) -> Any:
    """What the experts apply, which the shared expert has to apply as well."""
    found = gate_of(block.experts)
    if found is None:
        raise ValueError(
            f"to_dmoe: expected experts with an activation that dmoe has, got those of {type(block).__name__}"
        )
    for name in SHARED:
        act = getattr(getattr(block, name, None), "act_fn", None)
        if act is not None and type(act) is not type(block.experts.act_fn):
            raise ValueError(
                f"to_dmoe: expected a {type(block).__name__} with one activation, got {found.activation!r} in its "
                f"experts and {type(act).__name__} in its shared one"
            )
    return found.activation
