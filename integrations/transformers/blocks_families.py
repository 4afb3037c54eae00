"""Which MoE blocks of Transformers are exactly a :class:`dmoe.MoE`: an entry each; and which are not, and why.

What a family computes is read from the sources of Transformers 5.24.0, and held to them by tests (which run with 5.8.1,
5.17.0 and 5.23.0 as well: blocks that those build alike are replaced, others refused). Sizes, K, biases and
shared experts are no options here: they are read from the block itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

import dmoe

_NONE = object()
Option = Callable[[Callable[..., Any]], Any]


def look(block: nn.Module, router: nn.Module, *paths: str) -> Any:
    """The first of some attributes that a block's router, or the block itself, has; with dots where they lie deeper.

    Releases of Transformers differ in which of the two keeps a number, and in what it is called.

    Raises:
        ValueError: neither has any of them.
    """
    for owner, path in itertools.product((router, block), paths):
        value: Any = owner
        for name in path.split("."):
            value = getattr(value, name, _NONE)
        if value is not _NONE:
            return value
    raise ValueError(
        f"to_dmoe: expected a {type(block).__name__} with {' or '.join(paths)}, got one without: this release of "
        "Transformers builds it in a way that dmoe does not know"
    )


def _read(*paths: str, then: Callable[[Any], Any] = lambda value: value) -> Option:
    return lambda look: then(look(*paths))


@dataclass(frozen=True)
class Family:
    """Blocks of one kind.

    Attributes:
        options: fields of :class:`dmoe.MoEConfig`: values, or functions of what finds attributes by their names, which
            is :func:`look` for a block.
        experts: how the experts' weights lie, a key of ``blocks_weights.EXPERTS``.
        router: the block's child that scores; models record the logits by its class.
        router_returns: what a call of that child returns: ``logits`` (T, E), ``weights`` and ``indices`` (T, K),
            ``mean_weights``: those over K; any other name is something that nobody reads, and None here.
        returns: what a call of the block returns beside the output, by the same names.
        flat: whether the output is ``(B * S, H)`` for an input of ``(B, S, H)``.
        requires: attributes of the block that have to have a value: with another it computes something else.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    experts: str = "halves"
    router: str = "gate"
    router_returns: tuple[str, ...] = ("logits", "weights", "indices")
    returns: tuple[str, ...] = ()
    flat: bool = False
    requires: Mapping[str, Any] = field(default_factory=dict)


_NORMALIZED = {"gate_normalization": 1.0}
_NORMALIZED_IF_ASKED = {"gate_normalization": _read("norm_topk_prob", then=lambda on: 1.0 if on else None)}
_OVER_CHOSEN = {"softmax_order": "after_topk"}
_JITTER = {"input_jitter": _read("jitter_noise"), "input_jitter_on": "layer"}
_SIGMOID = {"score_function": "sigmoid", **_NORMALIZED}
_NUM_GROUPS, _TOP_K_GROUPS = _read("num_group", "n_group"), _read("topk_group")
_GROUPS = {"num_groups": _NUM_GROUPS, "top_k_groups": _TOP_K_GROUPS, "group_score": "top2_sum"}
_SCALED = {"gate_scale": _read("routed_scaling_factor", "router_scaling_factor")}
_DEEPSEEK_V3 = {"score_function": "sigmoid", **_GROUPS, **_NORMALIZED_IF_ASKED, **_SCALED}


def _v2(option: Option, otherwise: Any) -> Option:
    return lambda look: option(look) if look("topk_method") == "group_limited_greedy" else otherwise


_DEEPSEEK_V2 = {
    "num_groups": _v2(_NUM_GROUPS, 1),
    "top_k_groups": _v2(_TOP_K_GROUPS, None),
    "group_score": "max",
    **_SCALED,
}
_SCORES = {"Sigmoid": "sigmoid", "SqrtSoftplusActivation": "sqrt_softplus"}
_DEEPSEEK_V4 = {
    "score_function": _read("score_fn", then=lambda function: _SCORES[type(function).__name__]),
    **_NORMALIZED,
    **_SCALED,
}
_CLAMPED = {
    "activation": lambda look: dmoe.ClampedSwiGLU(
        look("experts.swiglu_limit", "experts.limit"), look("experts.swiglu_alpha", "experts.alpha")
    )
}
_CLAMPED_SILU = {
    "activation": lambda look: dmoe.ClampedSwiGLU(look("experts.swiglu_limit", "experts.limit"), 1.0, up_offset=0.0)
}
_SOFTCAPPED = {
    "activation": lambda look: dmoe.SoftcappedSwiGLU(
        look("experts.act_fn.gate_softcap.softcap"), look("experts.act_fn.up_softcap.softcap")
    )
}
_WHEN = {"softmax": "after_topk", "sigmoid": "before_topk"}  # Cohere's choice of scores

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
    "GptOssMLP": Family(
        {**_OVER_CHOSEN, **_CLAMPED},
        router="router",
        experts="interleaved_transposed",
        returns=("weights",),
    ),
    "OpenAIPrivacyFilterMLP": Family(
        {**_OVER_CHOSEN, **_CLAMPED},
        router="router",
        experts="halves_transposed",
        returns=("mean_weights",),
    ),
    # sigmoid
    "FlintSparseMoeBlock": Family({"score_function": "sigmoid", **_NORMALIZED_IF_ASKED}),
    "Llama4TextMoe": Family(
        {"score_function": "sigmoid", "gate_weight_on": "input"},
        router="router",
        experts="halves_transposed",
        router_returns=("scores", "logits"),
        returns=("logits",),
        flat=True,
    ),
    # ... and a bias that only chooses
    "MiniMaxM2SparseMoeBlock": Family({**_SIGMOID, **_JITTER}),
    "HYV3MoE": Family({**_SIGMOID, **_SCALED}),
    "Dots3NoteVisionMoE": Family({**_SIGMOID, **_SCALED}),
    "AfmoeSparseMoeBlock": Family({**_SIGMOID, "gate_scale": _read("route_scale")}, router="router"),
    "LagunaSparseMoeBlock": Family(
        {
            **_SIGMOID,
            **_SCALED,
            "router_logit_softcap": _read("router_logit_softcapping", then=lambda cap: cap if cap > 0 else None),
        }
    ),
    "Kolibri1SparseMoeBlock": Family(
        {"score_function": "sigmoid", "selection_bias_on": "logits", **_NORMALIZED_IF_ASKED}
    ),
    "MiniMaxM3VLSparseMoeBlock": Family({**_SIGMOID, **_SCALED, **_CLAMPED}),
    "NemotronHMoE": Family(
        {**_DEEPSEEK_V3, "activation": "relu_squared"},
        requires={"config.moe_latent_size": None, "config.mlp_hidden_act": "relu2"},
    ),
    "Inkling2SparseMoeBlock": Family({**_DEEPSEEK_V4, **_SOFTCAPPED}),
    "Inkling2LoopSparseMoeBlock": Family({**_DEEPSEEK_V4, **_SOFTCAPPED}),
    "DeepseekV4SparseMoeBlock": Family({**_DEEPSEEK_V4, **_CLAMPED_SILU}, requires={"is_hash": False}),
    # ... in the best groups
    "Glm5NextTextMoE": Family({**_DEEPSEEK_V3, **_CLAMPED_SILU}),
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
    "BeamMoE": Family({"score_function": "sigmoid", **_GROUPS, **_NORMALIZED_IF_ASKED, **_SCALED}),
    # either
    "Cohere2MoeSparseMoeBlock": Family(
        {
            "score_function": _read("expert_selection_fn"),
            "softmax_order": _read("expert_selection_fn", then=_WHEN.get),
            "gate_normalization": _NORMALIZED_IF_ASKED["gate_normalization"],
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
    "HYV4MoE": "its experts clamp their gate and its shared expert does not",
    "HYV4VLMoE": "its experts clamp their gate and its shared expert does not",
    "Step3p7SparseMoeBlock": "its experts clamp their gate after the activation",
    "DbrxFFN": "its experts lie in one matrix, which dmoe.integrations.transformers.use computes as it is",
    "NllbMoeSparseMLP": "its experts are modules of their own, and its capacity drops tokens",
    "SwitchTransformersSparseMLP": "its experts are modules of their own, and its capacity drops tokens",
}
