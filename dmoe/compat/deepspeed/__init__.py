"""DeepSpeed's ``MoE`` layer on dmoe's operations: ``from dmoe.compat.deepspeed import MoE``.

``docs/deepspeed_tutel.md`` says of every argument what it becomes.
"""

from __future__ import annotations

from dmoe.compat.deepspeed.groups import expert_parallel_group
from dmoe.compat.deepspeed.layer import MoE, MOELayer

__all__ = ["MOELayer", "MoE", "expert_parallel_group"]
