"""Hugging Face Transformers on dmoe: every MoE model by one word, and whole blocks with expert parallelism.

::

    import dmoe.integrations.transformers as on_transformers

    on_transformers.register()
    model = AutoModelForCausalLM.from_pretrained(..., experts_implementation="dmoe")

or, for a model that is there already, ``on_transformers.use(model)``, which also knows models that the switch of
Transformers does not reach. Names are found when they are asked for: importing this imports no transformers.
"""

from __future__ import annotations

from dmoe.integrations.on_demand import on_demand

_HOME = {
    "MoECallback": "callback",
    "ParallelTrainer": "parallel_trainer",
    "from_dmoe": "blocks",
    "load_optimizer": "parallel_optimizer",
    "load_packed": "packed",
    "parallelize": "parallel",
    "register": "switch",
    "restore": "switch",
    "save_pretrained": "parallel_save",
    "to_dmoe": "blocks",
    "upcycle": "upcycle_files",
    "use": "switch",
}

__all__ = sorted(_HOME)

__getattr__, __dir__ = on_demand(__name__, _HOME)
