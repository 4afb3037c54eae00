"""The picture of ``layer_cpu.py``: times over the floor with new tokens in every step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .harness import COLOURS, label_lines, new_figure, save_figure
from .layer_bench import CONTESTANTS
from .layer_report import AIM, panels_of, shape_of

TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200)
LEFT_OUT = ("dmoe + balance loss",)


def plot(results: list[dict[str, Any]], env: dict[str, Any], path: Path) -> None:
    """A row of panels for each kind of passes, a panel for each dtype."""
    panels = panels_of(results)
    rows = len({passes for passes, _ in panels})
    columns = len(panels) // rows
    figure, axes = new_figure(columns, width=6.2 * columns, height=0.6 + 4.4 * rows, rows=rows)
    drawn = [
        _draw(axis, f"{' '.join(key)}", entries) for axis, (key, entries) in zip(axes, panels.items(), strict=True)
    ]
    for first in range(0, len(axes), columns):
        heights = [y for _, ys in drawn[first : first + columns] for y in ys]
        if heights:  # panels of a row share their axis; ticks must not widen it
            axes[first].set_ylim(min(heights) / 1.3, max(heights) * 1.3)
        axes[first].set_ylabel("time over that of the bare products")
    for axis in axes[-columns:]:
        axis.set_xlabel("T, H, F, E, K (downwards)")
    where = f"{env['hardware']}, {env['threads']} threads"
    figure.suptitle(f"MoE layer, {where} (lower is better; band: the aim)", x=0.07, ha="left")
    figure.subplots_adjust(wspace=0.42, hspace=0.5, top=0.86 if rows == 1 else 0.92)
    figure.canvas.draw()
    for axis, (ends, _) in zip(axes, drawn, strict=True):
        label_lines(axis, ends, gap=0.052)
    save_figure(figure, path)


def _draw(
    axis: Any, title: str, entries: list[dict[str, Any]]
) -> tuple[list[tuple[float, float, str, str]], list[float]]:
    """The shapes side by side; ends of the lines for :func:`label_lines`, and all that was drawn."""
    entries = [entry for entry in entries if "floor" in entry["timings"]["changing"]]
    axis.axhspan(1, AIM, color="#f0e6c8", lw=0, zorder=0)
    ends: list[tuple[float, float, str, str]] = []
    drawn: list[float] = []
    for name, colour in zip((n for n in CONTESTANTS if n not in LEFT_OUT), COLOURS, strict=True):
        points = [
            (x, entry["timings"]["changing"][name], entry["timings"]["changing"]["floor"].median)
            for x, entry in enumerate(entries)
            if name in entry["timings"]["changing"]
        ]
        if not points:
            continue
        xs = [x for x, _, _ in points]
        ys = [timing.median / floor for _, timing, floor in points]
        bars = [[(t.median - t.p10) / f for _, t, f in points], [(t.p90 - t.median) / f for _, t, f in points]]
        bold = name == "dmoe"
        # Lines only lead the eye from one shape to the next.
        axis.plot(
            xs,
            ys,
            lw=2.4 if bold else 0.9,
            alpha=1 if bold else 0.55,
            ls="--" if name == "floor" else "-",
            color=colour,
        )
        style = {"color": colour, "marker": "o", "ms": 7 if bold else 5, "zorder": 4 if bold else 3}
        axis.errorbar(xs, ys, yerr=bars, ls="none", elinewidth=1, **style)
        ends.append((xs[-1], ys[-1], name, colour))
        drawn += ys
    axis.set_yscale("log")
    axis.set_yticks(TICKS, [f"{tick:g}x" for tick in TICKS])
    axis.minorticks_off()
    labels = ["\n".join(shape_of(entry).replace(" ", "").split(",")) for entry in entries]
    axis.set_xticks(range(len(entries)), labels, fontsize=9)
    axis.set_xlim(-0.4, len(entries) - 0.6)
    axis.set_title(title)
    return ends, drawn
