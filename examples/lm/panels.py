"""The picture of `all_presets.py`: a panel for each preset, with its curve and the loads of its experts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from .picture import FAINT, INK, machine

# Okabe and Ito's blue and vermilion: told apart by readers of every colour vision, and in grey.
CAUSAL, LEAKS = "#0072B2", "#D55E00"
OTHERS, SOFT = "#d4d4d4", "#5a5a5a"
COLUMNS = 5
KEY = 3  # cells of the grid
SLOPE = 0.3  # of the curve's height: where the axis begins, see `_heights`


def draw(summary: dict[str, Any], path: Path) -> None:
    """Draws what `all_presets.py` measured into a PNG.

    Args:
        summary: as written to ``presets.json``.
        path: of the PNG.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    presets = {name: preset for name, preset in summary["presets"].items() if "curve" in preset}
    rows = math.ceil((len(presets) + KEY) / COLUMNS)
    style: dict[Any, Any] = {
        "font.size": 10.5, "axes.edgecolor": FAINT, "axes.labelcolor": INK, "xtick.color": SOFT, "ytick.color": SOFT,
        "xtick.labelsize": 9.5, "ytick.labelsize": 9.5, "text.color": INK, "axes.spines.top": False,
        "axes.spines.right": False,
    }  # fmt: skip
    with rc_context(style):
        height = 1.95 + 2.5 * rows
        figure = Figure(figsize=(13, height), dpi=100, facecolor="white")
        FigureCanvasAgg(figure)
        _title(figure, summary, height)
        grid = figure.add_gridspec(
            rows, COLUMNS, left=0.045, right=0.985, top=1 - 1.7 / height, bottom=0.3 / height, hspace=0.36,
            wspace=0.2,
        )  # fmt: skip
        heights = _heights([preset["curve"] for preset in presets.values()])
        for number, name in enumerate(presets):
            cell = grid[divmod(number, COLUMNS)].subgridspec(2, 1, height_ratios=[1, 0.24], hspace=0.42)
            axes = figure.add_subplot(cell[0])
            _curve(axes, name, presets, summary["dense"]["curve"], heights)
            axes.tick_params(labelleft=number % COLUMNS == 0)
            _strip(figure, cell[1], presets[name])
        _key(figure, grid, len(presets))
        figure.savefig(path)


def _title(figure: Any, summary: dict[str, Any], height: float) -> None:
    s = summary["settings"]
    lines: list[tuple[str, dict[str, Any]]] = [
        ("Every preset in the same small language model", {"fontsize": 19, "fontweight": "bold"}),
        (f"Held-out bits per byte over {s['steps']} steps, and how loaded the experts are in the end. Sizes for a "
         "laptop: no ranking of the systems.", {"fontsize": 12}),
        (f"{s['layers']} layers of {s['experts']} experts, hidden {s['hidden']}, FFN {s['ffn']}, {s['batch']} x "
         f"{s['seq_len']} bytes. Text: {summary['text']['name']}. {machine(summary)}, {summary['date']}",
         {"fontsize": 10, "color": SOFT}),
    ]  # fmt: skip
    for (text, style), down in zip(lines, (0.36, 0.74, 1.02), strict=True):
        figure.text(0.045, 1 - down / height, text, va="center", **style)


def _heights(curves: list[list[dict[str, float]]]) -> tuple[float, float]:
    """The axis of all panels: it begins where a third of the steps are made: the first descent would press it flat."""
    lowest = min(point["held_out_bpb"] for curve in curves for point in curve)
    highest = max(curve[int(SLOPE * (len(curve) - 1))]["held_out_bpb"] for curve in curves)
    room = max(highest - lowest, 1e-3)
    return lowest - 0.1 * room, highest + 0.05 * room


def _curve(
    axes: Any, name: str, presets: dict[str, Any], dense: list[dict[str, float]], heights: tuple[float, float]
) -> None:
    def points(curve: list[dict[str, float]]) -> tuple[list[float], list[float]]:
        return [point["step"] for point in curve], [point["held_out_bpb"] for point in curve]

    for other in presets:
        axes.plot(*points(presets[other]["curve"]), color=OTHERS, linewidth=0.8)
    axes.plot(*points(dense), color=INK, linewidth=1.1, linestyle=(0, (3, 2)))
    preset = presets[name]
    colour = LEAKS if preset["held_out_sees_later_bytes"] else CAUSAL
    axes.plot(*points(preset["curve"]), color=colour, linewidth=2.4)
    axes.set_ylim(*heights)
    end = preset["curve"][-1]["step"]
    axes.set_xlim(0, end)
    axes.set_xticks([0, end // 2, end])
    axes.tick_params(length=3)
    axes.text(0, 1.04, name, transform=axes.transAxes, fontsize=12.5, fontweight="bold")
    beside = f" + {preset['beside_them']}" if preset["beside_them"] else ""
    axes.text(
        1,
        1.04,
        f"{preset['experts_of_a_token']:g}{beside}",
        transform=axes.transAxes,
        fontsize=9.5,
        color=SOFT,
        ha="right",
    )
    value = f"{preset['curve'][-1]['held_out_bpb']:.3f}{'*' if preset['held_out_sees_later_bytes'] else ''}"
    axes.text(0.98, 0.9, value, transform=axes.transAxes, fontsize=12.5, fontweight="bold", color=colour, ha="right",
              va="center")  # fmt: skip


def _strip(figure: Any, cell: Any, preset: dict[str, Any]) -> None:
    """Loads, layers below each other, experts from the busiest to the idlest: in training, and on held-out text."""
    halves = cell.subgridspec(1, 2, wspace=0.08)
    for half, key in enumerate(("training", "held_out")):
        axes = figure.add_subplot(halves[half])
        loads = [sorted(layer, reverse=True) for layer in preset[key]["load"]]
        powers = [[math.log2(max(each, 2**-4)) for each in layer] for layer in loads]
        axes.imshow(powers, aspect="auto", cmap="PuOr_r", vmin=-2, vmax=2, interpolation="nearest")
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set(visible=True, color=OTHERS, linewidth=0.7)
        dropped = max(preset[key]["dropped"])
        text = f"{max(preset[key]['busiest']):.1f}x" + (f", -{100 * dropped:.0f}%" if dropped >= 0.005 else "")
        axes.text(0, -0.12, text, transform=axes.transAxes, fontsize=9.5, color=SOFT, va="top")


def _key(figure: Any, grid: Any, first: int) -> None:
    """How to read a panel, in the cells that are left."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    last_row = math.ceil((first + KEY) / COLUMNS) - 1
    row, column = divmod(max(first, last_row * COLUMNS), COLUMNS)
    left = figure.add_subplot(grid[row, column])
    right = figure.add_subplot(grid[row, column + 1 :])
    left.axis("off")
    right.axis("off")
    lines = [
        (CAUSAL, 2.4, "-", "this preset"),
        (LEAKS, 2.4, "-", "* this preset, whose evaluation\nmay see later bytes"),
        (INK, 1.1, (0, (3, 2)), "a dense FFN, two experts wide"),
        (OTHERS, 1.2, "-", "the other presets"),
    ]
    for (colour, width, dashes, text), height in zip(lines, (0.92, 0.72, 0.52, 0.37), strict=True):
        left.plot([0, 0.14], [height] * 2, color=colour, linewidth=width, linestyle=dashes, transform=left.transAxes,
                  clip_on=False)  # fmt: skip
        left.text(0.19, height, text, transform=left.transAxes, va="center")
    right.text(0.06, 0.98, "Right of the name: the experts of a byte, and what it takes besides.\n"
               "Strips: the load of each expert, busiest first, one row a layer;\nthe left one in the last "
               "tenth of training, the right one on held-out text.\nBelow each: the busiest expert, relative to the "
               "mean; and the share of\nchoices that a capacity dropped.", transform=right.transAxes, va="top",
               linespacing=1.35)  # fmt: skip
    place = right.inset_axes((0.06, 0.2, 0.4, 0.07))
    bar = figure.colorbar(ScalarMappable(Normalize(-2, 2), "PuOr_r"), cax=place, orientation="horizontal")
    bar.set_ticks([-2, -1, 0, 1, 2], labels=["¼", "½", "1", "2", "4"])
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=9.5)
