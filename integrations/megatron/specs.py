"""Megatron's layer specs with dmoe in the place of its MoE layers, or of the experts inside them.

Specs come from Megatron itself, so that layer frequency, pipeline layout and the attention of Transformer Engine stay
as they are; only ``mlp`` is replaced, in copies, since layers share one spec.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer, get_transformer_layer_offset

from dmoe.integrations.megatron import versions
from dmoe.integrations.megatron.experts import DmoeExperts
from dmoe.integrations.megatron.layer import DmoeLayer
from dmoe.integrations.megatron.options import current_options
from dmoe.integrations.megatron.refusals import refuse


def with_dmoe(spec: Any, options: Mapping[str, Any] | None = None) -> Any:
    """A copy of a spec, in which every MoE layer of Megatron's is a :class:`DmoeLayer`.

    Args:
        spec: ``ModuleSpec`` of a transformer layer, or ``TransformerBlockSubmodules``.
        options: fields of :class:`dmoe.MoEConfig` that Megatron has no name for.

    Raises:
        ValueError: no MoE layer is in it.
    """
    return _replaced(spec, lambda mlp, submodules: _dmoe_mlp(submodules, options))


def with_dmoe_experts(spec: Any, options: Mapping[str, Any] | None = None) -> Any:
    """A copy of a spec, in which every MoE layer of Megatron's keeps its router and its dispatcher.

    Args, Raises: as for :func:`with_dmoe`.
    """

    def replaced(mlp: Any, submodules: Any) -> Any:
        submodules = copy.copy(submodules)
        submodules.experts = ModuleSpec(module=DmoeExperts, params={"options": dict(options or {})})
        return versions.with_submodules(mlp, submodules)

    return _replaced(spec, replaced)


def dmoe_layer_spec(
    config: Any, use_transformer_engine: bool | None = None, *, options: Mapping[str, Any] | None = None
) -> Any:
    """The ``ModuleSpec`` of a transformer layer with dmoe, as Megatron's ``get_gpt_layer_..._spec``.

    Args:
        config: ``TransformerConfig``.
        use_transformer_engine: whether attention and norms are Transformer Engine's; None as ``config`` says.
        options: fields of :class:`dmoe.MoEConfig` that Megatron has no name for.

    Raises:
        ValueError: no layer of the model is a MoE layer.
    """
    layers = _layer_specs(config, use_transformer_engine)
    for layer in layers:
        if versions.moe_submodules(layer.submodules.mlp) is not None:
            return with_dmoe(layer, options)
    return with_dmoe(layers[0], options)


def dmoe_block_spec(
    config: Any,
    use_transformer_engine: bool | None = None,
    vp_stage: int | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    **further: Any,
) -> Any:
    """``TransformerBlockSubmodules`` of this pipeline stage with dmoe, as Megatron's ``get_gpt_decoder_block_spec``.

    Args:
        config: ``TransformerConfig``.
        use_transformer_engine: whether attention and norms are Transformer Engine's; None as ``config`` says.
        vp_stage: of a virtual pipeline.
        options: fields of :class:`dmoe.MoEConfig` that Megatron has no name for.
        **further: passed on to Megatron's function.

    A pipeline stage may hold no MoE layer: then nothing is replaced there.
    """
    return _block_spec(config, use_transformer_engine, vp_stage, further, lambda block: with_dmoe(block, options))


def dmoe_experts_spec(
    config: Any,
    use_transformer_engine: bool | None = None,
    vp_stage: int | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    **further: Any,
) -> Any:
    """As :func:`dmoe_block_spec`, but Megatron's router and dispatcher stay, and only the experts are dmoe's."""
    return _block_spec(
        config, use_transformer_engine, vp_stage, further, lambda block: with_dmoe_experts(block, options)
    )


class DmoeTransformerLayer(TransformerLayer):
    """A transformer layer that finds its own spec by its number: what lets one constant spec serve every model.

    Args: as Megatron's ``TransformerLayer``; ``submodules`` are not looked at.
    """

    def __init__(
        self,
        config: Any,
        submodules: Any = None,
        layer_number: int = 1,
        *args: Any,
        pg_collection: Any = None,
        vp_stage: int | None = None,
        **kwargs: Any,
    ) -> None:
        pp_rank = None if pg_collection is None else pg_collection.pp.rank()
        number = layer_number + get_transformer_layer_offset(config, vp_stage, pp_rank)
        spec = _layer_specs(config, None)[number - 1]
        if versions.moe_submodules(spec.submodules.mlp) is not None:
            spec = with_dmoe(spec, current_options())
        kwargs = {**spec.params, **kwargs, "pg_collection": pg_collection, "vp_stage": vp_stage}
        super().__init__(config, spec.submodules, layer_number, *args, **kwargs)


# `--spec dmoe.integrations.megatron dmoe_gpt_spec`: up to 0.18 a constant is expected there.
dmoe_gpt_spec = ModuleSpec(module=DmoeTransformerLayer)


def _block_spec(
    config: Any, use_transformer_engine: bool | None, vp_stage: int | None, further: Any, replace: Callable[[Any], Any]
) -> Any:
    te = _use_transformer_engine(config, use_transformer_engine)
    block = gpt_layer_specs.get_gpt_decoder_block_spec(config, use_transformer_engine=te, vp_stage=vp_stage, **further)
    if not config.num_moe_experts:
        refuse("num_moe_experts", config.num_moe_experts, "a MoE layer needs experts", "give --num-experts")
    has_moe = any(versions.moe_submodules(layer.submodules.mlp) is not None for layer in block.layer_specs)
    return replace(block) if has_moe else block


def _layer_specs(config: Any, use_transformer_engine: bool | None) -> list[Any]:
    """Megatron's specs of all layers of the model."""
    te = _use_transformer_engine(config, use_transformer_engine)
    specs = gpt_layer_specs.get_gpt_decoder_layer_specs(config, te)
    return list(getattr(specs, "layer_specs", specs))


def _use_transformer_engine(config: Any, wanted: bool | None) -> bool:
    if wanted is not None:
        return wanted
    available = bool(getattr(gpt_layer_specs, "HAVE_TE", False))
    return available and config.transformer_impl == "transformer_engine"


def _dmoe_mlp(submodules: Any, options: Mapping[str, Any] | None) -> ModuleSpec:
    return ModuleSpec(module=DmoeLayer, submodules=submodules, params={"options": dict(options or {})})


def _replaced(spec: Any, replacement: Callable[[Any, Any], Any]) -> Any:
    """A copy of the spec of a layer, or of a block, in which MoE layers are replaced."""
    if hasattr(spec, "layer_specs"):
        block = copy.copy(spec)
        seen: dict[int, Any] = {}
        for layer in spec.layer_specs:
            moe = versions.moe_submodules(layer.submodules.mlp) is not None
            seen.setdefault(id(layer), _replaced(layer, replacement) if moe else layer)
        block.layer_specs = [seen[id(layer)] for layer in spec.layer_specs]
        return block
    submodules = versions.moe_submodules(spec.submodules.mlp)
    if submodules is None:
        raise ValueError(
            "dmoe.integrations.megatron: expected a spec with a MoE layer of Megatron's, got mlp = "
            f"{spec.submodules.mlp!r}; give --num-experts"
        )
    layer = copy.copy(spec)
    layer.submodules = copy.copy(spec.submodules)
    layer.submodules.mlp = replacement(spec.submodules.mlp, submodules)
    return layer
