"""Steps as columns of a picture: a long run has more of them than anybody sees, so neighbours become one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dmoe.report.reading import Run

MOST_COLUMNS = 360
MOST_CELLS = 2_000_000  # of all heat maps together: two megabytes
LAYER_CURVES = (
    "entropy",
    "dropped_share",
    "dead_experts",
    "router_logits_rms",
    "router_logits_max",
    "expert_similarity",
    "bytes_sent",
)
PARTS = ("router", "dispatch", "experts", "combine")

Curve = list[float | None]


@dataclass
class LayerColumns:
    """One layer's columns.

    Attributes:
        experts: E.
        load: by column each expert's load as a multiple of an even one, E numbers; None where nothing ran.
        peak: the largest of them, by column.
        curves: means of a column's steps, by name of :data:`LAYER_CURVES`; the entropy as a share of ln E.
        seconds: likewise, by part.
    """

    experts: int
    load: list[list[float] | None] = field(default_factory=list)
    peak: Curve = field(default_factory=list)
    curves: dict[str, Curve] = field(default_factory=dict)
    seconds: dict[str, Curve] = field(default_factory=dict)


@dataclass
class Columns:
    """A run's columns.

    Attributes:
        steps: first and last number of each.
        layers: by name.
        seconds: of a step, mean of a column.
        parts: seconds of a step's named parts, likewise.
        tokens: of a step, likewise.
    """

    steps: list[tuple[int, int]]
    layers: dict[str, LayerColumns]
    seconds: Curve = field(default_factory=list)
    parts: dict[str, Curve] = field(default_factory=dict)
    tokens: Curve = field(default_factory=list)


def columns_of(run: Run) -> Columns:
    """Read a run's steps once more, and put as many of them into each column as it takes."""
    rows = max(sum(run.layers.values()), 1)
    most = max(min(MOST_COLUMNS, MOST_CELLS // rows), 24)
    size = math.ceil(len(run.lines) / most)
    numbers = sorted(run.lines)
    ends = [(numbers[i], numbers[min(i + size, len(numbers)) - 1]) for i in range(0, len(numbers), size)]
    columns = Columns(ends, {name: LayerColumns(experts) for name, experts in run.layers.items()})
    group: list[dict[str, Any]] = []
    for position, (_, line) in enumerate(run.steps(), 1):
        group.append(line)
        if len(group) == size or position == len(numbers):
            _add(columns, group)
            group = []
    return columns


def _add(columns: Columns, steps: list[dict[str, Any]]) -> None:
    place = len(columns.seconds)
    columns.seconds.append(_mean(step.get("seconds") for step in steps))
    columns.tokens.append(_mean(step.get("tokens") for step in steps))
    _extend(columns.parts, [step.get("parts", {}) for step in steps], place)
    for name, layer in columns.layers.items():
        _add_layer(layer, [found for step in steps if (found := step["layers"].get(name)) is not None], place)


def _add_layer(layer: LayerColumns, records: list[dict[str, Any]], place: int) -> None:
    counts = [sum(each) for each in zip(*(record["tokens_per_expert"] for record in records), strict=False)]
    total = sum(counts)
    load = [count * len(counts) / total for count in counts] if total else None
    layer.load.append(load)
    layer.peak.append(max(load) if load else None)
    undecided = math.log(layer.experts) or 1.0
    for record in records:
        tokens = record["tokens_per_expert"]
        kept = record.get("kept_per_expert", tokens)
        record["dropped_share"] = 1 - sum(kept) / sum(tokens) if sum(tokens) else 0.0
        record["dead_experts"] = tokens.count(0)
        if record.get("entropy") is not None:
            record["entropy"] /= undecided
    _extend(layer.curves, [{name: record.get(name) for name in LAYER_CURVES} for record in records], place)
    _extend(layer.seconds, [record.get("seconds", {}) for record in records], place)


def _extend(curves: dict[str, Curve], values: list[Mapping[str, Any]], place: int) -> None:
    """One more column of every curve, of those that begin here, too."""
    for name in dict.fromkeys(name for each in values for name in each):
        curves.setdefault(name, [None] * place)
    for name, curve in curves.items():
        curve.append(_mean(each.get(name) for each in values))


def _mean(values: Iterable[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None


def late(curve: Curve, share: float = 0.1) -> float | None:
    """A curve's mean over its last columns; None where it has no value there."""
    return _mean(curve[-max(1, round(len(curve) * share)) :])


def early(curve: Curve, share: float = 0.1) -> float | None:
    """A curve's mean over its first columns."""
    return _mean(curve[: max(1, round(len(curve) * share))])
