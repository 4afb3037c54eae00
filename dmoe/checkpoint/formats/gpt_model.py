"""A GPT with MoE layers as what is converted, and whether a model is such a one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dmoe.checkpoint.formats.gpt_names import Sizes, all_parts, moe_prefix
from dmoe.checkpoint.model import Model
from dmoe.checkpoint.stored import Stored
from dmoe.config import MoEConfig
from dmoe.config_json import config_to_json

# The two layouts hold GPT-2's architecture and nothing else.
_FIXED = {
    "norm": "layer",
    "positions": "learned",
    "qk_norm": False,
    "bias": True,
    "tied_head": True,
    "gated": False,
}
_ACTIVATIONS = ("gelu_tanh", "gelu")
# Options of MoEConfig that change what a layer computes from given weights.
_COMPUTED = (
    "gated",
    "bias",
    "gate_weight_on",
    "shared_ffn_hidden_size",
    "score_function",
    "softmax_order",
    "gate_scale",
    "router",
    "router_bias",
    "router_logit_softcap",
    "selection_bias",
    "num_groups",
    "capacity",
    "capacity_factor",
    "eval_capacity_factor",
    "eval_capacity_fraction",
    "activation",
    "gate_normalization",
)


def gpt_model(
    sizes: Sizes,
    tensors: Mapping[str, Stored],
    *,
    norm_eps: float,
    activation: str,
    top_k: int,
    origin: dict[str, Any],
    beside: dict[str, Any] | None = None,
) -> Model:
    """The model of these tensors, in :class:`dmoe.models.MoEGPT`'s order.

    Args:
        sizes: its sizes.
        tensors: all of them, under dmoe's names.
        norm_eps: LayerNorm's epsilon.
        activation: ``gelu_tanh`` or ``gelu``.
        top_k: K.
        origin, beside: see :class:`Model`.

    Raises:
        ValueError: numbers that no model can have.
    """
    layers: dict[str, MoEConfig | None] = {}
    moe: dict[str, Any] = {}
    for layer, experts in sizes.experts.items():
        config, moe[str(layer)] = _moe_config(sizes.hidden, sizes.ffn, experts, top_k, activation)
        layers[f"blocks.{layer}.{moe_prefix(sizes, layer)}"] = config
    gpt: dict[str, Any] = {
        "vocab_size": sizes.vocabulary,
        "hidden_size": sizes.hidden,
        "num_layers": sizes.layers,
        "num_heads": sizes.heads,
        "ffn_hidden_size": sizes.ffn,
        "max_positions": sizes.positions,
        **_FIXED,
        "norm_eps": norm_eps,
        "activation": activation,
        "moe": moe,
    }
    if sizes.residual:
        gpt["residual"] = {str(layer): sizes.ffn for layer in sorted(sizes.residual)}
    ordered = {name: tensors[name] for name, _, _ in all_parts(sizes)}
    return Model(ordered, layers, gpt=gpt, origin=origin, beside=beside or {})


def sizes_of(model: Model, layout: str) -> Sizes:
    """The sizes of a model that a GPT layout can hold, whose tensors have been found to be these.

    Args:
        model: any.
        layout: what is written, for messages.

    Raises:
        ValueError: another architecture, or tensors that do not belong to it.
    """
    gpt = model.gpt
    if gpt is None:
        raise ValueError(f"{layout}: expected a GPT with all its tensors, got a model whose architecture is not known")
    for name, value in _FIXED.items():
        if gpt.get(name, value) != value:
            raise ValueError(f"{layout}: {name}: expected {value!r}, all that the layout has, got {gpt[name]!r}")
    if gpt.get("activation") not in _ACTIVATIONS:
        raise ValueError(f"{layout}: activation: expected {' or '.join(_ACTIVATIONS)}, got {gpt.get('activation')!r}")
    hidden, ffn = gpt["hidden_size"], gpt["ffn_hidden_size"]
    residual = gpt.get("residual", {})
    experts = {}
    for number in sorted(map(int, gpt.get("moe", {}))):
        prefix = f"blocks.{number}.ffn." + ("moe." if str(number) in residual else "")
        config = model.layers.get(prefix)
        if config is None:
            raise ValueError(f"{layout}: {prefix}: expected a config of its experts, got none")
        _check_moe(config, prefix, gpt["activation"], layout)
        experts[number] = config.num_experts
    widths = {width for config in model.layers.values() if config is not None for width in config.ffn_sizes}
    widths |= set(residual.values())
    if len(experts) == gpt["num_layers"] and len(widths) == 1:
        ffn = min(widths)  # there is no dense layer to be of another width
    if widths - {ffn}:
        raise ValueError(f"{layout}: expected one F for dense layers and experts, {ffn}, got {sorted(widths - {ffn})}")
    sizes = Sizes(
        gpt["vocab_size"],
        hidden,
        gpt["num_layers"],
        gpt["num_heads"],
        ffn,
        gpt["max_positions"],
        experts,
        frozenset(map(int, residual)),
    )
    _check_tensors(sizes, model.tensors, layout)
    return sizes


def _check_tensors(sizes: Sizes, tensors: Mapping[str, Stored], layout: str) -> None:
    wanted = {name: part.shape for name, _, part in all_parts(sizes)}
    for name, shape in wanted.items():
        if name not in tensors:
            raise ValueError(f"{layout}: {name}: expected a tensor of {shape}, got none of that name")
        if tensors[name].shape != shape:
            raise ValueError(f"{layout}: {name}: expected a tensor of {shape}, got {tensors[name].shape}")
    if other := sorted(tensors.keys() - wanted.keys()):
        raise ValueError(f"{layout}: expected no more tensors than a GPT has, got {other[0]}")


def _check_moe(config: MoEConfig, prefix: str, activation: str, layout: str) -> None:
    like, _ = _moe_config(config.hidden_size, config.ffn_sizes[0], config.num_experts, config.top_k, activation)
    wrong = [name for name in _COMPUTED if getattr(config, name) != getattr(like, name)]
    if wrong:
        raise ValueError(
            f"{layout}: {prefix[:-1]}: {wrong[0]}: expected {getattr(like, wrong[0])!r}, all that the layout has, got "
            f"{getattr(config, wrong[0])!r}"
        )


def _moe_config(hidden: int, ffn: int, experts: int, top_k: int, activation: str) -> tuple[MoEConfig, dict[str, Any]]:
    """A layer's config, and the same as JSON."""
    given: dict[str, Any] = {
        "hidden_size": hidden,
        "ffn_hidden_size": ffn,
        "num_experts": experts,
        "top_k": top_k,
        "activation": activation,
        "gated": False,
        "bias": "expert",
        "load_balancing_coefficient": 0.0,
    }
    if top_k > 1:
        given["gate_normalization"] = 1.0  # DeepSpeed's top-2 gate divides by the sum of both, its top-1 gate does not
    config = MoEConfig(**given)
    return config, config_to_json(config)
