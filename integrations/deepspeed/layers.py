"""What DeepSpeed's engine looks for in a model: layers of its own class, and experts marked with their group's name."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from deepspeed.utils import set_z3_leaf_module
from torch import nn

import dmoe
from dmoe.compat.deepspeed import MoE as CompatMoE
from dmoe.integrations.deepspeed.groups import group_name, make_groups, ranks_of, replicas_of
from dmoe.integrations.deepspeed.states import add_state_hooks
from dmoe.parallel import AllToAllDispatcher, LoadOfRanks

Layer = dmoe.MoE | CompatMoE


def prepare(model: nn.Module, config: Mapping[str, Any] | str | Path) -> dict[str, Any]:
    """Make a model's experts known to DeepSpeed, before ``deepspeed.initialize``; once more does nothing.

    Layers of :class:`dmoe.MoE` and :class:`dmoe.compat.deepspeed.MoE` become DeepSpeed's ``MoE`` too, in place (their
    class is then one of both), their experts' parameters get ``allreduce = False`` and ``group_name``, and their state
    DeepSpeed's names. Experts' gradients are left as sums over the ranks that share them, as the engine divides them by
    all ranks: what an optimizer sees is the gradient of the mean of all ranks' losses. Selection biases follow the load
    of all ranks. With ZeRO 3 layers keep their class and names: experts that ranks share are cut over the ranks that
    hold the same ones.

    Args:
        model: the same on all ranks but for its experts; layers that ranks share are built with ``dtensor=False``.
        config: DeepSpeed's, or a JSON file of it.

    Returns:
        The config for ``deepspeed.initialize``, with the layers' own under ``dmoe``, so that checkpoints have them.

    Raises:
        ValueError: experts that DeepSpeed cannot train or save; the sentence says which and why.
    """
    settings = dict(config) if isinstance(config, Mapping) else json.loads(Path(config).read_text(encoding="utf-8"))
    apart = bool(settings.get("use_data_before_expert_parallelism", False))
    stage = int(settings.get("zero_optimization", {}).get("stage", 0))
    told: dict[str, Any] = {}
    for name, layer in layers_of(model):
        inner: Any = layer.deepspeed_moe if isinstance(layer, CompatMoE) else layer
        told[f"{name}." if name else ""] = _told(inner.config)
        if isinstance(layer, DeepSpeedMoE):
            continue
        _check(name, inner)
        ep_size = _ep_size(layer)
        make_groups(ep_size, apart)
        if isinstance(layer, CompatMoE):
            layer.set_deepspeed_parallelism(apart)
        if ep_size > 1:
            _check_ranks(name, inner, ep_size)
            inner.experts.set_grad_scale(1.0)
        if inner.bias_ranks is None:
            inner.bias_ranks = LoadOfRanks(dist.group.WORLD)  # type: ignore[arg-type]
        if stage < 3:
            _become_deepspeeds(layer, ep_size)
        else:
            _prepare_for_zero3(inner, ep_size)
    return {**settings, "dmoe": {"layers": told}}


def layers_of(model: nn.Module) -> Iterator[tuple[str, Layer]]:
    """The layers that the engine is to take for its own, by name; what is inside one of them is not one."""
    inside: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, Layer) and id(module) not in inside:
            inside |= {id(each) for each in module.modules()}
            yield name, module


def _ep_size(layer: Layer) -> int:
    if isinstance(layer, CompatMoE):
        return layer.ep_size
    return layer.dispatcher.num_ranks if isinstance(layer.dispatcher, AllToAllDispatcher) else 1


def _told(config: dmoe.MoEConfig) -> dict[str, Any] | None:
    try:
        return dmoe.config_to_json(config)
    except ValueError:  # a function of the user's, which no file can hold
        return None


def _become_deepspeeds(layer: Layer, ep_size: int) -> None:
    """Of DeepSpeed's class as well, as it looks for layers by their class; and its experts by what they carry."""
    inner: Any = layer
    if isinstance(layer, CompatMoE):
        inner = layer.deepspeed_moe
        layer.__class__ = _class_of_both(type(layer), DeepSpeedMoE)
    else:
        layer.__class__ = _class_of_both(type(layer), EngineLayer)
        add_state_hooks(layer)
    for parameter in inner.experts.parameters():
        parameter.allreduce, parameter.group_name = False, group_name(ep_size)


class EngineLayer(DeepSpeedMoE):
    """What the engine asks of a layer, beside :class:`dmoe.MoE`, whose forward and state it has."""

    config: dmoe.MoEConfig

    @property
    def num_experts(self) -> int:
        """E."""
        return self.config.num_experts

    @property
    def ep_size(self) -> int:
        """Ranks that share the experts."""
        return _ep_size(self)  # type: ignore[arg-type]

    @property
    def num_local_experts(self) -> int:
        """Experts of this rank."""
        return self.num_experts // self.ep_size

    @property
    def expert_group_name(self) -> str:
        """Under which the engine finds the groups of ranks."""
        return group_name(self.ep_size)

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """The engine calls it; :func:`prepare` has made the groups."""


@functools.cache
def _class_of_both(own: type, deepspeeds: type) -> type:
    return type(own.__name__, (own, deepspeeds), {"__module__": own.__module__})


def _prepare_for_zero3(layer: dmoe.MoE, ep_size: int) -> None:
    """Gathered as a whole, and as DeepSpeed's own expert parallelism (AutoEP) marks experts for ZeRO 3."""
    set_z3_leaf_module(layer, True)  # what its parts give each other is more than tensors, which ZeRO 3 looks for
    name = group_name(ep_size)
    for parameter in layer.experts.parameters() if ep_size > 1 else ():
        marks = {
            "group_name": name,
            "ds_zero_placement_family": "autoep_expert",
            "ds_zero_partition_group_name": name,
            "ds_zero_partition_process_group": replicas_of(name),
        }
        for mark, value in marks.items():
            setattr(parameter, mark, value)


def _check(name: str, layer: dmoe.MoE) -> None:
    """Raise ValueError for a layer that DeepSpeed could not train or save."""
    where = f"prepare: {name or 'the model'}"
    if "expert" in name:
        raise ValueError(
            f"{where}: expected a layer whose name has no 'expert' in it, as DeepSpeed's engine would take all its "
            "tensors for an expert's; got this name"
        )
    experts = layer.experts
    if getattr(experts, "lora", None) is not None or not hasattr(experts, "up_name") or experts.weights().is_quantized:
        raise ValueError(f"{where}: expected experts of plain weights, got adapters or codes in them")
    if layer.config.accumulate_main_grad:
        raise ValueError(f"{where}: accumulate_main_grad: expected False, as DeepSpeed reads `grad`, got True")
    if layer.config.expert_grad_scale == "sqrt_world_size":
        raise ValueError(
            f"{where}: expert_grad_scale: expected 'mean', or 'sum' for DeepSpeed to divide, got 'sqrt_world_size'"
        )
    if any(hasattr(parameter, "to_local") for parameter in experts.parameters()):
        raise ValueError(f"{where}: expected experts of plain tensors, dmoe.MoE(..., dtensor=False), got DTensor")


def _check_ranks(name: str, layer: dmoe.MoE, ep_size: int) -> None:
    dispatcher: Any = layer.dispatcher
    if dispatcher.ffn_shard[1] > 1:
        raise ValueError(
            f"prepare: {name}: expected whole experts on each rank, got slices: {dispatcher.num_ranks} ranks share "
            f"{layer.config.num_experts} experts, or expert_tp_group was given"
        )
    if list(dispatcher.ranks) != ranks_of(group_name(ep_size)):
        raise ValueError(
            f"prepare: {name}: ep_group: expected the ranks {ranks_of(group_name(ep_size))}, which DeepSpeed's layout "
            f"has, got {list(dispatcher.ranks)}: expert_parallel_group({ep_size}) makes them"
        )
