"""Accelerate on models with dmoe layers: experts spread over ranks, in loops that stay as they are.

::

    import dmoe.integrations.accelerate as on_accelerate

    accelerator = Accelerator(gradient_accumulation_steps=2)
    model = on_accelerate.parallelize(accelerator, model, ep=4)  # before the optimizer is made
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

Names are found when they are asked for: importing this imports no Accelerate.
"""

from __future__ import annotations

from dmoe.integrations.on_demand import on_demand

_HOME = {"parallelize": "parallel", "teach": "accelerator"}

__all__ = sorted(_HOME)

__getattr__, __dir__ = on_demand(__name__, _HOME)
