"""Which MoE blocks of Transformers are exactly a :class:`dmoe.MoE`: a line each; and the config that such a block is.

A family's semantics are read from Transformers' sources of releases 5.7 to 5.24 and held to them by tests; sizes, K,
biases and shared experts are read from the block itself, and a tensor that nobody here knows is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch.nn.functional as F
from torch import nn

import dmoe
from dmoe.integrations.transformers.blocks_weights import Weight, weights_of


@dataclass(frozen=True)
class Read:
    """An option that is read from the block: the attribute at ``path``, through ``then``."""

    path: str
    then: Callable[[Any], Any] = lambda value: value

    def of(self, block: nn.Module) -> Any:
        """The option's value for this block."""
        value: Any = block
        for name in self.path.split("."):
            value = getattr(value, name)
        return self.then(value)


@dataclass(frozen=True)
class Family:
    """Blocks of one kind.

    Attributes:
        options: fields of :class:`dmoe.MoEConfig` as values, or as :class:`Read`.
        experts: how the experts' weights lie, a key of ``blocks_weights.EXPERTS``.
        router: the block's child that scores; models record the logits by its class.
        router_returns: what a call of that child returns, by the names of ``block_module.OUTPUTS``.
        returns: what a call of the block returns beside the output, by the same names.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    experts: str = "halves"
    router: str = "gate"
    router_returns: tuple[str, ...] = ("logits", "weights", "indices")
    returns: tuple[str, ...] = ()


def _normalized(on: bool) -> float | None:
    return 1.0 if on else None


_NORMALIZED = {"gate_normalization": 1.0}
_NORMALIZED_IF_ASKED = {"gate_normalization": Read("gate.norm_topk_prob", _normalized)}

FAMILIES: dict[str, Family] = {
    "MixtralSparseMoeBlock": Family(_NORMALIZED),
    "Qwen3MoeSparseMoeBlock": Family(_NORMALIZED_IF_ASKED),
}

# Blocks that look alike and are not the same: why, as the end of a sentence.
REFUSED: dict[str, str] = {}

_ACTIVATIONS = {
    "SiLUActivation": "silu",
    "SiLU": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "ReLU": "relu",
}
_FUNCTIONS = {F.silu: "silu", F.gelu: "gelu", F.relu: "relu"}


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


def block_weights(block: nn.Module, family: Family) -> list[Weight]:
    """The map of a block's tensors to those of the :class:`dmoe.MoE` that it is.

    Raises:
        ValueError: the block has a tensor that dmoe has no place for, as adapters and quantisation bring them.
    """
    weights, unknown = weights_of(block.state_dict(keep_vars=True), family.experts)
    if unknown:
        more = ", ..." if len(unknown) > 3 else ""
        raise ValueError(
            f"to_dmoe: expected a {type(block).__name__} as Transformers builds it, got one with "
            f"{', '.join(unknown[:3])}{more}: take adapters and quantisation away first"
        )
    return weights


def config_of(block: nn.Module, **options: Any) -> dmoe.MoEConfig:
    """The config of the :class:`dmoe.MoE` that computes what a block does; the block may be on ``meta``.

    Its losses are off (``load_balancing_coefficient=0``): a model that has a loss of its own keeps computing it.

    Args:
        block: a MoE block of Transformers, of a family of this table.
        **options: fields of :class:`dmoe.MoEConfig` that the block says nothing about, such as losses.

    Raises:
        ValueError: another module, or a block that is none of :class:`dmoe.MoE`'s.
        TypeError: options that are no fields.
        ValueError: options that the block itself settles.
    """
    family = family_of(block)
    if family is None:
        raise ValueError(
            f"to_dmoe: expected a MoE block of Transformers that the table names, got {type(block).__name__}"
        )
    weights = block_weights(block, family)
    settled = {
        **_sizes(block, weights),
        **{name: value.of(block) if isinstance(value, Read) else value for name, value in family.options.items()},
    }
    unknown = sorted(set(options) - {each.name for each in fields(dmoe.MoEConfig)})
    if unknown:
        raise TypeError(f"to_dmoe: expected fields of dmoe.MoEConfig, got {', '.join(unknown)}")
    for name in options:
        if name in settled:
            raise ValueError(
                f"to_dmoe: {name}: expected nothing, the model itself says {settled[name]!r}; got {options[name]!r}"
            )
    return dmoe.MoEConfig(**{"load_balancing_coefficient": 0.0, **settled, **options})


def _sizes(block: nn.Module, weights: list[Weight]) -> dict[str, Any]:
    """What the tensors' shapes and names say, and K."""
    state = block.state_dict(keep_vars=True)
    ours = {each.ours: each.to_ours([state[name].detach().to("meta") for name in each.theirs]) for each in weights}
    num_experts, hidden, width = ours["experts.down_proj"].shape
    shared = ours.get("shared_expert.mlp.down_proj")
    router = getattr(block, (family_of(block) or Family()).router)
    found: dict[str, Any] = {
        "hidden_size": hidden,
        "ffn_hidden_size": width,
        "num_experts": num_experts,
        "top_k": int(router.top_k),
        "gated": "experts.gate_up_proj" in ours,
        "bias": "expert" if "experts.down_bias" in ours else "none",
        "router_bias": "router.bias" in ours,
        "selection_bias": "router.selection_bias" in ours,
        "shared_ffn_hidden_size": None if shared is None else shared.shape[-1],
        "shared_expert_gate": "shared_expert.gate.weight" in ours,
        "activation": _activation(block),
    }
    return found


def _activation(block: nn.Module) -> Any:
    function = block.experts.act_fn
    name = _FUNCTIONS.get(function) if callable(function) and not isinstance(function, nn.Module) else None
    if isinstance(function, nn.GELU):
        name = "gelu_tanh" if function.approximate == "tanh" else "gelu"
    name = name or _ACTIVATIONS.get(type(function).__name__)
    if name is None:
        known = ", ".join(sorted(set(_ACTIVATIONS.values())))
        raise ValueError(
            f"to_dmoe: expected experts with an activation of dmoe's ({known}), got {type(function).__name__} in "
            f"{type(block).__name__}"
        )
    return name
