"""What a monitored step was: plain Python values, the same on every rank but for the clocks of a step's own parts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

LAYER_PARTS = ("router", "dispatch", "experts", "combine")


@dataclass(frozen=True)
class LayerRecord:
    """One layer's forwards within a step, over all ranks.

    Attributes:
        tokens_per_expert: assignments of each expert before any drop, E integers.
        kept_per_expert: rows that each expert computed, E integers.
        load: each expert's share of the assignments, E numbers that sum to 1 (zeros without tokens).
        entropy: mean entropy of the router's probabilities over tokens, nats: ln E is undecided, 0 is certain.
        dropped_share: share of the assignments that were dropped, in [0, 1].
        dead_experts: experts that were given nothing.
        router_logits_rms: root of the mean square of the router's logits over tokens and experts; None where the router
            has none, or was compiled before the monitor started.
        router_logits_max: their largest magnitude, or None.
        expert_similarity: mean cosine between two experts' weights, in the steps that measure it; None in others. See
            :func:`dmoe.monitoring.expert_similarity`.
        bytes_sent: bytes that ranks sent to each other in forward, all ranks together; None without expert parallelism.
        seconds: of the layer's forwards, by part: ``router``, ``dispatch``, ``experts``, ``combine``, as a mean over
            ranks; empty where the layer was compiled.
        forwards: how many the numbers are of, on all ranks together.
    """

    tokens_per_expert: tuple[int, ...]
    kept_per_expert: tuple[int, ...]
    load: tuple[float, ...]
    entropy: float
    dropped_share: float
    dead_experts: int
    router_logits_rms: float | None = None
    router_logits_max: float | None = None
    expert_similarity: float | None = None
    bytes_sent: int | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    forwards: int = 1


@dataclass(frozen=True)
class StepRecord:
    """One step.

    Attributes:
        step: its number.
        seconds: from its beginning to its end, on this rank.
        parts: seconds of what :meth:`Monitor.part` named, on this rank.
        tokens: that went through the model on all ranks: those of the layer that saw most.
        layers: by name, those that ran in this step.
        warnings: what was noticed for the first time in this step, as sentences.
    """

    step: int
    seconds: float
    parts: Mapping[str, float]
    tokens: int
    layers: Mapping[str, LayerRecord]
    warnings: tuple[str, ...] = ()


def as_json(record: StepRecord) -> dict[str, Any]:
    """A step as ``metrics.jsonl`` has it: what can be computed of the rest, and what is None, is left out.

    Numbers that are not finite, which JSON does not have, are null; a warning says so in words.
    """
    return {
        "kind": "step",
        "step": record.step,
        "seconds": _number(record.seconds),
        "parts": {name: _number(value) for name, value in record.parts.items()},
        "tokens": record.tokens,
        "layers": {name: _layer_json(layer) for name, layer in record.layers.items()},
        "warnings": list(record.warnings),
    }


def _layer_json(layer: LayerRecord) -> dict[str, Any]:
    kept = {} if layer.kept_per_expert == layer.tokens_per_expert else {"kept_per_expert": list(layer.kept_per_expert)}
    optional = {
        name: _number(value)
        for name in ("router_logits_rms", "router_logits_max", "expert_similarity", "bytes_sent")
        if (value := getattr(layer, name)) is not None
    }
    return {
        "tokens_per_expert": list(layer.tokens_per_expert),
        **kept,
        "entropy": _number(layer.entropy),
        **optional,
        "seconds": {name: _number(value) for name, value in layer.seconds.items()},
        "forwards": layer.forwards,
    }


def _number(value: float) -> float | None:
    """Six digits are more than a curve shows, and a third of what a float takes."""
    if isinstance(value, int):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None
