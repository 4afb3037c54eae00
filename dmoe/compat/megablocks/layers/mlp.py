"""The experts: what MegaBlocks calls with its parameters, which :mod:`.parameters` reads where they lie."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dmoe.compat._not_offered import attributes_of
from dmoe.compat.megablocks.layers.overrides import steps
from dmoe.compat.megablocks.layers.parameters import ExpertParameters
from dmoe.compat.megablocks.layers.shared_expert import SharedMLP
from dmoe.compat.megablocks.layers.weights import (
    ScaleGradient,
    create_dmoe_expert_weights,
    create_moe_expert_weights,
    resolve_dtensor,
    scale_gradient,
)
from dmoe.ops.cumsum import inclusive_cumsum
from dmoe.ops.grouped_gemm import grouped_gemm
from dmoe.ops.histogram import histogram

__all__ = [
    "MLP",
    "GroupedMLP",
    "ScaleGradient",
    "SharedMLP",
    "SparseMLP",
    "create_dmoe_expert_weights",
    "create_moe_expert_weights",
    "resolve_dtensor",
    "scale_gradient",
]

__getattr__ = attributes_of(__name__)


@steps("forward")
class MLP(ExpertParameters):
    """Plain experts of :class:`~dmoe.compat.megablocks.MoE`: w1 is ``(E, H, F)``, w2 ``(E, F, H)``."""

    def _stored(self, name: str, weight: Tensor) -> Tensor:
        return weight.transpose(1, 2) if name == "w1" else weight

    def _by_expert(self, name: str, weight: Tensor) -> Tensor:
        return self._stored(name, weight)

    def forward(self, x: Tensor) -> Tensor:
        """Bins ``(E, C, H)`` through their experts."""
        weights, activation = self.weights(), self.args.activation_fn
        assert activation is not None  # Arguments.check
        pre = grouped_gemm(x, weights["w1"])
        return grouped_gemm(activation(pre).to(pre.dtype), weights["w2"], trans_b=False)


@steps("forward")
class SparseMLP(ExpertParameters):
    """Plain experts of :class:`~dmoe.compat.megablocks.dMoE`: w1 and w2 are ``(E * F, H)``."""

    def forward(self, x: Tensor, topo: Any) -> Tensor:
        """Rows in the layout of ``padded_gather`` through their experts.

        Args:
            x: ``(R, H)``, R a multiple of the block size.
            topo: a block-sparse matrix whose ``offsets`` and ``column_indices`` are those of MegaBlocks' topology: in
                each row block, all columns of one expert, and experts in order.

        Returns:
            ``(R, H)``.

        Raises:
            ValueError: sizes that do not fit the topology; one of another structure, on the CPU.
        """
        blocks = topo.offsets.shape[0] - 1
        block_size = x.shape[0] // max(blocks, 1)
        if blocks * block_size != x.shape[0] or (block_size and self.ffn_hidden_size % block_size):
            raise ValueError(
                f"{type(self).__name__}: expected rows and ffn_hidden_size {self.ffn_hidden_size} in whole "
                f"blocks, got {x.shape[0]} rows in {blocks} row blocks"
            )
        columns = self.ffn_hidden_size // max(block_size, 1)
        found = topo.column_indices.int()
        first = found[topo.offsets[:-1].long()]
        expert = torch.div(first, columns, rounding_mode="floor")
        if x.device.type == "cpu":
            regular = (expert * columns).unsqueeze(1) + torch.arange(columns, dtype=torch.int32)
            if not torch.equal(regular.flatten(), found) or (expert[1:] < expert[:-1]).any():
                raise ValueError(
                    f"{type(self).__name__}: topo: expected all {columns} block columns of one expert in each row "
                    "block, and experts in order, as ParallelDroplessMLP.topology makes it; for another structure "
                    "use dmoe.ops.sdd and dsd"
                )
        return self.grouped(x, _offsets(histogram(expert, self.num_experts) * block_size))


@steps("forward")
class GroupedMLP(SparseMLP):
    """:class:`SparseMLP` on rows without padding."""

    def forward(self, x: Tensor, tokens_per_expert: Tensor) -> Tensor:
        """Rows ``(R, H)``, sorted by expert, through their experts.

        Args:
            x: ``(R, H)``.
            tokens_per_expert: ``(E,)`` int32 or int64, on any device.
        """
        return self.grouped(x, _offsets(tokens_per_expert.to(device=x.device, dtype=torch.int32)))


def _offsets(tokens_per_expert: Tensor) -> Tensor:
    return torch.cat([tokens_per_expert.new_zeros(1), inclusive_cumsum(tokens_per_expert, 0)])
