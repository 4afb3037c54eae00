"""PNGs of a run, for those who want to put one somewhere: loads of all layers, and curves."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from dmoe.monitoring import STOPS
from dmoe.report.columns import Columns, Curve
from dmoe.report.reading import Run, RunError

_CURVES = (
    ("peak", "busiest expert, times an even load"),
    ("entropy", "router entropy, share of ln E"),
    ("dropped_share", "dropped, share of assignments"),
    ("dead_experts", "experts without a token"),
    ("router_logits_rms", "router logits, RMS"),
    ("bytes_sent", "bytes sent in a step"),
)


def draw(run: Run, columns: Columns, page: Path) -> list[Path]:
    """Write ``PAGE-load.png`` and ``PAGE-curves.png`` beside the page; returns their paths.

    Raises:
        RunError: matplotlib is absent.
    """
    try:
        import matplotlib
    except ImportError:
        raise RunError("dmoe.report: --png: expected the package matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context({"text.parse_math": False, "font.size": 9, "axes.titlesize": 9, "figure.facecolor": "white"}):
        pictures = {"load": _loads(plt, run, columns), "curves": _curves(plt, run, columns)}
    written = []
    for name, figure in pictures.items():
        written.append(page.with_name(f"{page.stem}-{name}.png"))
        figure.savefig(written[-1], dpi=130, bbox_inches="tight")
        plt.close(figure)
    return written


def _loads(plt: Any, run: Run, columns: Columns) -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("load", [tuple(c / 255 for c in stop) for stop in STOPS]).with_extremes(
        bad="#dddddd"
    )
    count = max(len(columns.layers), 1)
    across = min(4, count)
    figure, axes = plt.subplots(
        -(-count // across),
        across,
        figsize=(3.4 * across, 1.9 * -(-count // across)),
        squeeze=False,
        layout="constrained",
    )
    image = None
    for axis in axes.flat[len(columns.layers) :]:
        axis.set_axis_off()
    for axis, (name, layer) in zip(axes.flat, columns.layers.items(), strict=False):
        none = [math.nan] * layer.experts
        table = [[math.log2(max(times, 0.125)) for times in load] if load else none for load in layer.load]
        rows = list(zip(*table, strict=False))
        extent = (columns.steps[0][0], columns.steps[-1][1] + 1, layer.experts - 0.5, -0.5)
        options = {"aspect": "auto", "interpolation": "nearest", "vmin": -3, "vmax": 3, "cmap": colours}
        image = axis.imshow(rows, extent=extent, **options)
        axis.set_title(name or "the layer", loc="left")
    if image is not None:
        bar = figure.colorbar(image, ax=axes, shrink=0.7, ticks=range(-3, 4))
        bar.ax.set_yticklabels(["1/8", "1/4", "1/2", "even", "2 times", "4 times", "8 times"])
    figure.supxlabel("step")
    figure.supylabel("expert")
    figure.suptitle(f"Load of the experts, {run.name}")
    return figure


def _curves(plt: Any, run: Run, columns: Columns) -> Any:
    figure, axes = plt.subplots(2, 3, figsize=(12, 5.6), squeeze=False, layout="constrained")
    steps = [(first + last) / 2 for first, last in columns.steps]
    for axis, (name, title) in zip(axes.flat, _CURVES, strict=True):
        for place, layer in enumerate(columns.layers.values()):
            curve: Curve = layer.peak if name == "peak" else layer.curves.get(name, [])
            values = [math.nan if value is None else value for value in curve]
            if values:
                shade = plt.get_cmap("viridis")(0.9 * (1 - place / max(len(columns.layers) - 1, 1)))
                axis.plot(steps, values, color=shade, lw=1.0)
        axis.set_title(title, loc="left")
        axis.set_xlabel("step")
        axis.grid(color="#e6e6e6")
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_ylim(bottom=0)
    figure.suptitle(f"{run.name}: a line for each layer, the first ones light")
    return figure
