"""What a dense language model computes around its FFNs, read from its config: for telling what it can become."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# What means the same in all of them; head_dim only where the config has it.
CARRIED = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache", "rope_parameters"),
    *("tie_word_embeddings", "attention_dropout", "pad_token_id", "bos_token_id", "eos_token_id"),
)
# What is translated, or changes nothing that is computed (pretraining_tp since Transformers 5).
_READ = (
    *("intermediate_size", "attention_bias", "mlp_bias", "use_sliding_window", "sliding_window", "max_window_layers"),
    *("layer_types", "pretraining_tp"),
)
_FIELDS = "__dataclass_fields__"


@dataclass(frozen=True)
class Traits:
    """What a model's blocks compute around the FFN, read from its config.

    Attributes:
        norm: ``before`` attention and FFN, or ``behind``.
        qk_norm: of queries and keys: ``none``, of each ``head``, or over the whole ``width``.
        biases: of attention: ``none``, ``qkv``, or ``qkvo``.
        window: in tokens; None where no layer has one.
        windowed: which layers have it.
    """

    norm: str
    qk_norm: str
    biases: str
    window: int | None
    windowed: tuple[bool, ...]

    @property
    def windows(self) -> str:
        """How many layers have a window: ``none``, ``some`` or ``all``."""
        return "all" if all(self.windowed) else "some" if any(self.windowed) else "none"


_NORMS = {
    "qwen2": ("before", "none"),
    "qwen3": ("before", "head"),
    "llama": ("before", "none"),
    "mistral": ("before", "none"),
    "olmo2": ("behind", "width"),
}
DENSE_FAMILIES = tuple(_NORMS)


def traits_of(config: Any) -> Traits:
    """What a dense model's blocks compute.

    Args:
        config: of Transformers, of one of :data:`DENSE_FAMILIES`.

    Raises:
        ValueError: another family, or a field that no mixture of experts here has a counterpart for; it is named.
    """
    kind = config.model_type
    if kind not in _NORMS:
        raise ValueError(f"model_type: expected a dense model of {', '.join(DENSE_FAMILIES)}, got {kind}")
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError("quantization_config: expected weights that are not quantised, got some that are")
    if getattr(config, "auto_map", None):
        raise ValueError("auto_map: expected a model of Transformers itself, got one with code of its own")
    if getattr(config, "is_heterogeneous", False):
        raise ValueError("per_layer_config: expected layers that are alike, got some with a config of their own")
    heads = [name for name in config.architectures or [] if not name.endswith("ForCausalLM")]
    if heads:
        raise ValueError(f"architectures: expected a language model, ...ForCausalLM, got {heads[0]}")
    if getattr(config, "mlp_bias", False):
        raise ValueError(f"mlp_bias: expected an FFN without biases, which experts do not have, got {config.mlp_bias}")
    _refuse_unknown(config)
    biases = "qkv" if kind == "qwen2" else "qkvo" if getattr(config, "attention_bias", False) else "none"
    window = getattr(config, "sliding_window", None) or None
    layers = config.num_hidden_layers
    windowed = (window is not None,) * layers
    types = getattr(config, "layer_types", None)
    if types is not None:
        if kind not in ("qwen2", "qwen3"):
            raise ValueError(f"layer_types: expected none, which {kind} does not look at, got {sorted(set(types))}")
        windowed = tuple(layer_type == "sliding_attention" for layer_type in types)
    norm, qk_norm = _NORMS[kind]
    window = window if any(windowed) else None
    return Traits(norm, qk_norm, biases, window, windowed if window else (False,) * layers)


def _refuse_unknown(config: Any) -> None:
    """Fields that a newer release gave a family, and nobody here has read, may mean anything."""
    shared = set().union(*(getattr(base, _FIELDS, ()) for base in type(config).__mro__[1:]))
    for name, field in getattr(type(config), _FIELDS, {}).items():
        if name in shared or name in (*CARRIED, *_READ):
            continue
        if getattr(config, name, field.default) != field.default:
            raise ValueError(
                f"{name}: expected {field.default!r}, for which alone {config.model_type} is known to become a "
                f"mixture, got {getattr(config, name)!r}"
            )
