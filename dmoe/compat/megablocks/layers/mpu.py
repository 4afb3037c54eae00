"""What MegaBlocks asks about model parallelism: one rank holds every expert, and :class:`Arguments` refuses more."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dmoe.compat.megablocks.layers.arguments import Arguments


class MoeParam(torch.Tensor):
    """A parameter that has the mark, for type annotations."""

    expert_model_parallel: bool


def is_moe_param(tensor: Tensor) -> bool:
    """Whether a parameter is an expert's."""
    return hasattr(tensor, "expert_model_parallel")


def set_expert_model_parallel_attributes(tensor: Tensor, is_parallel: bool) -> None:
    """Mark a parameter as an expert's, and say whether expert-parallel ranks differ in it.

    Raises:
        ValueError: it is marked already.
    """
    if is_moe_param(tensor):
        raise ValueError(
            "set_expert_model_parallel_attributes: expected a tensor without expert_model_parallel, got one with "
            f"{tensor.expert_model_parallel}"  # type: ignore[attr-defined]
        )
    tensor.expert_model_parallel = is_parallel  # type: ignore[attr-defined]


def copy_expert_model_parallel_attributes(destination_tensor: Tensor, source_tensor: Tensor) -> None:
    """Mark one tensor as another one is; do nothing where that is not marked."""
    if is_moe_param(source_tensor):
        destination_tensor.expert_model_parallel = source_tensor.expert_model_parallel  # type: ignore[attr-defined]


def param_is_expert_model_parallel(param: Tensor) -> bool:
    """Whether a parameter differs between expert-parallel ranks."""
    return bool(getattr(param, "expert_model_parallel", False))


def synchronized_print(group: Any, *x: object) -> None:
    """Print on one rank of a group after the other."""
    for rank in range(dist.get_world_size(group)):
        dist.barrier(group)
        if rank == dist.get_rank(group):
            print(f"rank = {rank}", *x)


def get_expert_parallel_world_size(args: Arguments) -> int:
    """1."""
    return 1


def get_expert_parallel_rank(args: Arguments) -> int:
    """0."""
    return 0


def get_weight_parallel_world_size(args: Arguments) -> int:
    """1."""
    return 1


def get_weight_parallel_rank(args: Arguments) -> int:
    """0."""
    return 0


def expert_sharding_degree(args: Arguments) -> int:
    """Over how many ranks experts are spread: 1."""
    return 1


def hidden_sharding_degree(args: Arguments) -> int:
    """Over how many ranks each expert is cut: 1."""
    return 1


def experts_per_rank(args: Arguments) -> int:
    """All of them."""
    return args.moe_num_experts


def features_per_rank(args: Arguments) -> int:
    """All of an expert's."""
    return args.ffn_hidden_size
