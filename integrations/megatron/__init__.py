"""dmoe in a Megatron-Core training loop: the layer, the specs that put it there, and what translates for them.

Names are found when they are asked for; importing this needs megatron-core, and one that is supported.
"""

from __future__ import annotations

import importlib
from typing import Any

from dmoe.integrations.megatron.versions import check_version

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


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name.endswith("_spec"):
        # For --spec Megatron asks for one here, and 0.16 fails on some options before any layer is built.
        loop = importlib.import_module(f"{__name__}.training_loop")
        loop.refuse_uncarried_args(loop.running_args())
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value  # Megatron's --spec looks into vars(module)
    return value


def __dir__() -> list[str]:
    return __all__
