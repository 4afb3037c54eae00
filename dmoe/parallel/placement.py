"""Which rank owns which expert, and what counts as a group of ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.distributed as dist

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def as_group(ep_group: Any, name: str = "ep_group") -> ProcessGroup:
    """The process group that ``ep_group`` is, or that a one-dimensional mesh stands for.

    Args:
        ep_group: a ``torch.distributed.ProcessGroup`` that this rank belongs to, or a ``DeviceMesh`` of one dimension.
        name: what the user calls it, for error messages.

    Raises:
        TypeError: anything else, such as the placeholder that ``new_group`` gives to ranks outside the group.
        ValueError: a mesh of more dimensions.
    """
    if dist.is_available() and dist.is_initialized():
        from torch.distributed.device_mesh import DeviceMesh

        if isinstance(ep_group, DeviceMesh):
            if ep_group.ndim != 1:
                raise ValueError(
                    f"{name}: expected a DeviceMesh of one dimension, got {ep_group.ndim} "
                    f"{ep_group.mesh_dim_names or ''}; pass one of them, as mesh['ep']"
                )
            return ep_group.get_group()
        if isinstance(ep_group, dist.ProcessGroup) and dist.get_rank(ep_group) >= 0:
            return ep_group
    raise TypeError(
        f"{name}: expected a torch.distributed ProcessGroup that this rank belongs to, or a one-dimensional "
        f"DeviceMesh, got {type(ep_group).__name__}"
    )


def local_experts(num_experts: int, world_size: int, rank: int) -> range:
    """The experts that a rank owns: contiguous blocks of ``num_experts / world_size``, in the order of the ranks.

    Raises:
        ValueError: the experts cannot be divided evenly.
    """
    if world_size > num_experts:
        raise ValueError(
            f"ep_group: expected at most num_experts = {num_experts} ranks, got {world_size}: an expert is not split "
            "over ranks"
        )
    if num_experts % world_size:
        raise ValueError(
            f"ep_group: expected num_experts to be a multiple of the ranks, got E = {num_experts} experts for "
            f"W = {world_size} ranks"
        )
    each = num_experts // world_size
    return range(rank * each, (rank + 1) * each)
