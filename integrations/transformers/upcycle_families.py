"""Which mixture-of-experts family of Transformers computes what a dense model computes, around its FFNs.

=======  ===========  =============  ================  =================  ==========
dense    norms        q and k norm   attention biases  sliding window     MoE family
=======  ===========  =============  ================  =================  ==========
qwen2    before       none           q, k, v           of any layers      qwen2_moe
qwen3    before       of each head   all or none       of all or none     qwen3_moe
llama    before       none           none              none               mixtral
mistral  before       none           none              of all or none     mixtral
olmo2    behind       of the width   all or none       none               flex_olmo
=======  ===========  =============  ================  =================  ==========

Where Mixtral cannot have dense layers, qwen2_moe without biases can. Its shared expert is of zeros, which add
nothing and have no gradient: they stay.
OLMoE has its norms before the blocks and OLMo2 behind, so it preserves none of these.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dmoe.integrations.transformers.dense_traits import CARRIED, Traits


@dataclass(frozen=True)
class Recipe:
    """How the experts are laid out.

    Attributes:
        num_experts: E, copies of the FFN.
        top_k: K of them for each token.
        granularity: G, experts that each copy is cut into: E G experts are written, of which K G are chosen.
        every: N, only each N-th layer becomes a mixture.
    """

    num_experts: int
    top_k: int
    granularity: int
    every: int

    def is_moe(self, layer: int) -> bool:
        """Whether a layer, counted from 0, becomes a mixture."""
        return (layer + 1) % self.every == 0


@dataclass(frozen=True)
class MoeFamily:
    """A family that models become, and what it can compute.

    Attributes:
        model_type: Transformers' name.
        norm, qk_norm: as of :class:`Traits`.
        biases, windows: those that it can have.
        dense_layers: whether layers without experts are possible.
        router: the router's weight inside a layer.
        expert: the gate, up and down projection of expert e inside a layer.
        fields: its config's own fields.
        idle: further tensors of a mixture layer, that add zero: name inside the layer, and shape with the model's H.
    """

    model_type: str
    norm: str
    qk_norm: str
    biases: frozenset[str]
    windows: frozenset[str]
    dense_layers: bool
    router: str
    expert: Callable[[int], tuple[str, str, str]]
    fields: Callable[[Any, Traits, Recipe], dict[str, Any]]
    idle: Callable[[int], dict[str, tuple[int, int]]] = lambda hidden: {}

    def refusal(self, traits: Traits, every: int) -> str | None:
        """Which field of a dense model it cannot preserve, in a sentence; None where it preserves all."""
        for field, wanted, offered in (
            ("norms", traits.norm, {self.norm}),
            ("q_norm and k_norm", traits.qk_norm, {self.qk_norm}),
            ("attention_bias", traits.biases, self.biases),
            ("sliding_window", traits.windows, self.windows),
        ):
            if wanted not in offered:
                told = " or ".join(_TOLD[kind] for kind in sorted(offered))
                return f"{field}: expected {told}, as {self.model_type} has, got {_TOLD[wanted]}"
        if every > 1 and not self.dense_layers:
            return f"every: expected 1, as {self.model_type} has experts in every layer, got {every}"
        return None


_IDLE_WIDTH = 16  # of a shared expert of zeros: what tensor parallelism and kernels can divide
_TOLD = {
    "before": "norms before attention and FFN",
    "behind": "norms behind attention and FFN",
    "head": "norms of each head",
    "width": "norms over the whole width",
    "qkv": "biases of q, k and v",
    "qkvo": "biases of q, k, v and o",
    "some": "some layers with it",
    "all": "all layers with it",
    "none": "none",
}


def _expert(e: int) -> tuple[str, str, str]:
    return tuple(f"mlp.experts.{e}.{name}_proj.weight" for name in ("gate", "up", "down"))  # type: ignore[return-value]


def _mixtral_expert(e: int) -> tuple[str, str, str]:
    return tuple(f"block_sparse_moe.experts.{e}.{name}.weight" for name in ("w1", "w3", "w2"))  # type: ignore[return-value]


def _mixtral(config: Any, traits: Traits, recipe: Recipe) -> dict[str, Any]:
    return {
        "intermediate_size": config.intermediate_size // recipe.granularity,
        "num_local_experts": recipe.num_experts * recipe.granularity,
        "num_experts_per_tok": recipe.top_k * recipe.granularity,
        "sliding_window": traits.window,
    }


def _chosen(recipe: Recipe) -> dict[str, Any]:
    """What Qwen's and OLMo's families say alike; gate weights sum to 1."""
    return {
        "num_experts": recipe.num_experts * recipe.granularity,
        "num_experts_per_tok": recipe.top_k * recipe.granularity,
        "norm_topk_prob": True,
    }


def _qwen(config: Any, traits: Traits, recipe: Recipe) -> dict[str, Any]:
    return _chosen(recipe) | {
        "intermediate_size": config.intermediate_size,  # of dense layers
        "moe_intermediate_size": config.intermediate_size // recipe.granularity,
        "decoder_sparse_step": recipe.every,
        "mlp_only_layers": [],
        "use_sliding_window": traits.window is not None,
        "sliding_window": traits.window,
    }


def _qwen2(config: Any, traits: Traits, recipe: Recipe) -> dict[str, Any]:
    kinds = ["sliding_attention" if windowed else "full_attention" for windowed in traits.windowed]
    return _qwen(config, traits, recipe) | {
        "layer_types": kinds,
        "max_window_layers": kinds.count("full_attention"),
        "qkv_bias": traits.biases == "qkv",
        "shared_expert_intermediate_size": _IDLE_WIDTH,
    }


def _qwen2_idle(hidden: int) -> dict[str, tuple[int, int]]:
    wide = (_IDLE_WIDTH, hidden)
    shared = {"gate_proj": wide, "up_proj": wide, "down_proj": wide[::-1]}
    named = {f"mlp.shared_expert.{name}.weight": shape for name, shape in shared.items()}
    return named | {"mlp.shared_expert_gate.weight": (1, hidden)}


def _flex_olmo(config: Any, traits: Traits, recipe: Recipe) -> dict[str, Any]:
    return _chosen(recipe) | {
        "intermediate_size": config.intermediate_size // recipe.granularity,
        "attention_bias": traits.biases == "qkvo",
    }


_ANY_OR_NONE, _ALL_OR_NONE = frozenset({"none", "some", "all"}), frozenset({"none", "all"})
MOE_FAMILIES = {
    family.model_type: family
    for family in (
        MoeFamily(
            "mixtral",
            "before",
            "none",
            frozenset({"none"}),
            _ALL_OR_NONE,
            False,
            "block_sparse_moe.gate.weight",
            _mixtral_expert,
            _mixtral,
        ),
        MoeFamily(
            "qwen2_moe",
            "before",
            "none",
            frozenset({"none", "qkv"}),
            _ANY_OR_NONE,
            True,
            "mlp.gate.weight",
            _expert,
            _qwen2,
            _qwen2_idle,
        ),
        MoeFamily(
            "qwen3_moe",
            "before",
            "head",
            frozenset({"none", "qkvo"}),
            _ALL_OR_NONE,
            True,
            "mlp.gate.weight",
            _expert,
            lambda config, traits, recipe: _qwen(config, traits, recipe) | {"attention_bias": traits.biases == "qkvo"},
        ),
        MoeFamily(
            "flex_olmo",
            "behind",
            "width",
            frozenset({"none", "qkvo"}),
            frozenset({"none"}),
            False,
            "mlp.gate.weight",
            _expert,
            _flex_olmo,
        ),
    )
}


def choose_family(traits: Traits, every: int, to: str | None = None) -> MoeFamily:
    """The family that a dense model becomes.

    Args:
        traits: of the dense model.
        every: N of :class:`Recipe`.
        to: which is wanted; None takes the first that preserves the model.

    Raises:
        ValueError: it cannot be preserved, with the field that stands in the way.
    """
    if to is not None and to not in MOE_FAMILIES:
        raise ValueError(f"to: expected one of {', '.join(MOE_FAMILIES)}, got {to}")
    alike = [f for f in MOE_FAMILIES.values() if (f.norm, f.qk_norm) == (traits.norm, traits.qk_norm)]
    candidates = [MOE_FAMILIES[to]] if to is not None else alike
    refusals = [family.refusal(traits, every) for family in candidates]
    for family, refusal in zip(candidates, refusals, strict=True):
        if refusal is None:
            return family
    raise ValueError("; ".join(refusal for refusal in refusals if refusal is not None))


def moe_fields(family: MoeFamily, config: Any, traits: Traits, recipe: Recipe) -> dict[str, Any]:
    """The arguments of the new model's config."""
    carried = {name: getattr(config, name) for name in CARRIED if hasattr(config, name)}
    return carried | family.fields(config, traits, recipe)
