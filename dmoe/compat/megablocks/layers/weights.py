"""Experts' weights: filled by the user's functions, parts of ranks and of a ``DTensor``, scaled gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dmoe.compat.megablocks.layers import common, mpu
from dmoe.compat.megablocks.layers.arguments import Arguments, InitFn
from dmoe.parallel.collectives import outside_graphs
from dmoe.parallel.tensor_parallel import TensorParallel


def create_moe_expert_weights(
    args: Arguments, num_experts: int, ffn_hidden_size: int, hidden_size: int, init_method: InitFn
) -> Tensor:
    """Weights on the arguments' device, of their dtype: this rank's part of ``(E, F, H)`` that ``init_method`` filled.

    All ranks draw all experts, so that values depend on the seed and not on the number of ranks.
    """
    weights = torch.empty(num_experts, ffn_hidden_size, hidden_size, device=args.device, dtype=common.dtype(args))
    init_method(weights)
    return part_of_experts(args, weights)


def part_of_experts(args: Arguments, weights: Tensor) -> Tensor:
    """What an expert-parallel rank has of all experts' ``(E, F, H)``: a view ``(E / min(W, E), F / S, H)``."""
    if mpu.get_expert_parallel_world_size(args) == 1:
        return weights
    blocks, shards = mpu.expert_sharding_degree(args), mpu.hidden_sharding_degree(args)
    shard, block = divmod(mpu.get_expert_parallel_rank(args), blocks)
    return weights.chunk(blocks)[block].chunk(shards, 1)[shard]


def part_of_rows(args: Arguments, rows: Tensor) -> Tensor:
    """What a weight-parallel rank has of the stacked rows ``(E * F, H)``: a view of as many as every other rank has."""
    return rows.chunk(mpu.get_weight_parallel_world_size(args))[mpu.get_weight_parallel_rank(args)]


@outside_graphs
def all_rows(args: Arguments, rows: Tensor) -> Tensor:
    """The rows of all weight-parallel ranks; backward gives each rank the sum of its rows' gradients."""
    tensor = TensorParallel(mpu.group_of(args, "weight_parallel_group"))
    exchange, under_way = tensor.start_gather(rows, (rows.shape[0],) * tensor.size, "rows of expert weights")
    return exchange.finish(under_way)


def create_dmoe_expert_weights(
    args: Arguments, num_experts: int, rows: int, columns: int, init_method: InitFn
) -> Tensor:
    """The same with its experts stacked, ``(experts * rows, columns)``; of these, a weight-parallel rank's part."""
    stacked = create_moe_expert_weights(args, num_experts, rows, columns, init_method).reshape(-1, columns)
    return part_of_rows(args, stacked)


class ScaleGradient(torch.autograd.Function):
    """``x`` as it is, its gradient times ``scale``; called as ``scale_gradient(x, scale)``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        """A view of x."""
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """``grad * scale``."""
        return grad * ctx.scale, None


scale_gradient = ScaleGradient.apply


def resolve_dtensor(weight: Tensor) -> Tensor:
    """This rank's part of a ``DTensor``; any other tensor as it is."""
    return weight.to_local() if isinstance(weight, DTensor) else weight
