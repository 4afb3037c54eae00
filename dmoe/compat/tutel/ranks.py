"""What Tutel's arguments say about ranks."""

from __future__ import annotations

import os
import re
from typing import Any

import torch
import torch.distributed as dist

from dmoe.compat._groups import made_once
from dmoe.parallel.two_level import TwoLevel


def all_ranks() -> Any:
    """The group of all ranks; None where there is none."""
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None


def global_experts(per_device: int, group: Any) -> int:
    """E, of experts per rank; -n is one of n ranks.

    Raises:
        ValueError: ranks that cannot be shared out so.
    """
    ranks = 1 if group is None else dist.get_world_size(group)
    if per_device > 0:
        return per_device * ranks
    if ranks % -per_device:
        raise ValueError(
            f"moe_layer: experts: num_experts_per_device: expected {-per_device} ranks for each expert to divide the "
            f"{ranks} ranks of the group"
        )
    return ranks // -per_device


def sharded_ranks(parallel_type: str, sharded: int) -> None:
    """Check how Tutel would spread the work: data parallel, by gathering weights, or by slices of an expert.

    All of them compute the same. dmoe keeps a slice of each expert on each of the ranks that share it (Tutel's
    ``model``), and moves tokens.

    Raises:
        ValueError: another value than Tutel takes.
    """
    found = re.fullmatch(r"adaptive:(-?\d+)", parallel_type) if isinstance(parallel_type, str) else None
    valid = [0, *(r for r in range(1, sharded + 1) if sharded % r == 0)]
    if found and min(max(int(found.group(1)), 0), sharded) in valid:
        return
    if found or parallel_type not in ("data", "model", "auto"):
        raise ValueError(
            f"moe_layer: parallel_type: expected 'data', 'model', 'auto' or 'adaptive:r' with r in {valid} for "
            f"{sharded} ranks of an expert, got {parallel_type!r}"
        )


def levels_of(use_2dh: bool, ep_levels: Any, group: Any) -> Any:
    """The groups of two hops; None where one will do.

    Raises:
        ValueError: two hops are asked for, and nothing says which ranks are a node.
    """
    if ep_levels is not None or not use_2dh:
        return ep_levels
    ranks, here = dist.get_world_size(group), int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    if here in (1, ranks):  # nothing lies between
        return None
    if not here or ranks % here or ranks != dist.get_world_size():
        raise ValueError(
            f"moe_layer: use_2dh: expected LOCAL_WORLD_SIZE, as torchrun sets it, to divide the {ranks} ranks of the "
            f"group, which are all there are, or ep_levels=dmoe.parallel.TwoLevel(...); got {here or 'none'} of "
            f"{dist.get_world_size()}"
        )

    def levels() -> TwoLevel:
        from torch.distributed.device_mesh import init_device_mesh

        kind = "cuda" if "nccl" in dist.get_backend(group) else "cpu"
        return TwoLevel.of_mesh(init_device_mesh(kind, (ranks // here, here)))

    return made_once(("two levels", here), levels)


def largest(number: int, group: Any, device: torch.device) -> int:
    """The largest of the ranks' numbers; the host waits for it."""
    most = torch.tensor(number, device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=group)
    return int(most)
