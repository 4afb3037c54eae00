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
        requires: attributes of the block that have to have a value: with another it computes something else.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    experts: str = "halves"
    router: str = "gate"
    router_returns: tuple[str, ...] = ("logits", "weights", "indices")
    returns: tuple[str, ...] = ()
    requires: Mapping[str, Any] = field(default_factory=dict)


def _if_asked(path: str) -> Read:
    return Read(path, lambda on: 1.0 if on else None)


_NORMALIZED = {"gate_normalization": 1.0}
_NORMALIZED_IF_ASKED = {"gate_normalization": _if_asked("gate.norm_topk_prob")}
_OVER_CHOSEN = {"softmax_order": "after_topk"}
_JITTER = {"input_jitter": Read("jitter_noise"), "input_jitter_on": "layer"}
_SIGMOID = {"score_function": "sigmoid", **_NORMALIZED}
_GROUPS = {"num_groups": Read("gate.num_group"), "top_k_groups": Read("gate.topk_group"), "group_score": "top2_sum"}
_SCALED = {"gate_scale": Read("gate.routed_scaling_factor")}
_SCALED_OUTSIDE = {"gate_scale": Read("routed_scaling_factor")}
_DEEPSEEK_V3 = {"score_function": "sigmoid", **_GROUPS, **_NORMALIZED_IF_ASKED, **_SCALED}


_WHEN = {"softmax": "after", "sigmoid": "before"}  # Cohere's choice of scores


def _v2(name: str, otherwise: Any) -> Read:
    limited = "group_limited_greedy"
    return Read("gate", lambda gate: getattr(gate, name) if gate.topk_method == limited else otherwise)


_DEEPSEEK_V2 = {
    "num_groups": _v2("num_group", 1),
    "top_k_groups": _v2("topk_group", None),
    "group_score": "max",
    **_SCALED,
}

FAMILIES: dict[str, Family] = {
    # softmax over all experts
    "MixtralSparseMoeBlock": Family({**_NORMALIZED, **_JITTER}),
    "MiniMaxSparseMoeBlock": Family({**_NORMALIZED, **_JITTER}),
    "HunYuanMoEV1Moe": Family(_NORMALIZED),
    "JambaSparseMoeBlock": Family(router="router"),
    "Qwen2MoeSparseMoeBlock": Family(_NORMALIZED_IF_ASKED),
    "Qwen3MoeSparseMoeBlock": Family(_NORMALIZED_IF_ASKED),
    "Qwen3NextSparseMoeBlock": Family(_NORMALIZED_IF_ASKED),
    "Qwen3VLMoeTextSparseMoeBlock": Family(_NORMALIZED),
    "Qwen3OmniMoeThinkerTextSparseMoeBlock": Family(_NORMALIZED_IF_ASKED),
    "Qwen3OmniMoeTalkerTextSparseMoeBlock": Family(_NORMALIZED_IF_ASKED),
    "Qwen3_5MoeSparseMoeBlock": Family(_NORMALIZED),
    "Qwen4ExpTextSparseMoeBlock": Family(_NORMALIZED_IF_ASKED),
    "OlmoeSparseMoeBlock": Family(_NORMALIZED_IF_ASKED),
    "FlexOlmoSparseMoeBlock": Family(_NORMALIZED_IF_ASKED),
    "MellumSparseMoeBlock": Family(_NORMALIZED_IF_ASKED),
    "LaraMiniSparseMoeBlock": Family(_NORMALIZED_IF_ASKED),
    # ... and a bias that only chooses
    "Ernie4_5_MoeSparseMoeBlock": Family(_NORMALIZED),
    # ... in the best groups
    "DeepseekV2Moe": Family(_DEEPSEEK_V2),
    "DeepseekOcr2TextMoe": Family(_DEEPSEEK_V2),
    "UnlimitedOcrTextMoe": Family(_DEEPSEEK_V2),
    "Mistral4MoE": Family({**_GROUPS, **_NORMALIZED_IF_ASKED, **_SCALED}),
    "MistralLarge4TextMoE": Family({**_GROUPS, **_NORMALIZED, **_SCALED}),
    # softmax over the chosen ones
    "GraniteMoeMoE": Family(_OVER_CHOSEN, router="router"),
    "GraniteMoeSharedMoE": Family(_OVER_CHOSEN, router="router"),
    "GraniteMoeHybridMoE": Family(_OVER_CHOSEN, router="router"),
    "GraniteMoeSWAMoE": Family(_OVER_CHOSEN, router="router"),
    "AriaTextMoELayer": Family(_OVER_CHOSEN, router="router", experts="halves_transposed"),
    "GptOssMLP": Family(_OVER_CHOSEN, router="router", experts="interleaved_transposed", returns=("weights",)),
    # sigmoid
    "FlintSparseMoeBlock": Family({"score_function": "sigmoid", **_NORMALIZED_IF_ASKED}),
    "Llama4TextMoe": Family(
        {"score_function": "sigmoid", "gate_weight_on": "input"},
        router="router",
        experts="halves_transposed",
        router_returns=("scores", "logits"),
        returns=("logits",),
    ),
    # ... and a bias that only chooses
    "MiniMaxM2SparseMoeBlock": Family({**_SIGMOID, **_JITTER}),
    "HYV3MoE": Family({**_SIGMOID, "gate_scale": Read("gate.router_scaling_factor")}),
    "AfmoeSparseMoeBlock": Family({**_SIGMOID, "gate_scale": Read("router.route_scale")}, router="router"),
    "LagunaSparseMoeBlock": Family(
        {
            **_SIGMOID,
            **_SCALED_OUTSIDE,
            "router_logit_softcap": Read("gate.router_logit_softcapping", lambda cap: cap if cap > 0 else None),
        }
    ),
    "Kolibri1SparseMoeBlock": Family(
        {"score_function": "sigmoid", "selection_bias_on": "logits", **_NORMALIZED_IF_ASKED}
    ),
    # ... in the best groups
    "DeepseekV3MoE": Family(_DEEPSEEK_V3),
    "DeepseekV32MoE": Family(_DEEPSEEK_V3),
    "Dots1MoE": Family(_DEEPSEEK_V3),
    "Dots3NoteTextMoE": Family(_DEEPSEEK_V3),
    "Glm4MoeMoE": Family(_DEEPSEEK_V3),
    "Glm4MoeLiteMoE": Family(_DEEPSEEK_V3),
    "Glm4vMoeTextMoE": Family(_DEEPSEEK_V3),
    "GlmMoeDsaMoE": Family(_DEEPSEEK_V3),
    "SolarOpenMoE": Family(_DEEPSEEK_V3),
    "ExaoneMoeSparseMoEBlock": Family(_DEEPSEEK_V3),
    "KimiLinearMoE": Family(_DEEPSEEK_V3),
    "MiMoV2FlashMoE": Family(_DEEPSEEK_V3),
    "BailingHybridMoE": Family(_DEEPSEEK_V3),
    "BeamMoE": Family({"score_function": "sigmoid", **_GROUPS, **_NORMALIZED_IF_ASKED, **_SCALED_OUTSIDE}),
    # either
    "Cohere2MoeSparseMoeBlock": Family(
        {
            "score_function": Read("gate.expert_selection_fn"),
            "softmax_order": Read("gate.expert_selection_fn", lambda of: f"{_WHEN[of]}_topk"),
            "gate_normalization": _if_asked("gate.norm_topk_prob"),
        },
        requires={"shared_expert_combination_strategy": "sum"},
    ),
}

# Blocks that look alike and are not the same: what dmoe has no option for.
REFUSED: dict[str, str] = {
    "PhimoeSparseMoeBlock": "its router is SparseMixer, which masks logits near the best and draws in training",
    "Lfm2MoeSparseMoeBlock": "it divides gate weights by their sum plus 1e-6",
    "AXK1MoE": "it norms its output",
    "AXK2MoE": "it gives experts outside the best groups the score 0, so that a negative bias lets them be chosen",
    "Gemma4TextDecoderLayer": "it norms what its router sees, and scales each expert by a learned number",
    "DiffusionGemmaDecoderTextLayer": "it norms what its router sees, and scales each expert by a learned number",
    "DiffusionGemmaEncoderTextLayer": "it norms what its router sees, and scales each expert by a learned number",
    "InklingMoE": "its shared experts take part in the normalisation of gate weights",
    "MuseSparkMoE": "its experts work in a space of their own, and norm their outputs",
    "ZayaSparseMoeBlock": "its router is an MLP that hands its state to the next layer, and one expert is the identity",
    "LongcatFlashMoE": "some of its experts are the identity",
    "Ernie4_5_VLMoeMoeBlock": "it has two sets of experts, for text and for images",
    "Ernie4_5_VLMoeSparseMoeBlock": "it is one of two sets of experts, for text and for images",
    "JetMoeMoE": "its experts serve attention, too",
    "DogeCDMoE": "its experts are single vectors, found by product keys",
    "DbrxFFN": "its experts lie in one matrix, which dmoe.integrations.transformers.use computes as it is",
    "NllbMoeSparseMLP": "its experts are modules of their own, and its capacity drops tokens",
    "SwitchTransformersSparseMLP": "its experts are modules of their own, and its capacity drops tokens",
}

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
    family = known_family(block)
    for path, value in family.requires.items():
        got = Read(path).of(block)
        if got != value:
            raise ValueError(f"to_dmoe: expected a {type(block).__name__} with {path} = {value!r}, got {got!r}")
    weights = block_weights(block, family)
    settled = {
        **_sizes(block, family, weights),
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


def _sizes(block: nn.Module, family: Family, weights: list[Weight]) -> dict[str, Any]:
    """What the tensors' shapes and names say, and K."""
    state = block.state_dict(keep_vars=True)
    ours = {each.ours: each.to_ours([state[name].detach().to("meta") for name in each.theirs]) for each in weights}
    num_experts, hidden, width = ours["experts.down_proj"].shape
    shared = ours.get("shared_expert.mlp.down_proj")
    router = getattr(block, family.router)
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
