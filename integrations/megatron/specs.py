"""Megatron's layer specs with dmoe in the place of its MoE layers, or of the experts inside them.

Specs come from Megatron itself (``native_specs.py``), so that layer frequency, pipeline layout, variants of attention
and Transformer Engine stay as they are; only MoE layers are exchanged, in copies, since layers share one spec.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer

from dmoe.integrations.megatron import versions
from dmoe.integrations.megatron.experts import DmoeExperts
from dmoe.integrations.megatron.layer import DmoeLayer
from dmoe.integrations.megatron.native_specs import native_block, native_layers
from dmoe.integrations.megatron.options import current_options
from dmoe.integrations.megatron.refusals import refuse

Options = Mapping[str, Any] | None


def with_dmoe(spec: Any, options: Options = None) -> Any:
    """A copy of a spec, in which every MoE layer of Megatron's is a :class:`DmoeLayer`.

    Args:
        spec: anything that Megatron builds from and that holds MoE layers at any depth: the ``ModuleSpec`` of a
            transformer layer, of a stack of Mamba and other layers, or of the layers that predict further tokens;
            ``TransformerBlockSubmodules``.
        options: fields of :class:`dmoe.MoEConfig` that Megatron has no name for; None for those on the command line
            of the running training loop, where there is one.

    Raises:
        ValueError: no MoE layer is in it.
    """
    given = _options(options)
    return _with_moe_layers(spec, lambda mlp, submodules: ModuleSpec(DmoeLayer, {"options": given}, submodules))


def with_dmoe_experts(spec: Any, options: Options = None) -> Any:
    """A copy of a spec, in which every MoE layer of Megatron's keeps its router and its dispatcher.

    Args, Raises: as for :func:`with_dmoe`.
    """
    given = _options(options)

    def replaced(mlp: Any, submodules: Any) -> Any:
        submodules = copy.copy(submodules)
        submodules.experts = ModuleSpec(module=DmoeExperts, params={"options": given})
        return versions.with_submodules(mlp, submodules)

    return _with_moe_layers(spec, replaced)


def dmoe_layer_spec(config: Any, use_transformer_engine: bool | None = None, *, options: Options = None) -> Any:
    """The ``ModuleSpec`` of a transformer layer with dmoe, as Megatron's ``get_gpt_layer_..._spec``.

    Args:
        config: ``TransformerConfig``.
        use_transformer_engine: whether attention and norms are Transformer Engine's; None as ``config`` says.
        options: see :func:`with_dmoe`.

    Raises:
        ValueError: no layer of the model is a MoE layer.
    """
    layers = native_layers(config, use_transformer_engine)
    return with_dmoe(next((layer for layer in layers if _has_moe(layer)), layers[0]), options)


class DmoeTransformerLayer(TransformerLayer):
    """A transformer layer that finds its own spec by its number: what lets one constant spec serve every model.

    Args: as Megatron's ``TransformerLayer``; ``submodules`` are not looked at.
    """

    exchange: Callable[[Any], Any] = staticmethod(with_dmoe)

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
        spec = native_block(config, None, vp_stage, pp_rank).layer_specs[layer_number - 1]  # of this stage, from 1
        spec = type(self).exchange(spec) if _has_moe(spec) else spec
        kwargs = {**spec.params, **kwargs, "pg_collection": pg_collection, "vp_stage": vp_stage}
        super().__init__(config, spec.submodules, layer_number, *args, **kwargs)


class DmoeExpertsTransformerLayer(DmoeTransformerLayer):
    """The same with Megatron's router and dispatcher: only the experts are dmoe's."""

    exchange = staticmethod(with_dmoe_experts)


class BlockSpec(ModuleSpec):
    """The spec of a whole model: as it stands a constant one, which ``--spec`` wants up to 0.18; called, a stage's.

    Args:
        layer: the class of its transformer layers.
    """

    def __init__(self, layer: type[DmoeTransformerLayer]) -> None:
        super().__init__(module=layer)

    def __call__(
        self,
        config: Any,
        use_transformer_engine: bool | None = None,
        vp_stage: int | None = None,
        *,
        options: Options = None,
        **further: Any,
    ) -> Any:
        """``TransformerBlockSubmodules`` of this pipeline stage, as Megatron's ``get_gpt_decoder_block_spec``.

        Args:
            config: ``TransformerConfig``.
            use_transformer_engine: whether attention and norms are Transformer Engine's; None as ``config`` says.
            vp_stage: of a virtual pipeline.
            options: see :func:`with_dmoe`.
            **further: passed on to Megatron's function.

        A pipeline stage may hold no MoE layer: then nothing is replaced there.

        Raises:
            ValueError: a model without experts.
        """
        if not config.num_moe_experts:
            refuse("num_moe_experts", config.num_moe_experts, "a MoE layer needs experts", "give --num-experts")
        block = native_block(config, use_transformer_engine, vp_stage, further=further)
        return self.module.exchange(block, options) if _has_moe(block) else block


# `--spec dmoe.integrations.megatron dmoe_gpt_spec`, and `dmoe_block_spec(config)` from Python: each name does both.
dmoe_gpt_spec = dmoe_block_spec = BlockSpec(DmoeTransformerLayer)
dmoe_experts_spec = BlockSpec(DmoeExpertsTransformerLayer)


def _options(options: Options) -> dict[str, Any]:
    return current_options() if options is None else dict(options)


def _has_moe(spec: Any) -> bool:
    return _exchanged(spec, lambda mlp, submodules: None, {}) is not spec


def _with_moe_layers(spec: Any, replacement: Callable[[Any, Any], Any]) -> Any:
    exchanged = _exchanged(spec, replacement, {})
    if exchanged is spec:
        held = getattr(getattr(spec, "submodules", None), "mlp", None)
        raise ValueError(
            "dmoe.integrations.megatron: expected a spec with a MoE layer of Megatron's, got "
            f"{type(spec).__name__ if held is None else f'mlp = {held!r}'}; give --num-experts"
        )
    return exchanged


def _exchanged(spec: Any, replacement: Callable[[Any, Any], Any], seen: dict[int, Any]) -> Any:
    """A copy of whatever a model is built from, with MoE layers replaced; itself where it holds none."""
    if id(spec) not in seen:
        submodules = versions.moe_submodules(spec)
        if submodules is not None:
            seen[id(spec)] = replacement(spec, submodules)
        else:
            parts, rebuilt = _parts(spec)
            new = {name: _exchanged(part, replacement, seen) for name, part in parts.items()}
            changed = any(new[name] is not part for name, part in parts.items())
            seen[id(spec)] = rebuilt(new) if changed else spec
    return seen[id(spec)]


def _parts(spec: Any) -> tuple[dict[Any, Any], Callable[[dict[Any, Any]], Any]]:
    """What a part of a spec consists of, by name or number, and what makes a copy of it from others."""
    if isinstance(spec, list | tuple):
        return dict(enumerate(spec)), lambda new: type(spec)(new.values())
    if isinstance(spec, functools.partial):
        return spec.keywords, lambda new: functools.partial(spec.func, *spec.args, **new)
    if dataclasses.is_dataclass(spec) and not isinstance(spec, type):  # a ModuleSpec, or submodules

        def rebuilt(new: dict[Any, Any]) -> Any:
            fresh = copy.copy(spec)
            for name, part in new.items():
                setattr(fresh, name, part)
            return fresh

        return {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}, rebuilt
    return {}, lambda new: spec
