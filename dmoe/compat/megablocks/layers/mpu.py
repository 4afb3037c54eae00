"""Which part of the experts a rank has: MegaBlocks' questions about model parallelism, and its answers.

W expert-parallel ranks hold E / W experts each, in order. With more ranks than experts (``W = E * S``) an expert's F is
cut into S parts, and rank ``s * E + e`` has part s of expert e: the other way round than ``dmoe.MoE``'s.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from dmoe.parallel import as_group

if TYPE_CHECKING:
    from dmoe.compat.megablocks.layers.arguments import Arguments

__all__ = [
    "MoeParam",
    "copy_expert_model_parallel_attributes",
    "expert_sharding_degree",
    "experts_per_rank",
    "features_per_rank",
    "get_expert_parallel_rank",
    "get_expert_parallel_world_size",
    "get_weight_parallel_rank",
    "get_weight_parallel_world_size",
    "hidden_sharding_degree",
    "is_moe_param",
    "param_is_expert_model_parallel",
    "set_expert_model_parallel_attributes",
    "synchronized_print",
]


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


def group_of(args: Arguments, name: str) -> Any:
    """The process group of ``expert_parallel_group`` or ``weight_parallel_group``; all ranks where that is None."""
    group = getattr(args, name)
    return dist.group.WORLD if group is None else as_group(group, f"Arguments: {name}")


def _size_and_rank(args: Arguments, switch: str, name: str) -> tuple[int, int]:
    if not getattr(args, switch) or not (dist.is_available() and dist.is_initialized()):
        return 1, 0
    group = group_of(args, name)
    return dist.get_world_size(group), dist.get_rank(group)


def get_expert_parallel_world_size(args: Arguments) -> int:
    """W, the ranks of ``expert_parallel_group``; 1 without ``moe_expert_model_parallelism`` or a process group.

    Raises:
        TypeError: ``expert_parallel_group`` is none that this rank belongs to.
    """
    return _size_and_rank(args, "moe_expert_model_parallelism", "expert_parallel_group")[0]


def get_expert_parallel_rank(args: Arguments) -> int:
    """This rank's place in ``expert_parallel_group``; 0 where :func:`get_expert_parallel_world_size` is 1."""
    return _size_and_rank(args, "moe_expert_model_parallelism", "expert_parallel_group")[1]


def get_weight_parallel_world_size(args: Arguments) -> int:
    """The ranks of ``weight_parallel_group``; 1 without ``moe_weight_parallelism`` or a process group.

    Raises:
        TypeError: ``weight_parallel_group`` is none that this rank belongs to.
    """
    return _size_and_rank(args, "moe_weight_parallelism", "weight_parallel_group")[0]


def get_weight_parallel_rank(args: Arguments) -> int:
    """This rank's place in ``weight_parallel_group``; 0 where :func:`get_weight_parallel_world_size` is 1."""
    return _size_and_rank(args, "moe_weight_parallelism", "weight_parallel_group")[1]


def expert_sharding_degree(args: Arguments) -> int:
    """Over how many ranks experts are spread: ``min(W, E)``.

    Raises:
        ValueError: that does not divide E.
    """
    ranks, experts = get_expert_parallel_world_size(args), args.moe_num_experts
    degree = min(ranks, experts)
    if experts % degree:
        raise ValueError(
            f"Arguments: moe_num_experts: expected a multiple of the {ranks} ranks of expert_parallel_group, got "
            f"{experts}"
        )
    return degree


def hidden_sharding_degree(args: Arguments) -> int:
    """Over how many ranks each expert is cut: S = W / E where there are more ranks than experts, else 1.

    Raises:
        ValueError: ranks that are no multiple of the experts, or an F that S does not divide.
    """
    ranks = get_expert_parallel_world_size(args)
    degree, rest = divmod(ranks, expert_sharding_degree(args))
    if rest:
        raise ValueError(
            f"Arguments: moe_num_experts: expected a divisor of the {ranks} ranks of expert_parallel_group, or at "
            f"least as many, got {args.moe_num_experts}"
        )
    if args.ffn_hidden_size % degree:
        raise ValueError(
            f"Arguments: ffn_hidden_size: expected a multiple of {degree}, the ranks that share an expert, got "
            f"{args.ffn_hidden_size}"
        )
    return degree


def experts_per_rank(args: Arguments) -> int:
    """E / :func:`expert_sharding_degree`."""
    return args.moe_num_experts // expert_sharding_degree(args)


def features_per_rank(args: Arguments) -> int:
    """F / :func:`hidden_sharding_degree`."""
    return args.ffn_hidden_size // hidden_sharding_degree(args)


def rows_per_rank(args: Arguments) -> int:
    """Rows that a rank holds of experts stacked as ``(E * F, H)``, under either parallelism.

    Raises:
        ValueError: the ranks of ``weight_parallel_group`` do not divide them.
    """
    rows, ranks = experts_per_rank(args) * features_per_rank(args), get_weight_parallel_world_size(args)
    if rows % ranks:
        raise ValueError(
            "Arguments: ffn_hidden_size: expected moe_num_experts * ffn_hidden_size to be a multiple of the "
            f"{ranks} ranks of weight_parallel_group, got {args.moe_num_experts} * {args.ffn_hidden_size}"
        )
    return rows // ranks
