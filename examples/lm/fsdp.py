"""FSDP2 for the example: parameters and the optimizer's state cut over the ranks, and whole ones from and to them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

import dmoe
from dmoe.parallel import fully_shard_experts


def shard(model: nn.Module, everyone: DeviceMesh, replicas: DeviceMesh | None) -> None:
    """Cut a model's parameters, in place: experts over the ranks that hold the same ones, the rest over all.

    Args:
        model: with ``blocks``, each of which is gathered on its own.
        everyone: all ranks.
        replicas: those that hold the same experts; None where every rank holds all of them.
    """
    if replicas is not None:
        fully_shard_experts(model, replicas)
    for block in model.get_submodule("blocks").children():
        fully_shard(block, mesh=everyone)
    fully_shard(model, mesh=everyone)
    for layer in dmoe.moe_layers(model).values():
        layer.experts.mark_parameters()  # FSDP made parameters of its own


def whole(tree: Any, keep: bool) -> Any:
    """A state with every tensor whole and on the CPU; all ranks call this, and those that do not keep it get None."""
    if isinstance(tree, Tensor):
        tensor = tree.full_tensor() if isinstance(tree, DTensor) else tree
        return tensor.detach().cpu() if keep else None
    if isinstance(tree, dict):
        return {key: whole(value, keep) for key, value in tree.items()}
    return [whole(value, keep) for value in tree] if isinstance(tree, list) else tree


def parts(state: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """This rank's part of a whole ``{"model": ..., "optimizer": ...}``, as the two load it."""
    here = model.state_dict()
    cut = {name: _like(value, here[name]) for name, value in state["model"].items()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {
        position: {kind: _like(value, parameters[position]) for kind, value in of_one.items()}
        for position, of_one in state["optimizer"]["state"].items()
    }
    return {"model": cut, "optimizer": {**state["optimizer"], "state": moments}}


def _like(value: Any, target: Tensor) -> Any:
    """A whole tensor cut as another one is; anything else as it is."""
    if not isinstance(value, Tensor) or not isinstance(target, DTensor) or value.shape != target.shape:
        return value
    shape, offset = compute_local_shape_and_global_offset(value.shape, target.device_mesh, target.placements)
    mine = value[tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))]
    return DTensor.from_local(
        mine.clone().to(target.device), target.device_mesh, target.placements,
        run_check=False, shape=target.shape, stride=target.stride(),
    )  # fmt: skip
