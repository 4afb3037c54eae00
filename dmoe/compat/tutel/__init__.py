"""Tutel's ``moe_layer`` on dmoe's operations: ``from dmoe.compat import tutel as tutel_moe``.

``docs/deepspeed_tutel.md`` says of every argument what it becomes.
"""

from __future__ import annotations

from dmoe.compat.tutel.layer import MOELayer

moe_layer = MOELayer

__all__ = ["MOELayer", "moe_layer"]
