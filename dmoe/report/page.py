"""The page: one HTML file that loads nothing from anywhere, made of strings that are all escaped."""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dmoe.report.columns import LAYER_CURVES, PARTS, Columns, Curve, LayerColumns
from dmoe.report.reading import Run
from dmoe.report.specialisation import preferred
from dmoe.report.words import Finding, findings, summary

MOST_WARNINGS = 200


def page(run: Run, columns: Columns, names: Mapping[int, str]) -> str:
    """The whole page.

    Args:
        run: what was read.
        columns: its steps.
        names: of token ids.
    """
    data = {
        "steps": columns.steps,
        "seconds": _short(columns.seconds),
        "parts": {name: _short(curve) for name, curve in columns.parts.items()},
        "tokens": _short(columns.tokens),
        "layers": [_layer(name, layer, run, names) for name, layer in columns.layers.items()],
    }
    # Inside a script element only "<" can end it or begin something else.
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return _source("page.html").format(
        title=html.escape(run.name),
        summary=html.escape(summary(run, columns)),
        style=_source("page.css"),
        findings="".join(map(_finding, findings(columns))),
        warnings=_warnings(run),
        notes="".join(f"<p class=note>{html.escape(note)}</p>" for note in run.notes),
        data=text,
        script=_source("page.js"),
    )


def _source(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _layer(name: str, layer: LayerColumns, run: Run, names: Mapping[int, str]) -> dict[str, Any]:
    about: dict[str, Any] = {
        "name": name or "(the layer)",
        "experts": layer.experts,
        "load": base64.b64encode(load_bytes(layer)).decode(),
        "peak": _short(layer.peak),
        **{curve: _short(layer.curves.get(curve, [])) for curve in LAYER_CURVES},
        "seconds": {part: _short(layer.seconds[part]) for part in PARTS if part in layer.seconds},
    }
    if run.tokens is not None and name in run.tokens["layers"]:
        ids = run.tokens["ids"]
        about["prefers"] = [
            [[names.get(ids[place], f"id {ids[place]}"), round(times, 2), count] for place, times, count in row]
            for row in preferred(run.tokens["layers"][name])
        ]
    return about


def load_bytes(layer: LayerColumns) -> bytes:
    """A row for each expert, a byte for each column: 0 no token, 255 nothing ran.

    From 1 to 253 the load grows by a factor of ``2 ** (6 / 252)`` from an eighth of an even one to eight times it.
    """
    table = bytearray(layer.experts * len(layer.load))
    for column, load in enumerate(layer.load):
        for expert in range(layer.experts):
            times = load[expert] if load is not None and expert < len(load) else None
            place = 255 if times is None else 0
            if times:
                place = 1 + round(252 * (min(max(math.log2(times), -3.0), 3.0) + 3) / 6)
            table[expert * len(layer.load) + column] = place
    return bytes(table)


def _short(curve: Curve) -> list[float | None]:
    """Four digits: a thousandth of a chart's height is less than a pixel."""
    return [None if value is None else float(f"{value:.4g}") for value in curve]


def _finding(finding: Finding) -> str:
    kind = {True: "fine", False: "look", None: ""}[finding.fine]
    mark = {True: "<span class=mark>✓ fine</span>", False: "<span class=mark>! look</span>", None: ""}[finding.fine]
    return (
        f'<li class="tile {kind}"><h3>{html.escape(finding.title)}{mark}</h3>'
        f"<p class=value>{html.escape(finding.value)}</p><p>{html.escape(finding.text)}</p></li>"
    )


def _warnings(run: Run) -> str:
    if not run.warnings:
        return '<p class="calm">The monitor warned of nothing.</p>'
    items = "".join(f"<li>{html.escape(text)}</li>" for _, text in run.warnings[:MOST_WARNINGS])
    more = len(run.warnings) - MOST_WARNINGS
    rest = f"<p class=note>and {more} more, which metrics.jsonl has.</p>" if more > 0 else ""
    opened = " open" if len(run.warnings) <= 6 else ""
    word = "warning" if len(run.warnings) == 1 else "warnings"
    return f"<details{opened}><summary>{len(run.warnings)} {word}</summary><ul>{items}</ul>{rest}</details>"
