"""The ranks of an expert-parallel group as a ``DeviceMesh``, so that expert parameters can be ``DTensor``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


def expert_mesh(
    ep_group: Any, group: ProcessGroup, num_shards: int, device: torch.device | str | None, tp_group: Any = None
) -> DeviceMesh:
    """A mesh of ``(ranks,)``, or ``(ranks / hidden shards, num_shards)``: see :class:`dmoe.expert_slice.ExpertSlice`.

    Args:
        ep_group: what the user gave: a mesh is used as it is, so that FSDP2 finds what else it is part of.
        group: its process group.
        num_shards: parts that each expert's F is cut into, tensor parallelism and hidden sharding together.
        device: where the parameters are to live; None is PyTorch's default device.
        tp_group: the ranks that share this rank's experts by tensor parallelism, if any.

    A mesh of two dimensions talks to nobody: it says where a part belongs, and the layer's own groups do the work.
    Its grid takes ranks to be regular: ``(i, j)`` is ``group[i] + tp_group[j] - this rank``.
    """
    from torch.distributed.device_mesh import DeviceMesh

    kind = torch.empty(0, device=device).device.type
    if kind == "meta":
        kind = "cuda" if "nccl" in dist.get_backend(group) else "cpu"
    if num_shards == 1:
        return ep_group if isinstance(ep_group, DeviceMesh) else DeviceMesh.from_group(group, kind)
    ranks = torch.tensor(dist.get_process_group_ranks(group), device="cpu")
    if tp_group is not None:
        across = torch.tensor(dist.get_process_group_ranks(tp_group), device="cpu")
        ranks = ranks.unsqueeze(1) + across - dist.get_rank()
    grid = ranks.reshape(-1, num_shards)
    return DeviceMesh(kind, grid, mesh_dim_names=("experts", "expert_shards"), _init_backend=False)
