"""Watching a model train: see :func:`dmoe.monitor`."""

from __future__ import annotations

from typing import Any

from torch import nn

from dmoe.monitoring.monitor import Monitor
from dmoe.monitoring.records import LayerRecord, StepRecord
from dmoe.monitoring.similarity import expert_similarity

__all__ = ["LayerRecord", "Monitor", "StepRecord", "expert_similarity", "monitor"]


def monitor(
    model: nn.Module, to: Any = None, *, every: int = 1, group: Any = None, similarity_every: int = 100
) -> Monitor:
    """Record what the MoE layers of a model do in each step of any training loop."""
    return Monitor(model, to, every=every, group=group, similarity_every=similarity_every)
