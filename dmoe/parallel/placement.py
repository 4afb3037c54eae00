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
        if ep_group is dist.GroupMember.NON_GROUP_MEMBER:
            raise TypeError(f"{name}: expected a group that this rank belongs to, and rank {dist.get_rank()} does not")
    raise TypeError(
        f"{name}: expected a torch.distributed ProcessGroup that this rank belongs to, or a one-dimensional "
        f"DeviceMesh, got {type(ep_group).__name__}"
    )


def local_experts(num_experts: int, world_size: int, rank: int) -> range:
    """The experts that a rank owns: contiguous blocks of ``num_experts / world_size``, in the order of the ranks.

    With more ranks than experts, ``S = world_size / num_experts`` ranks in a row own one together, each a slice of it:
    see :func:`ffn_shard`.

    Raises:
        ValueError: the experts cannot be divided evenly over the ranks, nor the ranks over the experts.
    """
    if world_size > num_experts:
        if world_size % num_experts:
            raise ValueError(
                f"ep_group: expected at most num_experts = {num_experts} ranks, or a multiple of them that share the "
                f"experts, got W = {world_size} ranks"
            )
        expert = rank // (world_size // num_experts)
        return range(expert, expert + 1)
    if num_experts % world_size:
        raise ValueError(
            f"ep_group: expected num_experts to be a multiple of the ranks, got E = {num_experts} experts for "
            f"W = {world_size} ranks"
        )
    each = num_experts // world_size
    return range(rank * each, (rank + 1) * each)


def ffn_shard(num_experts: int, world_size: int, rank: int) -> tuple[int, int]:
    """Which slice of its experts a rank holds, and of how many: MegaBlocks' hidden sharding.

    Slice i of S is columns ``[i * F / S, (i + 1) * F / S)`` of an expert's F. The rank with slice i of expert e is
    ``e * S + i``.

    Returns:
        ``(i, S)``; (0, 1) where no expert is shared between ranks.

    Raises:
        ValueError: as :func:`local_experts`.
    """
    local_experts(num_experts, world_size, rank)
    shards = max(world_size // num_experts, 1)
    return rank % shards, shards
