"""Lightning's Trainer on models with dmoe layers: experts spread over ranks, and what the router does in the logs.

::

    from dmoe.integrations.lightning import MoECallback, MoEDDPStrategy

    trainer = Trainer(devices=8, strategy=MoEDDPStrategy(ep=4), callbacks=[MoECallback()], gradient_clip_val=1.0)

Names are found when they are asked for: importing this imports no Lightning.
"""

from __future__ import annotations

from dmoe.integrations.on_demand import on_demand

_HOME = {
    "MoECallback": "callback",
    "MoEDDPStrategy": "ddp",
    "MoEModelParallelStrategy": "model_parallel",
}

__all__ = sorted(_HOME)

__getattr__, __dir__ = on_demand(__name__, _HOME)
