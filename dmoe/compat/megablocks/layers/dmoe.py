"""``dMoE``: no token is ever dropped."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor, nn

from dmoe.compat.megablocks import ops
from dmoe.compat.megablocks.layers import common, dmlp_registry, moe, mpu
from dmoe.compat.megablocks.layers.arguments import Arguments
from dmoe.compat.megablocks.layers.overrides import steps
from dmoe.ops.stk_matrix import sparse_matrix
from dmoe.ops.topology import BlockTopology

__all__ = ["ParallelDroplessMLP", "common", "dMoE", "dmlp_registry", "moe", "mpu", "ops", "promote_scalar"]

_Transposed = tuple[Tensor, Tensor, Tensor]


def promote_scalar(x: Tensor) -> Tensor:
    """A scalar as a tensor of one dimension; any other tensor as it is."""
    return x.view(1) if x.dim() == 0 else x


@steps(
    "grouped_forward_once",
    "grouped_permute_and_compute",
    "indices_and_padded_bins",
    "sparse_forward_once",
    "sparse_permute_and_compute",
    "sparse_transpose",
    "topology",
)
class ParallelDroplessMLP(moe.ParallelMLP):
    """:class:`ParallelMLP` without a capacity: ``moe_capacity_factor`` has no meaning here.

    Attributes:
        mlp: the experts. Another module takes rows sorted by expert, ``mlp(x (R, H), tokens_per_expert (E,))``, or
            padded ones and a topology, ``mlp(x, topo)``, with ``mlp_impl="sparse"``; it returns their results.
        blocking: rows and columns of a block of the steps with padding.
    """

    def __init__(self, args: Arguments) -> None:
        super().__init__(args)
        self.hidden_size, self.ffn_hidden_size, self.blocking = args.hidden_size, mpu.features_per_rank(args), 128
        columns = max(self.ffn_hidden_size * self.num_experts // self.blocking, 1)
        self.transpose_sort_end_bit = max(math.ceil(math.log2(columns)), 1)

    def _init_mlp(self, args: Arguments) -> nn.Module:
        return dmlp_registry.get(args)

    def _capacity(self, tokens: int | Fraction) -> None:
        return None

    def _capacity_of_ranks(self, tokens: Tensor) -> None:
        return None

    def sparse_transpose(
        self, size: tuple[int, int], row_indices: Tensor, column_indices: Tensor, offsets: Tensor
    ) -> _Transposed:
        """The same blocks column by column.

        Args:
            size: of the matrix, in elements.
            row_indices, column_indices: of each block, ``(nnz,)``.
            offsets: first block of each block row; not needed here.

        Returns:
            block row of each block ``(nnz,)``, first block of each block column ``(columns + 1,)``, where each lies in
            the order of rows ``(nnz,)``; the last two int32.
        """
        _, order = ops.sort(column_indices.int(), self.transpose_sort_end_bit)
        ends = ops.inclusive_cumsum(ops.histogram(column_indices, size[1] // self.blocking), 0)
        return row_indices.gather(0, order.long()), torch.cat([ends.new_zeros(1), ends]), order.int()

    def topology(self, x: Tensor, padded_bins: Tensor) -> object:
        """The hidden activation of padded rows as an ``stk.Matrix`` without values, on ``meta``.

        Args:
            x: ``(R, H)``, the padded rows.
            padded_bins: ``(E,)``, where each expert's end.

        Raises:
            ImportError: stanford-stk is not installed.
            ValueError: rows or ``ffn_hidden_size`` in no whole blocks.
        """
        for name, length in (("rows of x", x.shape[0]), ("ffn_hidden_size", self.ffn_hidden_size)):
            if length % self.blocking:
                raise ValueError(
                    f"topology: {name}: expected a multiple of the block size {self.blocking}, got {length}; "
                    "mlp_impl='grouped' takes any"
                )
        rows, columns = x.shape[0] // self.blocking, self.ffn_hidden_size // self.blocking
        offsets = torch.arange(0, rows * columns + 1, columns, dtype=torch.int32, device=x.device)
        column_indices = ops.topology(padded_bins, self.blocking, rows, columns)
        row_indices = torch.arange(rows, dtype=column_indices.dtype, device=x.device).repeat_interleave(columns)
        size = (x.shape[0], self.ffn_hidden_size * padded_bins.numel())
        values = torch.empty(rows * columns, self.blocking, self.blocking, dtype=common.dtype(self.args), device="meta")
        transposed = self.sparse_transpose(size, row_indices, column_indices, offsets)
        return sparse_matrix(size, values, BlockTopology(row_indices, column_indices, offsets, *transposed))

    def indices_and_padded_bins(self, top_experts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """:meth:`indices_and_bins` with ``padded_bins (E,)`` before the counts: where rows end in whole blocks."""
        top_experts = top_experts.int()
        bin_ids, indices = ops.sort(top_experts, self.sort_end_bit)
        tokens_per_expert = ops.histogram(top_experts, self.num_experts)
        bins = ops.inclusive_cumsum(tokens_per_expert, 0)
        return indices, bin_ids, bins, self._padded_bins(tokens_per_expert), tokens_per_expert

    def _padded_bins(self, tokens_per_expert: Tensor) -> Tensor:
        return ops.inclusive_cumsum(ops.round_up(tokens_per_expert, self.blocking), 0)

    def _sparse_compute(
        self,
        x: Tensor,
        indices: Tensor,
        bin_ids: Tensor,
        expert_weights: Tensor | None,
        bins: Tensor,
        padded_bins: Tensor,
        top_k: int,
    ) -> Tensor:
        rows = ops.padded_gather(x.reshape(-1, x.shape[-1]), indices, bin_ids, bins, padded_bins, top_k)
        with torch.no_grad():
            topo = self.topology(rows, padded_bins)
        rows = self.mlp(rows, topo)
        return ops.padded_scatter(rows, indices, bin_ids, expert_weights, bins, padded_bins, top_k)

    def sparse_forward_once(self, x: Tensor, expert_weights: Tensor, top_experts: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`forward_once` by steps, in blocks."""
        with torch.no_grad():
            indices, bin_ids, bins, padded_bins, counts = self.indices_and_padded_bins(top_experts.flatten())
        weights = expert_weights.flatten()
        return self._sparse_compute(x, indices, bin_ids, weights, bins, padded_bins, self.top_k), counts

    def sparse_permute_and_compute(
        self,
        x: Tensor,
        tokens_per_expert: Tensor,
        indices: Tensor,
        bin_ids: Tensor,
        expert_weights: Tensor | None,
        bins: Tensor,
        expert_capactiy: int,  # so spelled there; dropless experts have none
        top_k: int,
    ) -> Tensor:
        """Tokens ``(..., H)`` into padded rows, through :attr:`mlp` with their topology, and back to ``(T, H)``."""
        padded_bins = self._padded_bins(tokens_per_expert)
        return self._sparse_compute(x, indices, bin_ids, expert_weights, bins, padded_bins, top_k)

    def grouped_forward_once(self, x: Tensor, expert_weights: Tensor, top_experts: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`forward_once` by steps, in rows without padding."""
        with torch.no_grad():
            indices, bin_ids, bins, counts = self.indices_and_bins(top_experts.flatten())
        weights = expert_weights.flatten()
        return self.grouped_permute_and_compute(x, counts, indices, bin_ids, weights, bins, -1, self.top_k), counts

    def grouped_permute_and_compute(
        self,
        x: Tensor,
        tokens_per_expert: Tensor,
        indices: Tensor,
        bin_ids: Tensor,
        expert_weights: Tensor | None,
        bins: Tensor,
        expert_capactiy: int,
        top_k: int,
    ) -> Tensor:
        """Tokens ``(..., H)`` into sorted rows, through :attr:`mlp` with the counts, and back to ``(T, H)``."""
        rows = ops.gather(x.reshape(-1, x.shape[-1]), indices, bin_ids, bins, top_k)
        return ops.scatter(self.mlp(rows, tokens_per_expert), indices, bin_ids, expert_weights, bins, top_k)

    def forward_once(self, x: Tensor, expert_weights: Tensor, top_experts: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens through their experts; see :meth:`ParallelMLP.forward_once`."""
        if self._is_plain():
            return self._fused_once(x, expert_weights, top_experts)
        by_steps = self.sparse_forward_once if self.args.mlp_impl == "sparse" else self.grouped_forward_once
        return by_steps(x, expert_weights, top_experts)

    def permute_and_compute(
        self,
        x: Tensor,
        tokens_per_expert: Tensor,
        indices: Tensor,
        bin_ids: Tensor,
        expert_weights: Tensor | None,
        bins: Tensor,
        expert_capactiy: int,
        top_k: int,
    ) -> Tensor:
        """:meth:`sparse_permute_and_compute` or :meth:`grouped_permute_and_compute`.

        Expert parallelism calls it, with the rows that came from all ranks, each of which has one expert here.
        """
        sparse = self.args.mlp_impl == "sparse"
        compute = self.sparse_permute_and_compute if sparse else self.grouped_permute_and_compute
        return compute(x, tokens_per_expert, indices, bin_ids, expert_weights, bins, expert_capactiy, top_k)


class dMoE(moe.MoE):  # noqa: N801  # MegaBlocks' name
    """A dropless Mixture-of-Experts layer.

    Args:
        args: all options.
    """

    def _init_experts_mlp(self, args: Arguments) -> nn.Module:
        return ParallelDroplessMLP(args)
