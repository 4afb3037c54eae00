"""What MegaBlocks asks about model parallelism; dmoe has none yet, so every rank holds every expert."""

from __future__ import annotations

from torch import Tensor

from dmoe.compat.megablocks.layers.arguments import Arguments


def is_moe_param(tensor: Tensor) -> bool:
    """Whether a parameter is an expert's."""
    return hasattr(tensor, "expert_model_parallel")


def param_is_expert_model_parallel(param: Tensor) -> bool:
    """Whether a parameter differs between expert-parallel ranks."""
    return bool(getattr(param, "expert_model_parallel", False))


def get_expert_parallel_world_size(args: Arguments) -> int:
    """1."""
    return 1


def get_expert_parallel_rank(args: Arguments) -> int:
    """0."""
    return 0


def experts_per_rank(args: Arguments) -> int:
    """All of them."""
    return args.moe_num_experts


def features_per_rank(args: Arguments) -> int:
    """All of an expert's."""
    return args.ffn_hidden_size
