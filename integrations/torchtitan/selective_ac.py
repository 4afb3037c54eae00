"""torchtitan's selective activation checkpointing, with what dmoe's experts computed among what is kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torchtitan.distributed.activation_checkpoint import SelectiveAC

# Either returns a token's weighted sum; the first also the pre-activation, which the second computes again.
_EXPERTS = ("moe_mlp", "moe_mlp_lean")


class DmoeSelectiveAC(SelectiveAC):
    """``SelectiveAC`` whose recomputation of a block leaves out dmoe's experts.

    What they save stays until backward: input, pre-activation (not with ``recompute_pre_activation``), output. Tokens
    that dmoe moves between ranks travel once more in the recomputation; what torchtitan's own exchange brought is kept.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(SelectiveAC.Config):
        """As torchtitan's."""

    def get_save_ops(self) -> set:
        """Operations whose results are kept: torchtitan's, and the experts'."""
        return super().get_save_ops() | {getattr(torch.ops.dmoe, name).default for name in _EXPERTS}
