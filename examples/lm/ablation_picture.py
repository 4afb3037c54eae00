"""The picture of `ablation.py`: what each option changes, seed by seed, against the base."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .ablation_table import Row
from .picture import FAINT, INK, machine
from .variants import BASE

BETTER, WORSE, NOISE = "#0072B2", "#D55E00", "#8a8a8a"
SOFT = "#5a5a5a"
LINE = 0.36  # inches of a row


def draw(result: dict[str, Any], rows: Sequence[Row], path: Path) -> None:
    """A line for each variant: a dot for each seed, the mean, and its 95% interval; the base is the upright line.

    Args:
        result: as written to ``ablation.json``.
        rows: of `lm.ablation_table.rows`, the base among them.
        path: of the PNG.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    others = [row for row in rows if row.variant.name != BASE]
    base = next(row for row in rows if row.variant.name == BASE)
    places = _places(others)
    height = 2.35 + LINE * (max(places, default=0) + 1)
    style: dict[Any, Any] = {"font.size": 11, "text.color": INK, "axes.edgecolor": FAINT, "xtick.color": INK}
    with rc_context(style):
        figure = Figure(figsize=(12, height), dpi=120, facecolor="white")
        FigureCanvasAgg(figure)
        _title(figure, result, base, height)
        axes = figure.add_axes((0.36, 0.85 / height, 0.47, 1 - 2.2 / height))
        for row, place in zip(others, places, strict=True):
            _row(axes, row, place)
        _axis(axes, others, places)
        figure.savefig(path)


def _places(rows: Sequence[Row]) -> list[float]:
    """Heights from above: a gap between factors."""
    places, at, last = [], 0.0, None
    for row in rows:
        at += (0.55 if last not in (None, row.variant.factor) else 0) + (last is not None)
        places.append(at)
        last = row.variant.factor
    return places


def _title(figure: Any, result: dict[str, Any], base: Row, height: float) -> None:
    s, seeds = result["base"], len(base.bits)
    spread = f" ± {statistics.stdev(base.bits):.4f}" if seeds > 1 else ""
    lines: list[tuple[str, dict[str, Any]]] = [
        ("What each option is worth in the demo's setting", {"fontsize": 18, "fontweight": "bold"}),
        (f"Held-out bits per byte after {s['steps']} steps, against the base ({base.variant.value}: "
         f"{statistics.fmean(base.bits):.4f}{spread})", {"fontsize": 11.5}),
        (f"{s['layers']} layers of {s['experts']} experts, hidden {s['hidden']}, {s['batch']} x {s['seq_len']} bytes "
         f"of {result['text']['name']}. {machine({**result, 'settings': s})}", {"fontsize": 10, "color": SOFT}),
    ]  # fmt: skip
    for (text, style), down in zip(lines, (0.36, 0.72, 0.98), strict=True):
        figure.text(0.03, 1 - down / height, text, va="center", **style)


def _row(axes: Any, row: Row, place: float) -> None:
    mean = statistics.fmean(row.differences)
    colour = NOISE if not row.clear else (BETTER if mean < 0 else WORSE)
    low, high = min(row.differences), max(row.differences)
    axes.plot([low, high], [place] * 2, color=colour, linewidth=5, alpha=0.25, solid_capstyle="round")
    axes.plot(row.differences, [place] * len(row.differences), "o", color=colour, markersize=5, alpha=0.6, mew=0)
    axes.plot([mean], [place], "D", color=colour, markersize=7.5, markeredgecolor="white", zorder=3)
    over = axes.get_yaxis_transform()
    axes.text(1.03, place, f"{mean:+.4f}", transform=over, va="center", color=colour,
              fontweight="bold" if row.clear else "normal")  # fmt: skip
    axes.text(1.3, place, f"{row.seconds:.0f} s", transform=over, va="center", ha="right", color=SOFT, fontsize=10)


def _axis(axes: Any, rows: Sequence[Row], places: Sequence[float]) -> None:
    axes.axvline(0, color=INK, linewidth=1.4, zorder=0)
    values = [value for row in rows for value in row.differences] or [1e-3]
    room = 0.12 * (max(*values, 0) - min(*values, 0))
    axes.set_xlim(min(*values, 0) - room, max(*values, 0) + room)
    axes.set_ylim(max(places, default=0) + 0.7, -0.7)
    axes.set_yticks([])
    over = axes.get_yaxis_transform()
    last = None
    for row, place in zip(rows, places, strict=True):
        if row.variant.factor != last:
            axes.text(-0.7, place, row.variant.factor, transform=over, va="center", fontweight="bold")
        last = row.variant.factor
        axes.text(-0.03, place, row.variant.value, transform=over, va="center", ha="right")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.grid(axis="x", color="#e8e8e8", linewidth=0.8)
    axes.set_axisbelow(True)
    key = ("difference in bits per byte (left of the line is better). Diamond: mean;\n"
           "dots: seeds, each against the base's same seed; grey: the 95% interval holds 0")  # fmt: skip
    axes.set_xlabel(key, fontsize=10)
    axes.text(1.03, -1.0, "mean", transform=over, color=SOFT, fontsize=10)
    axes.text(1.3, -1.0, "processor", transform=over, color=SOFT, fontsize=10, ha="right")
