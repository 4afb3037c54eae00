"""Megatron's own spec of a model, with all that its own training scripts would pass: what dmoe's layers go into.

Whatever one of its functions takes, and a ``TransformerConfig`` holds under the same name, is handed on, in any
release: a part of the model that is not dmoe's must not change because dmoe's layer stands beside it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from megatron.core.models.gpt import gpt_layer_specs

from dmoe.integrations.megatron.refusals import refuse


def native_block(
    config: Any,
    use_transformer_engine: bool | None = None,
    vp_stage: int | None = None,
    pp_rank: int | None = None,
    further: Mapping[str, Any] | None = None,
) -> Any:
    """``TransformerBlockSubmodules`` of a pipeline stage, in which every layer is Megatron's own.

    Args:
        config: ``TransformerConfig``.
        use_transformer_engine: whether attention and norms are Transformer Engine's; None as ``config`` says.
        vp_stage: of a virtual pipeline.
        pp_rank: the stage; None for this rank's.
        further: arguments of Megatron's function, before what ``config`` holds.

    Raises:
        ValueError: a variant of attention for which Megatron needs Transformer Engine, and there is none.
    """
    variant = getattr(config, "experimental_attention_variant", None)
    if variant is None:
        make: Callable[..., Any] = gpt_layer_specs.get_gpt_decoder_block_spec
    else:
        make = _with_variant(variant)
    own = {"use_transformer_engine": _use_transformer_engine(config, use_transformer_engine), "vp_stage": vp_stage}
    return _called(make, config, own | {"pp_rank": pp_rank}, further or {})


def native_layers(config: Any, use_transformer_engine: bool | None = None) -> list[Any]:
    """Specs of all layers of the model; with a variant of attention those of this pipeline stage.

    Args, Raises: as for :func:`native_block`.
    """
    if getattr(config, "experimental_attention_variant", None) is not None:
        return list(native_block(config, use_transformer_engine).layer_specs)
    own = {"use_transformer_engine": _use_transformer_engine(config, use_transformer_engine)}
    specs = _called(gpt_layer_specs.get_gpt_decoder_layer_specs, config, own, {})
    return list(getattr(specs, "layer_specs", specs))


def _with_variant(variant: str) -> Callable[..., Any]:
    from megatron.core.models.gpt import experimental_attention_variant_module_specs as variants

    if not variants.HAVE_TE:
        refuse(
            "experimental_attention_variant",
            variant,
            "Megatron builds it from Transformer Engine, which is not installed",
            "install that, or leave it out",
        )
    return variants.get_transformer_block_with_experimental_attention_variant_spec


def _called(make: Callable[..., Any], config: Any, own: Mapping[str, Any], further: Mapping[str, Any]) -> Any:
    """Megatron's function with the arguments that this release's takes: the given ones, and what the config holds."""
    named = [name for name in inspect.signature(make).parameters if name != "config"]
    arguments = {name: getattr(config, name) for name in named if hasattr(config, name)}
    arguments |= {name: value for name, value in own.items() if name in named}
    return make(config, **arguments | dict(further))


def _use_transformer_engine(config: Any, wanted: bool | None) -> bool:
    if wanted is not None:
        return wanted
    available = bool(getattr(gpt_layer_specs, "HAVE_TE", False))
    return available and config.transformer_impl == "transformer_engine"
