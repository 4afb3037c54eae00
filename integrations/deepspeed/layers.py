"""What DeepSpeed's engine looks for in a model: layers of its own class, and experts marked with their group's name."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import deepspeed
import torch.distributed as dist
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import set_z3_leaf_module
from torch import nn

import dmoe
from dmoe.integrations.deepspeed.groups import group_name, make_groups, ranks_of, replicas_of
from dmoe.integrations.deepspeed.states import add_state_hooks
from dmoe.parallel import AllToAllDispatcher, LoadOfRanks


def prepare(model: nn.Module, config: Mapping[str, Any] | str | Path) -> dict[str, Any]:
    """Make a model's experts known to DeepSpeed, before ``deepspeed.initialize``; once more does nothing.

    Layers of :class:`dmoe.MoE` and of ``dmoe.compat.deepspeed`` become DeepSpeed's ``MoE`` too, in place (their
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
        ValueError: experts that DeepSpeed cannot train or save, or fp16 without ZeRO; the sentence says which and why.
    """
    settings = dict(config) if isinstance(config, Mapping) else json.loads(Path(config).read_text(encoding="utf-8"))
    apart = bool(settings.get("use_data_before_expert_parallelism", False))
    stage = int(settings.get("zero_optimization", {}).get("stage", 0))
    if stage == 0 and settings.get("fp16", {}).get("enabled"):
        raise ValueError(
            "prepare: config: expected ZeRO 1, 2 or 3 with fp16, got stage 0, where DeepSpeed divides gradients by a "
            "loss scale that it has not multiplied the loss by"
        )
    if isinstance(model, PipelineModule):
        raise ValueError("prepare: model: expected a plain module, got DeepSpeed's PipelineModule")
    told: dict[str, Any] = {"layers": {}, "experts": {}}
    for name, layer in layers_of(model):
        mixture = mixture_of(layer)
        told["layers"][f"{name}." if name else ""] = _told(mixture.config)
        told["experts"] |= _experts_of(name, layer, mixture)
        if isinstance(layer, DeepSpeedMoE) or getattr(layer, "_z3_leaf", False):
            continue
        _check(name, mixture)
        ep_size = ep_size_of(layer)
        make_groups(ep_size, apart)
        if mixture is not layer:
            layer.set_deepspeed_parallelism(apart)
        if ep_size > 1:
            _check_ranks(name, mixture, ep_size)
            mixture.experts.set_grad_scale(1.0)
        if mixture.bias_ranks is None:
            mixture.bias_ranks = LoadOfRanks(dist.group.WORLD)  # type: ignore[arg-type]
        if stage < 3:
            _become_deepspeeds(layer, mixture, ep_size)
        else:
            _prepare_for_zero3(name, layer, mixture, ep_size)
    return {**settings, "dmoe": told}


def layers_of(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers that the engine is to take for its own, by name; what is inside one of them is not one."""
    inside: set[int] = set()
    for name, module in model.named_modules():
        if mixture_of(module) is not None and id(module) not in inside:
            inside |= {id(each) for each in module.modules()}
            yield name, module


def mixture_of(layer: nn.Module) -> Any:
    """The :class:`dmoe.MoE` that a layer is, or that one of DeepSpeed's names (``dmoe.compat``) has inside; or None."""
    inside = getattr(layer, "deepspeed_moe", None)
    found = inside if isinstance(inside, dmoe.MoE) else layer
    return found if isinstance(found, dmoe.MoE) else None


def ep_size_of(layer: Any) -> int:
    """Ranks that share a layer's experts."""
    if mixture_of(layer) is not layer:
        return int(layer.ep_size)
    return layer.dispatcher.num_ranks if isinstance(layer.dispatcher, AllToAllDispatcher) else 1


def _experts_of(name: str, layer: nn.Module, mixture: dmoe.MoE) -> dict[str, int | None]:
    """Of each parameter of experts, by its name in the model, how many they are; None where widths differ."""
    own = {id(parameter) for parameter in mixture.experts.parameters()}
    number = mixture.config.num_experts if isinstance(mixture.config.ffn_hidden_size, int) else None
    found = layer.named_parameters(prefix=name)
    return {each: number for each, parameter in found if id(parameter) in own}


def _told(config: dmoe.MoEConfig) -> dict[str, Any] | None:
    try:
        return dmoe.config_to_json(config)
    except ValueError:  # a function of the user's, which no file can hold
        return None


def _become_deepspeeds(layer: Any, mixture: dmoe.MoE, ep_size: int) -> None:
    """Of DeepSpeed's class as well, as it looks for layers by their class; and its experts by what they carry."""
    kind: Any = type(layer)
    layer.__class__ = _class_of_both(kind, EngineLayer if mixture is layer else DeepSpeedMoE)
    if mixture is layer:  # the other one has DeepSpeed's names by itself
        add_state_hooks(mixture)
    for parameter in mixture.experts.parameters():
        parameter.allreduce, parameter.group_name = False, group_name(ep_size)  # type: ignore[attr-defined]


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
        return ep_size_of(self)

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
def _class_of_both(own: Any, deepspeeds: Any) -> Any:
    return type(own.__name__, (own, deepspeeds), {"__module__": own.__module__})


def _prepare_for_zero3(where: str, layer: nn.Module, mixture: dmoe.MoE, ep_size: int) -> None:
    """Gathered as a whole, and as DeepSpeed's own expert parallelism (AutoEP) marks experts for ZeRO 3."""
    if ep_size > 1 and not hasattr(DeepSpeedEngine, "_resolve_zero3_param_placement"):
        raise ValueError(
            f"prepare: {where}: expected ZeRO 0, 1 or 2 for experts that ranks share, or a DeepSpeed (0.19.8) that can "
            f"cut them over the ranks that hold the same ones, got ZeRO 3 and DeepSpeed {deepspeed.__version__}"
        )
    set_z3_leaf_module(layer, True)  # what its parts give each other is more than tensors, which ZeRO 3 looks for
    name = group_name(ep_size)
    for parameter in mixture.experts.parameters() if ep_size > 1 else ():
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
    experts: Any = layer.experts
    held = [getattr(experts, each, None) for each in (getattr(experts, "up_name", ""), "down_proj")]
    if getattr(experts, "lora", None) is not None or not all(isinstance(each, nn.Parameter) for each in held):
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
    """Raise ValueError for experts that ranks share otherwise than DeepSpeed would."""
    dispatcher: Any = layer.dispatcher
    if any(hasattr(parameter, "ds_id") for parameter in layer.experts.parameters()):
        raise ValueError(
            f"prepare: {name}: expected experts that ranks share to be built outside of deepspeed.zero.Init, which "
            "cuts them over all ranks as if they were the same on each; got them from inside"
        )
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
