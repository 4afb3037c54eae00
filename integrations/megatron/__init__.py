"""dmoe in a Megatron-Core training loop: the layer, the specs that put it there, and what translates for them.

Names are found when they are asked for; importing this needs megatron-core, and one that is supported.
"""

from __future__ import annotations

import importlib

from dmoe.integrations.megatron.versions import check_version
from dmoe.integrations.on_demand import on_demand

check_version()

_HOME = {
    "DmoeExperts": "experts",
    "DmoeLayer": "layer",
    "DmoeTransformerLayer": "specs",
    "add_moe_args": "arguments",
    "convert_ranks": "convert",
    "convert_state": "convert",
    "current_options": "options",
    "dmoe_block_spec": "specs",
    "dmoe_experts_spec": "specs",
    "dmoe_gpt_spec": "specs",
    "dmoe_layer_spec": "specs",
    "moe_config": "translate",
    "options_from_args": "options",
    "with_dmoe": "specs",
    "with_dmoe_experts": "specs",
}

__all__ = sorted(_HOME)


def _refuse_uncarried(name: str) -> None:
    """For --spec Megatron asks for one here, and 0.16 fails on some options before any layer is built."""
    if name.endswith("_spec"):
        loop = importlib.import_module(f"{__name__}.training_loop")
        loop.refuse_uncarried_args(loop.running_args())


__getattr__, __dir__ = on_demand(__name__, _HOME, _refuse_uncarried)
