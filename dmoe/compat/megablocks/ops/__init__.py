"""MegaBlocks' operations on dmoe's: its argument orders, shapes and dtypes, on the CPU as on CUDA.

They take zero tokens, any hidden size and any strides, and never wrap an index. Like there, each wants a plan in the
form ``indices, bin_ids = sort(experts)`` and ``bins = inclusive_cumsum(histogram(experts, E), 0)``.
"""

from dmoe.compat.megablocks.ops.movement import (
    binned_gather,
    binned_scatter,
    gather,
    padded_gather,
    padded_scatter,
    scatter,
)
from dmoe.compat.megablocks.ops.planning import (
    exclusive_cumsum,
    histogram,
    inclusive_cumsum,
    repeat,
    replicate,
    round_up,
    sort,
    sum,
    topology,
)

__all__ = [
    "binned_gather",
    "binned_scatter",
    "exclusive_cumsum",
    "gather",
    "histogram",
    "inclusive_cumsum",
    "padded_gather",
    "padded_scatter",
    "repeat",
    "replicate",
    "round_up",
    "scatter",
    "sort",
    "sum",
    "topology",
]
