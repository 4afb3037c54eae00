"""``--ddp-backend fully_sharded``: PyTorch's FSDP2 instead of fairscale's, which no longer imports.

What every rank has is cut over all ranks, layer by layer. Experts are no part of that: they are spread already, and
stay whole on their rank. Two cases have them on a mesh of their own, the ranks that hold the same experts: where there
are such ranks, which then share them, and under mixed precision (``--fp16`` or ``--bf16`` without
``--memory-efficient-...``), where FSDP keeps float32 and computes in half.

==============================  ===========================================================================
flag                            here
==============================  ===========================================================================
``--memory-efficient-fp16``     parameters are fp16, and so are gradients and their sums
``--fp16``                      ``MixedPrecisionPolicy(param_dtype=float16)``, float32 parameters
``--fp32-reduce-scatter``       ``reduce_dtype=float32``
``--no-reshard-after-forward``  ``reshard_after_forward=False``
``--min-params-to-wrap``        layers of fewer parameters are cut with the model; with
                                ``--checkpoint-activations`` every layer is cut by itself
``--cpu-offload``               refused
``--use-sharded-state``         no effect: experts are in a file for each rank, the rest in one
==============================  ===========================================================================
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from fairseq.distributed import utils as distributed_utils
from fairseq.models.transformer import DEFAULT_MIN_PARAMS_TO_WRAP
from fairseq.utils import safe_getattr
from omegaconf import open_dict
from torch import Tensor, nn

import dmoe
from dmoe.integrations.fairseq_moe.parallel import ExpertGroups, experts_of


def casts(cfg: Any) -> bool:
    """Whether FSDP keeps float32 parameters and computes in half."""
    common = cfg.common
    return bool(
        (common.fp16 and not common.memory_efficient_fp16) or (common.bf16 and not common.memory_efficient_bf16)
    )


@contextmanager
def without_half(cfg: Any) -> Iterator[None]:
    """For fairseq's constructor, which would round the parameters for good."""
    fp16, bf16 = cfg.common.fp16, cfg.common.bf16
    with open_dict(cfg):
        cfg.common.fp16, cfg.common.bf16 = False, False
        yield
        cfg.common.fp16, cfg.common.bf16 = fp16, bf16


@contextmanager
def scaling_only(cfg: Any) -> Iterator[None]:
    """For the optimizer's constructor: scale the loss, and keep no float32 copy of float32 parameters."""
    common = cfg.common
    with open_dict(cfg):
        common.memory_efficient_fp16, common.memory_efficient_bf16 = common.fp16, common.bf16
        yield
        common.memory_efficient_fp16, common.memory_efficient_bf16 = False, False


def shard(cfg: Any, model: nn.Module, groups: ExpertGroups, device: torch.device) -> nn.Module:
    """``fully_shard`` on every layer and on the model, in place.

    Args:
        cfg: fairseq's.
        model: this rank's, in float32 or, with ``--memory-efficient-fp16``, in half.
        groups: of its experts.
        device: where to.
    """
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = model.to(device)
    training = cfg.distributed_training
    half = torch.bfloat16 if cfg.common.bf16 else torch.float16
    policy: dict[str, Any] = {
        "param_dtype": half if casts(cfg) else None,
        "reduce_dtype": torch.float32 if training.fp32_reduce_scatter else None,
    }
    own = groups.replicas is not None or casts(cfg)
    if own:
        _shard_experts(model, groups, device, MixedPrecisionPolicy(**policy, cast_forward_inputs=False))
    options: dict[str, Any] = {
        "mesh": DeviceMesh.from_group(distributed_utils.get_data_parallel_group(), device.type),
        "mp_policy": MixedPrecisionPolicy(**policy),
        "reshard_after_forward": not training.no_reshard_after_forward,
        "ignored_params": set() if own else set(experts_of(model)),
    }
    smallest = safe_getattr(cfg.model, "min_params_to_wrap", None) or DEFAULT_MIN_PARAMS_TO_WRAP
    for layer in _layers(model):
        size = sum(p.numel() for p in layer.parameters() if not dmoe.is_expert_param(p))
        if safe_getattr(cfg.model, "checkpoint_activations", False) or size >= smallest:
            fully_shard(layer, **options)
    fully_shard(model, **{**options, "reshard_after_forward": False})  # backward would gather it at once
    _load_whole_tensors(model)
    return model


def _layers(model: nn.Module) -> Iterable[nn.Module]:
    """The layers of encoder and decoder."""
    for half in (getattr(model, "encoder", None), getattr(model, "decoder", None)):
        if half is not None and hasattr(half, "layers"):
            yield from half.layers.children()


_alone: list[Any] = []


def _shard_experts(model: nn.Module, groups: ExpertGroups, device: torch.device, policy: Any) -> None:
    """Experts on a mesh of the ranks that hold the same, which may be this one alone."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard

    group = groups.replicas
    if group is None:
        if not _alone:
            _alone.append(dist.new_group([dist.get_rank()], use_local_synchronization=True))
        group = _alone[0]
    mesh = DeviceMesh.from_group(group, device.type)

    def placement(parameter: Tensor) -> Shard:
        # Along the experts, or, where a rank has too few, along a dimension of theirs that divides evenly.
        dims = [dim for dim in range(parameter.dim()) if parameter.shape[dim] % mesh.size() == 0]
        return Shard(dims[0] if dims else 0)

    for moe in dmoe.moe_layers(model).values():
        fully_shard(moe.experts, mesh=mesh, mp_policy=policy, shard_placement_fn=placement)
        moe.experts.mark_parameters()  # FSDP made parameters of its own
        moe.experts.register_state_dict_post_hook(_gather_experts)
        moe.experts.register_load_state_dict_pre_hook(_cut_experts)


def _gather_experts(experts: Any, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    for name, _parameter in experts.named_parameters():
        state_dict[prefix + name] = whole(state_dict[prefix + name])


def _cut_experts(experts: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, parameter in experts.named_parameters():
        if prefix + name in state_dict:
            state_dict[prefix + name] = like(state_dict[prefix + name], parameter)


def _load_whole_tensors(model: nn.Module) -> None:
    """Checkpoints hold whole tensors: cut them when they are loaded."""

    def cut(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        for name, value in module.state_dict(keep_vars=True).items():  # under the names that checkpoints have
            key = prefix + name
            if key in state_dict and hasattr(value, "device_mesh"):
                state_dict[key] = like(state_dict[key], value)

    model.register_load_state_dict_pre_hook(cut)


def whole(tensor: Any) -> Any:
    """All of a ``DTensor``, on every rank of its mesh, which all have to ask; anything else as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def like(tensor: Any, parameter: Any) -> Any:
    """This rank's part of a tensor in the shape of a ``DTensor``, which every rank has whole; no rank is asked.

    Anything else is returned as it is: numbers, tensors for plain parameters, and ``DTensor``.
    """
    if not hasattr(parameter, "device_mesh") or not isinstance(tensor, Tensor) or hasattr(tensor, "device_mesh"):
        return tensor
    if tensor.shape != parameter.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    tensor = tensor.to(parameter.device)
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)


def load_whole_states(optimizer: Any) -> None:
    """Let an optimizer's ``load_state_dict`` take whole tensors, as :func:`gathered` makes them."""
    stock = optimizer.load_state_dict

    def load_state_dict(state_dict: dict[str, Any], optimizer_overrides: Any = None) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        states = {
            index: {kind: like(value, parameters[index]) for kind, value in state.items()}
            for index, state in state_dict["state"].items()
        }
        stock({**state_dict, "state": states}, optimizer_overrides)

    optimizer.load_state_dict = load_state_dict


def gathered(state: dict[str, Any], *, everything: bool) -> dict[str, Any]:
    """A training state with whole tensors in place of every ``DTensor``, on the CPU; all ranks have to ask.

    Args:
        state: of fairseq's ``Trainer``.
        everything: keep also what every rank gets to see; otherwise only experts, and None for the rest.
    """
    ranks = dist.get_world_size(distributed_utils.get_data_parallel_group())

    def here(value: Any) -> Any:
        if not hasattr(value, "full_tensor"):
            return value
        full = whole(value)
        return full.cpu() if everything or value.device_mesh.size() < ranks else None

    state["model"] = {name: here(value) for name, value in state["model"].items()}
    optimizer = state.get("last_optimizer_state")
    if optimizer is not None:
        optimizer["state"] = {
            index: {kind: here(value) for kind, value in each.items()} for index, each in optimizer["state"].items()
        }
    return state
