"""The layers: ``dMoE``, dropless, and ``MoE``, with a capacity."""

from dmoe.compat.megablocks.layers.dmoe import dMoE
from dmoe.compat.megablocks.layers.moe import MoE

__all__ = ["MoE", "dMoE"]
