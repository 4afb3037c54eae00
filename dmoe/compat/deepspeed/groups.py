"""The ranks that share the experts of a layer, laid out as DeepSpeed lays them out; made once for all layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from dmoe.compat._groups import made_once

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def expert_parallel_group(ep_size: int, use_data_before_expert_parallel_: bool = False) -> ProcessGroup:
    """The ``ep_size`` ranks that this rank shares its experts with; every rank has to ask, for the same.

    Of consecutive ones, ``expert_parallel_group(W // ep_size, True)`` are the ranks with the same experts.

    Args:
        ep_size: a divisor of the number of ranks, W.
        use_data_before_expert_parallel_: ranks W / ep_size apart, instead of consecutive ones.

    Raises:
        RuntimeError: ``torch.distributed`` is not initialised.
        ValueError: ranks that cannot be divided so.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            f"set_deepspeed_parallelism: expected torch.distributed to be initialised with ep_size = {ep_size}, whose "
            "groups are made here; call init_process_group (or deepspeed.init_distributed) before"
        )
    world: Any = dist.group.WORLD
    size = dist.get_world_size()
    if size % ep_size:
        raise ValueError(f"MoE: ep_size: expected a divisor of the number of ranks, {size}, got {ep_size}")
    if size == ep_size:
        return world
    apart = size // ep_size
    layout = [range(first, first + ep_size) for first in range(0, size, ep_size)]
    if use_data_before_expert_parallel_:
        layout = [range(first, size, apart) for first in range(apart)]

    def mine() -> ProcessGroup:
        groups = {ranks: dist.new_group(list(ranks)) for ranks in layout}  # every rank makes all of them
        return next(group for ranks, group in groups.items() if dist.get_rank() in ranks)

    group: ProcessGroup = made_once(("expert_parallel", ep_size, use_data_before_expert_parallel_), mine)
    return group
