"""PyTorch's first FSDP beside expert parallelism, where it would be wrong without a word."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor


def check_fsdp1(layer: Any, holder: Any) -> None:
    """Refuse experts that FSDP1 has laid into one flat parameter with what other ranks have too.

    It would cut that parameter, and average its gradients, as if all ranks had the same experts.

    Args:
        layer: a :class:`dmoe.MoE` with ``ep_group``, in a forward. FSDP1 around its experts alone, over the ranks that
            hold the same ones, is right.
        holder: the module that has its experts' weights.

    Raises:
        ValueError: they are; or FSDP1's group has ranks with other experts.
    """
    # Views of the flat parameter: parameters with a mark, or with use_orig_params=False tensors that are none.
    marked = any(getattr(parameter, "_fsdp_flattened", False) for parameter in holder.parameters(recurse=False))
    if not marked and not any(isinstance(held, Tensor) for held in vars(holder).values()):
        return
    group = getattr(layer.experts, "process_group", None)  # of FullyShardedDataParallel
    if group is not None:
        both = set(layer.dispatcher.ranks) & set(dist.get_process_group_ranks(group))
        if both == {dist.get_rank()}:
            return
    raise ValueError(
        "MoE: ep_group: expected None in a model that FullyShardedDataParallel (FSDP1) wraps, which takes all ranks to "
        f"have the same experts, got a group of {layer.dispatcher.num_ranks} ranks: use FSDP2, as "
        "dmoe.parallel.parallelize does, or let every rank hold all experts"
    )
