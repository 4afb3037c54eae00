"""MegaBlocks' names on dmoe: ``sed s/megablocks/dmoe.compat.megablocks/`` over the imports, and the model goes on.

Layers, operations and the load-balancing functions take what they take there and return what they return there; a
``state_dict`` has MegaBlocks' names and shapes. What differs is listed in :mod:`dmoe.compat.megablocks.layers.moe`, and
an option that dmoe lacks is refused by :class:`~dmoe.compat.megablocks.layers.arguments.Arguments`.
"""

from dmoe.compat.megablocks import grouped_gemm_util, ops
from dmoe.compat.megablocks.layers.arguments import Arguments
from dmoe.compat.megablocks.layers.dmoe import ParallelDroplessMLP, dMoE
from dmoe.compat.megablocks.layers.glu import SparseGLU
from dmoe.compat.megablocks.layers.mlp import MLP, SparseMLP
from dmoe.compat.megablocks.layers.moe import (
    MoE,
    ParallelMLP,
    batched_load_balancing_loss,
    clear_load_balancing_loss,
    get_load_balancing_loss,
    save_load_balancing_loss,
)

__all__ = [
    "MLP",
    "Arguments",
    "MoE",
    "ParallelDroplessMLP",
    "ParallelMLP",
    "SparseGLU",
    "SparseMLP",
    "batched_load_balancing_loss",
    "clear_load_balancing_loss",
    "dMoE",
    "get_load_balancing_loss",
    "grouped_gemm_util",
    "ops",
    "save_load_balancing_loss",
]
