"""The picture and the table of a fine-tuning: the loss on text that was held out, and what memory each way needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .picture import FAINT, INK

COLOURS = ("#0072B2", "#D55E00", "#009E73")
LINES = ("-", (0, (3, 3)), "-")
PARTS = ("experts", "other weights", "gradients", "optimizer", "saved")
SHADES = ("#0072B2", "#56B4E9", "#E69F00", "#D55E00", "#999999")

Curves = Mapping[str, Sequence[tuple[int, float]]]
Memory = Mapping[str, Mapping[str, int]]


def processor(where: Mapping[str, Any]) -> str:
    """What it ran on."""
    hardware = where["hardware"]
    return f"{hardware['name']}, {hardware['threads']} threads, PyTorch {where['versions']['torch'].split('+')[0]}"


def table(curves: Curves, memory: Memory, trained: Mapping[str, int], seconds: Mapping[str, float]) -> str:
    """A line for each way."""
    header = ["", "held-out bits a byte", "trained", *(f"{part}, MiB" for part in PARTS), "sum, MiB", "s"]
    rows = [header]
    for name, parts in memory.items():
        (_, first), (_, last) = curves[name][0], curves[name][-1]
        amounts = [f"{parts[part] / 2**20:.1f}" for part in PARTS]
        total = f"{sum(parts.values()) / 2**20:.1f}"
        rows.append([name, f"{first:.3f} -> {last:.3f}", f"{trained[name]:,}", *amounts, total, f"{seconds[name]:.0f}"])
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = [[cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *line[1:]]) for row, line in zip(rows, lines, strict=True))


def draw(path: Path, curves: Curves, memory: Memory, note: str) -> None:
    """Curves beside bars of memory, as a PNG."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "font.size": 11, "axes.edgecolor": FAINT, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
        "text.color": INK, "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left",
        "axes.titleweight": "bold",
    }  # fmt: skip
    with rc_context(style):
        figure = Figure(figsize=(12.5, 5.4), dpi=130, facecolor="white")
        FigureCanvasAgg(figure)
        figure.text(0.06, 0.94, "Fine-tuning a mixture of experts", fontsize=16, fontweight="bold")
        figure.text(0.06, 0.89, note, color="#5a5a5a", fontsize=10)
        grid = figure.add_gridspec(
            1, 2, left=0.06, right=0.975, top=0.79, bottom=0.2, wspace=0.42, width_ratios=[1.2, 1]
        )
        loss = figure.add_subplot(grid[0])
        # Curves may lie upon each other: the later are dashed, so that the earlier ones are seen between.
        for colour, line, (name, points) in zip(COLOURS, LINES, curves.items(), strict=False):
            loss.plot(*zip(*points, strict=True), color=colour, linewidth=2.2, linestyle=line, label=name)
        loss.set_title("Held-out bits per byte")
        loss.set_xlabel("steps")
        loss.legend(frameon=False)
        bars = figure.add_subplot(grid[1])
        names = list(memory)
        left = [0.0] * len(names)
        for part, shade in zip(PARTS, SHADES, strict=True):
            sizes = [memory[name][part] / 2**20 for name in names]
            bars.barh(range(len(names)), sizes, left=left, color=shade, label=part, height=0.55)
            left = [start + size for start, size in zip(left, sizes, strict=True)]
        for row, total in enumerate(left):
            bars.text(total, row, f" {total:.0f}", va="center")
        bars.set_yticks(range(len(names)), [name.replace(", ", ",\n") for name in names], fontsize=9)
        bars.invert_yaxis()
        bars.set_xlim(0, 1.12 * max(left))
        bars.set_title("Memory of a training step, MiB")
        bars.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.4, -0.1), fontsize=9)
        figure.savefig(path)
