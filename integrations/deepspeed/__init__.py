"""DeepSpeed's engine for models with dmoe's layers: ``initialize`` in the place of ``deepspeed.initialize``.

::

    from dmoe.integrations.deepspeed import expert_parallel_group, initialize

    ffn = dmoe.MoE(..., ep_group=expert_parallel_group(8), dtensor=False)
    engine, optimizer, _, _ = initialize(model=model, config=config)

Names are found when they are asked for: importing this imports no DeepSpeed.
"""

from __future__ import annotations

import importlib

from dmoe.integrations.on_demand import on_demand

_HOME = {
    "complete": "engine",
    "expert_parallel_group": "groups",
    "initialize": "engine",
    "param_groups": "parameters",
    "prepare": "layers",
    "to_universal": "universal",
}

__all__ = sorted(_HOME)


def _needs_deepspeed(name: str) -> None:
    try:
        importlib.import_module("deepspeed")
    except ModuleNotFoundError as error:
        if error.name != "deepspeed":
            raise
        raise ImportError(
            f"dmoe.integrations.deepspeed: {name}: expected DeepSpeed, which is not installed: "
            "pip install 'dmoe[deepspeed]'"
        ) from error


__getattr__, __dir__ = on_demand(__name__, _HOME, _needs_deepspeed)
