"""The ranks that share experts, and those that hold the same ones, as DeepSpeed keeps them by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import deepspeed
import torch.distributed as dist
from deepspeed.utils import groups

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def group_name(ep_size: int) -> str:
    """Under which DeepSpeed keeps the groups of ``ep_size`` ranks that share experts."""
    return f"ep_size_{ep_size}"


def expert_parallel_group(ep_size: int, *, use_data_before_expert_parallelism: bool = False) -> ProcessGroup | None:
    """The ``ep_size`` ranks that this rank shares its experts with, for ``dmoe.MoE(..., ep_group=...)``.

    Made once, by DeepSpeed, with the groups of ranks that hold the same experts; every rank has to ask, for the same.

    Args:
        ep_size: a divisor of the number of ranks, W; 1: every rank has all experts.
        use_data_before_expert_parallelism: as in DeepSpeed's config: ranks W / ep_size apart, not consecutive ones.

    Returns:
        The group; None for ``ep_size=1``.

    Raises:
        ValueError: ranks that cannot be divided so, or that are divided otherwise already.
    """
    make_groups(ep_size, use_data_before_expert_parallelism)
    return None if ep_size == 1 else groups._get_expert_parallel_group(group_name(ep_size))


def make_groups(ep_size: int, apart: bool) -> None:
    """Let DeepSpeed make the groups of ``ep_size`` ranks, unless it has. ``apart``: ranks W / ep_size apart."""
    deepspeed.init_distributed(verbose=False)  # knows by itself whether there is anything to do
    world, rank = dist.get_world_size(), dist.get_rank()
    if ep_size < 1 or world % ep_size:
        raise ValueError(
            f"expert_parallel_group: ep_size: expected a divisor of the number of ranks, {world}, got {ep_size}"
        )
    name = group_name(ep_size)
    if name not in groups._get_expert_parallel_group_dict():
        groups._create_expert_and_data_parallel(ep_size, use_data_before_expert_parallel_=apart)
    replicas = world // ep_size
    expected = [rank % replicas + n * replicas for n in range(ep_size)] if apart else _block(rank, ep_size)
    if ranks_of(name) != expected:
        raise ValueError(
            f"expert_parallel_group: use_data_before_expert_parallelism: expected {not apart}, as the ranks "
            f"{ranks_of(name)} already share experts, got {apart}"
        )


def _block(rank: int, size: int) -> list[int]:
    return list(range(rank - rank % size, rank - rank % size + size))


def ranks_of(name: str) -> list[int]:
    """The ranks with which this one shares experts, of all ranks."""
    group: Any = groups._get_expert_parallel_group(name)
    return dist.get_process_group_ranks(group)


def replicas_of(name: str) -> Any:
    """The group of ranks that hold the same experts."""
    return groups._get_expert_data_parallel_group(name)
