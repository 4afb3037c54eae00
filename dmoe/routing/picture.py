"""Views of routings as a picture: who goes where over the probabilities, and beside it the load of every expert."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dmoe.routing.terminal import summary
from dmoe.routing.view import RoutingView

_DPI = 100
_WIDTH = 1200  # pixels
# Okabe and Ito's blue and vermilion, which everybody can tell apart, on a blue that leaves room for both.
_KEPT, _DROPPED, _INK, _QUIET = "#0b3c5d", "#d55e00", "#222222", "#6b6b6b"
_BAR, _SHADES = "#4a90c2", ("#ffffff", "#dcebf7", "#a9d0ec", "#6db1dd")


def save_picture(views: Sequence[RoutingView], path: Path) -> None:
    """Draw views, two in a row where there are several, and write the file.

    Args:
        views: what to draw.
        path: ``.png``, ``.svg`` or ``.pdf``.

    Raises:
        ImportError: without matplotlib, with the command that installs it.
        ValueError: another kind of file.
        OSError: the file cannot be written.
    """
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"{path}: expected a picture named *.png, *.svg or *.pdf, got {path.suffix or 'no suffix'}")
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("a picture needs matplotlib, which is not installed: pip install matplotlib") from error

    columns = min(len(views), 2 if max(view.num_tokens for view in views) <= 32 else 1)
    rows = -(-len(views) // columns)
    panel = (_WIDTH - 50) / columns
    heights = [_panel_height(views[row * columns : (row + 1) * columns], panel) for row in range(rows)]
    top, bottom = 14, 64
    height = sum(heights) + top + bottom
    shades = [float(view.shade.max()) for view in views if view.shade is not None]
    darkest = math.ceil(max(shades, default=1.0) * 10) / 10
    style: dict[Any, Any] = {
        "font.family": "DejaVu Sans",
        "font.size": 9,
        "text.color": _INK,
        "axes.labelcolor": _QUIET,
    }
    style |= {"axes.edgecolor": "#bbbbbb", "xtick.color": _QUIET, "ytick.color": _QUIET, "axes.linewidth": 0.8}
    with rc_context(style):
        figure = Figure(figsize=(_WIDTH / _DPI, height / _DPI), dpi=_DPI, facecolor="white")
        FigureCanvasAgg(figure)
        for number, view in enumerate(views):
            row, column = divmod(number, columns)
            left, low = 40 + column * panel, height - top - sum(heights[: row + 1])
            _draw_view(figure, view, (left, low, panel, heights[row]), (_WIDTH, height), darkest)
        _draw_key(figure, views, height, darkest)
        figure.savefig(path, dpi=_DPI)


# Pixels around a panel's grid: room for the title above, token numbers below, experts' names left, bars right.
_ABOVE, _BELOW, _LEFT, _GAP, _BARS = 52, 36, 22, 14, 0.19


def _cell(view: RoutingView, panel: float) -> float:
    return (panel * (1 - _BARS) - _LEFT - _GAP - 20) / view.num_tokens


def _panel_height(views: Sequence[RoutingView], panel: float) -> float:
    grids = [view.num_experts * min(max(_cell(view, panel), 18.0), 34.0) for view in views]
    return _ABOVE + _BELOW + max(grids)


def _draw_view(
    figure: Any,
    view: RoutingView,
    where: tuple[float, float, float, float],
    whole: tuple[float, float],
    darkest: float,
) -> None:
    left, low, width, height = where
    tall = height - _ABOVE - _BELOW
    wide = width * (1 - _BARS) - _LEFT - _GAP - 20

    def axes(x: float, w: float) -> Any:
        return figure.add_axes((x / whole[0], (low + _BELOW) / whole[1], w / whole[0], tall / whole[1]))

    grid = axes(left + _LEFT, wide)
    _draw_grid(grid, view, min(wide / view.num_tokens, tall / view.num_experts), darkest)
    _draw_bars(axes(left + _LEFT + wide + _GAP, width * _BARS - 20), view)
    top = (low + height - 16) / whole[1]
    name = textwrap.shorten(view.name, int((width - _LEFT) / 8), placeholder=" ...")
    figure.text((left + _LEFT) / whole[0], top, name, fontsize=11.5, fontweight="bold", va="center")
    figure.text(
        (left + _LEFT) / whole[0],
        (low + height - 36) / whole[1],
        f"{summary(view)} · {_told(view)}",
        fontsize=8.5,
        color=_QUIET,
        va="center",
    )


def _told(view: RoutingView) -> str:
    lost, idle = int(view.load.sum() - view.computed.sum()), view.idle_tokens
    told = f"{lost} dropped ({view.dropped:.0%})" if lost else "none dropped"
    return f"{told}, {idle} token{'s' if idle > 1 else ''} without expert" if idle else told


def _draw_grid(axes: Any, view: RoutingView, cell: float, darkest: float) -> None:
    if view.shade is not None:
        numbers = view.shade.float().t().numpy()
        axes.imshow(numbers, cmap=_colours(), norm=_shading(darkest), aspect="auto", interpolation="nearest")
    axes.set_xlim(-0.5, view.num_tokens - 0.5)
    axes.set_ylim(view.num_experts - 0.5, -0.5)
    for edge in range(1, view.num_experts):
        axes.axhline(edge - 0.5, color="#e2e2e2", lw=0.6, zorder=1)
    for edge in range(1, view.num_tokens):
        between = view.groups > 1 and edge % (view.num_tokens // view.groups) == 0
        axes.axvline(edge - 0.5, color=_INK if between else "#eeeeee", lw=1.2 if between else 0.6, zorder=1)
    size = 0.8 * cell * 72 / _DPI  # points
    first, later, lost = view.kept & (view.choice == 1), view.kept & (view.choice > 1), ~view.kept & (view.choice > 0)
    for marked, fill in ((first, _KEPT), (later, "white")):
        axes.plot(*marked.nonzero().t().tolist(), "o", ms=size, mfc=fill, mec=_KEPT, mew=1.1, zorder=3)
    axes.plot(*lost.nonzero().t().tolist(), "x", ms=size * 0.75, mec=_DROPPED, mew=max(1.6, size / 7), zorder=4)
    if later.any() and cell >= 14:
        for token, expert in view.kept.nonzero().tolist():
            k, colour = int(view.choice[token, expert]), "white" if first[token, expert] else _KEPT
            axes.text(
                token, expert + 0.02, str(k), fontsize=size * 0.72, color=colour, ha="center", va="center", zorder=5
            )
    step = _step(view.num_tokens, 16)
    axes.set_xticks(range(0, view.num_tokens, step))
    step = _step(view.num_experts, 16)
    axes.set_yticks(range(0, view.num_experts, step), [f"e{expert}" for expert in range(0, view.num_experts, step)])
    axes.tick_params(length=0, pad=4, labelsize=8)
    axes.set_xlabel("token", fontsize=8, labelpad=2)


def _colours() -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("probability", _SHADES)


def _shading(darkest: float) -> Any:
    """Small probabilities, of which most there are, apart from none."""
    from matplotlib.colors import PowerNorm

    return PowerNorm(0.6, 0, darkest)


def _draw_bars(axes: Any, view: RoutingView) -> None:
    places = range(view.num_experts)
    computed = view.computed.tolist()
    lost = (view.load - view.computed).tolist()
    axes.barh(places, computed, height=0.62, color=_BAR)
    for place, (here, gone) in enumerate(zip(computed, lost, strict=True)):
        if gone:
            axes.barh(place, gone, left=here, height=0.62, color="white", edgecolor=_DROPPED, hatch="/////", lw=0.8)
    most = max(*view.load.tolist(), 1)
    reach = most
    if _limited(view) and view.capacity is not None and view.capacity <= 2 * most:
        reach = max(most, view.capacity)
        axes.axvline(view.capacity, color=_INK, ls=(0, (4, 2)), lw=1.2, zorder=4)
    axes.set_xlim(0, reach * 1.32)
    axes.set_ylim(view.num_experts - 0.5, -0.5)
    for place, load in zip(places, view.load.tolist(), strict=True):
        axes.text(reach * 1.32, place, str(load), ha="right", va="center", fontsize=8, color=_INK if load else _QUIET)
    axes.set_yticks([])
    axes.set_xticks([])
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)
    axes.set_xlabel("load", fontsize=8, labelpad=13)


def _limited(view: RoutingView) -> bool:
    """Whether there is one capacity that an expert's whole load can be held against."""
    return view.capacity is not None and view.groups == 1 and not view.experts_choose


def _draw_key(figure: Any, views: Sequence[RoutingView], height: float, darkest: float) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    def point(**look: Any) -> Any:
        return Line2D([], [], **{"ls": "", "marker": "o", "ms": 9, "mew": 1.1, "mec": _KEPT, **look})

    entries = [(point(mfc=_KEPT), "first choice")]
    if any(view.choice.max() > 1 for view in views):
        entries.append((point(mfc="white"), "a later one"))
    if any(view.load.sum() > view.computed.sum() for view in views):
        entries.append((point(marker="x", mec=_DROPPED, mew=2.0), "dropped"))
        entries.append((Patch(fc="white", ec=_DROPPED, hatch="/////", lw=0.8), "load that was dropped"))
    if any(_limited(view) for view in views):
        entries.append((Line2D([], [], color=_INK, ls=(0, (4, 2)), lw=1.2), "capacity"))
    figure.legend(
        *zip(*entries, strict=True),
        loc="center left",
        bbox_to_anchor=(54 / _WIDTH, 26 / height),
        ncols=len(entries),
        frameon=False,
        fontsize=9,
        handletextpad=0.6,
        columnspacing=2.2,
    )
    names = sorted({view.shade_name for view in views if view.shade is not None})
    if names:
        bar = figure.add_axes(((_WIDTH - 330) / _WIDTH, 22 / height, 150 / _WIDTH, 9 / height))
        scale, ticks = ScalarMappable(_shading(darkest), _colours()), [0, darkest / 4, darkest / 2, darkest]
        figure.colorbar(scale, cax=bar, orientation="horizontal", ticks=ticks, format="{x:.2g}")
        bar.tick_params(labelsize=8, length=2, pad=2)
        bar.set_title(", or ".join(names), fontsize=8, color=_QUIET, pad=4)


def _step(count: int, most: int) -> int:
    """The smallest of 1, 2, 4, 5, 10, 20, ... of which at most ``most`` ticks are needed."""
    for power in range(9):
        for step in (1, 2, 4, 5):
            if math.ceil(count / (step * 10**power)) <= most:
                return step * 10**power
    return count
