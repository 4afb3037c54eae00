"""Lightning's Trainer on models with dmoe layers: experts spread over ranks, and what the router does in the logs.

::

    from dmoe.integrations.lightning import MoECallback, MoEDDPStrategy

    trainer = Trainer(devices=8, strategy=MoEDDPStrategy(ep=4), callbacks=[MoECallback()], gradient_clip_val=1.0)

Names are found when they are asked for: importing this imports no Lightning.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "MoECallback": "callback",
    "MoEDDPStrategy": "ddp",
    "MoEModelParallelStrategy": "model_parallel",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
