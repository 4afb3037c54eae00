"""Accelerate on models with dmoe layers: experts spread over ranks, in loops that stay as they are.

::

    import dmoe.integrations.accelerate as on_accelerate

    accelerator = Accelerator(gradient_accumulation_steps=2)
    model = on_accelerate.parallelize(accelerator, model, ep=4)  # before the optimizer is made
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

Names are found when they are asked for: importing this imports no Accelerate.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {"parallelize": "parallel", "teach": "accelerator"}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
