"""States of FSDP2 for the example: whole ones of those that are cut over the ranks, and cut ones of whole ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


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
