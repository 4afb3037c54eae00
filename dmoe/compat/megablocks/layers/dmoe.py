"""``dMoE``: no token is ever dropped."""

from __future__ import annotations

from dmoe.compat.megablocks.layers.arguments import Arguments
from dmoe.compat.megablocks.layers.glu import GroupedGLU, SparseGLU
from dmoe.compat.megablocks.layers.mlp import ExpertParameters, GroupedMLP, SparseMLP
from dmoe.compat.megablocks.layers.moe import MoE, ParallelMLP

_EXPERTS: dict[tuple[str, str], type[ExpertParameters]] = {
    ("mlp", "grouped"): GroupedMLP,
    ("mlp", "sparse"): SparseMLP,
    ("glu", "grouped"): GroupedGLU,
    ("glu", "sparse"): SparseGLU,
}


class ParallelDroplessMLP(ParallelMLP):
    """:class:`ParallelMLP` without a capacity: ``moe_capacity_factor`` has no meaning here."""

    def _init_mlp(self, args: Arguments) -> ExpertParameters:
        return _EXPERTS[args.mlp_type, args.mlp_impl](args)

    def _capacity(self, tokens: int) -> None:
        return None


class dMoE(MoE):  # noqa: N801  # MegaBlocks' name
    """A dropless Mixture-of-Experts layer.

    Args:
        args: all options.
    """

    def _init_experts_mlp(self, args: Arguments) -> ParallelMLP:
        return ParallelDroplessMLP(args)
