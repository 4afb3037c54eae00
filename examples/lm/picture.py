"""The picture of a run: held-out bits per byte against steps and against time, expert load, router entropy."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import torch

from .settings import Settings

# Okabe and Ito's palette: told apart by readers of every colour vision, and in grey.
COLOUR = {"moe": "#0072B2", "dense": "#D55E00"}
INK, FAINT = "#222222", "#8a8a8a"


def draw(summary: dict[str, Any], path: Path) -> None:
    """The picture: held-out bits per byte against steps and against time, expert load, router entropy."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    s = Settings.from_dict(summary["settings"])
    style: dict[Any, Any] = {
        "font.size": 12, "axes.edgecolor": FAINT, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
        "text.color": INK, "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left",
        "axes.titlesize": 13, "axes.titleweight": "bold", "axes.titlepad": 10,
    }  # fmt: skip
    with rc_context(style):
        figure = Figure(figsize=(12, 8.6), dpi=150, facecolor="white")
        FigureCanvasAgg(figure)
        grid = figure.add_gridspec(
            2, 2, left=0.07, right=0.975, top=0.82, bottom=0.075, hspace=0.4, wspace=0.24, height_ratios=[1, 1.05]
        )
        _title(figure, summary, s)
        by_step = figure.add_subplot(grid[0, 0])
        by_time = figure.add_subplot(grid[0, 1])
        _curves(by_step, summary["models"], "step", "training steps")
        _curves(by_time, summary["models"], "seconds", "training time, seconds")
        by_step.set_title("Held-out bits per byte, step by step")
        by_time.set_title("… and second by second")
        _mark_crossing(by_step, by_time, summary)
        _mark_teacher(by_step, by_time, summary)
        _load(figure, grid[1, 0], summary["routing"], s)
        _entropy(figure.add_subplot(grid[1, 1]), summary["routing"], s)
        figure.savefig(path)


def _title(figure: Any, summary: dict[str, Any], s: Settings) -> None:
    parameters = summary["models"]["moe"]["parameters"]
    what = "Residual MoE" if s.residual else "Mixture of experts"
    what += f" ({s.preset})" if s.preset is not None else ""
    versus = " against its dense twin, at equal active FLOPs" if "dense" in summary["models"] else ": language model"
    figure.text(0.07, 0.955, what + versus, fontsize=19, fontweight="bold", va="center")
    experts = "/".join(map(str, s.experts)) if isinstance(s.experts, tuple) else str(s.experts)
    line = (
        f"{s.layers} layers, {experts} experts, {summary['experts_of_a_token']:g} at work on each byte: "
        f"{_amount(parameters['total'])} parameters, {_amount(parameters['active'])} active."
    )
    if "dense" in summary["models"]:
        line += f" Dense twin: {_amount(summary['models']['dense']['parameters']['total'])}, all active."
    figure.text(0.07, 0.917, line, fontsize=12.5, va="center")
    seeds = f". Mean of {s.seeds} seeds, each a thin line" if s.seeds > 1 else ""
    figure.text(
        0.07,
        0.887,
        f"Text: {_shorten(summary['text']['name'], 50)}. {machine(summary)}{seeds}",
        fontsize=11,
        color="#5a5a5a",
        va="center",
    )


def machine(summary: dict[str, Any]) -> str:
    """What it ran on, as arithmetic of which kind, under which PyTorch."""
    hardware, threads = summary["hardware"], summary["hardware"]["threads"]
    on_cpu = f", {threads} thread{'s' if threads > 1 else ''}" if hardware["device"] == "cpu" else ""
    torch_version = summary["versions"]["torch"].split("+")[0]
    return f"{hardware['name']}{on_cpu}, {summary['settings']['dtype']}, PyTorch {torch_version}"


def _curves(axes: Any, models: dict[str, Any], key: str, label_x: str) -> None:
    curves = {name: model["curve"] for name, model in models.items()}
    several = any(len(model["seeds"]) > 1 for model in models.values())
    for name, model in models.items():
        for of_seed in model["seeds"].values() if several else ():
            axes.plot([point[key] for point in of_seed], [point["held_out_bpb"] for point in of_seed],
                      color=COLOUR[name], linewidth=0.9, alpha=0.55)  # fmt: skip
    for name, curve in curves.items():
        axes.plot(
            [point[key] for point in curve],
            [point["held_out_bpb"] for point in curve],
            color=COLOUR[name],
            linewidth=2.4,
            marker="o",
            markersize=4,
            clip_on=True,
        )
    lowest = min(point["held_out_bpb"] for curve in curves.values() for point in curve)
    # The first steep descent would press the rest flat: the axis begins where a sixth of the steps are made.
    highest = max(curve[min(len(curve) - 1, max(0, len(curve) // 6))]["held_out_bpb"] for curve in curves.values())
    room = max(highest - lowest, 1e-3)
    axes.set_ylim(lowest - (0.35 if several else 0.25) * room, highest + 0.05 * room)
    _end_axis(axes, max(curve[-1][key] for curve in curves.values()), 1.46 if several else 1.28)
    axes.set_xlabel(label_x)
    axes.set_ylabel("bits per byte (lower is better)")
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    ends = sorted(curves, key=lambda name: curves[name][-1]["held_out_bpb"])
    height = curves[ends[0]][-1]["held_out_bpb"]
    for rank, name in enumerate(ends):
        end = curves[name][-1]
        # Two ends close together would print on one another: the upper label moves up, no nearer than a line of text.
        height = max(end["held_out_bpb"], height + 0.075 * 1.3 * room) if rank else height
        spread = [of_seed[-1]["held_out_bpb"] for of_seed in models[name]["seeds"].values()]
        beside = f" ± {statistics.stdev(spread):.3f}" if len(spread) > 1 else ""
        axes.annotate(
            f"{'MoE' if name == 'moe' else 'dense'} {end['held_out_bpb']:.3f}{beside}",
            (end[key], height),
            xytext=(8, 0),
            textcoords="offset points",
            color=COLOUR[name],
            fontweight="bold",
            fontsize=11 if several else 12,
            va="center",
            annotation_clip=False,
        )


def _mark_crossing(by_step: Any, by_time: Any, summary: dict[str, Any]) -> None:
    """Shows where the mixture is as good as the dense twin ends up."""
    comparison = summary.get("comparison")
    if comparison is None or comparison["dense_final_reached_by_moe"] is None:
        return
    reached = comparison["dense_final_reached_by_moe"]
    dense = summary["models"]["dense"]["curve"][-1]
    for axes, key, name in ((by_step, "step", "steps"), (by_time, "seconds", "time")):
        share = comparison[f"share_of_{name}"]
        axes.plot(
            [reached[key], dense[key]], [dense["held_out_bpb"]] * 2, color=INK, linewidth=1, linestyle=(0, (3, 3))
        )
        axes.plot(reached[key], dense["held_out_bpb"], marker="o", markersize=8, color=INK, fillstyle="none")
        text = f"where the twin ends,\nin {100 * share:.0f}% of its {name}" + _range(comparison, f"share_of_{name}")
        axes.annotate(
            text,
            (reached[key], dense["held_out_bpb"]),
            xytext=(-6, -10),
            textcoords="offset points",
            ha="right",
            va="top",
            fontsize=10.5,
        )


def _range(comparison: dict[str, Any], share: str) -> str:
    """What single seeds say beside the mean."""
    values = [pair.get(share, math.inf) for pair in comparison["seeds"].values()]
    if len(values) < 2:
        return ""
    low, high = (f"{100 * value:.0f}" if math.isfinite(value) else "∞" for value in (min(values), max(values)))
    return f"\n(single seeds: {low} to {high}%)"


def _mark_teacher(by_step: Any, by_time: Any, summary: dict[str, Any]) -> None:
    """Shows where the teacher ended, where that was measured on the same text, and until when it taught."""
    teacher, s = summary["teacher"], Settings.from_dict(summary["settings"])
    if teacher is None:
        return
    end = summary["models"]["moe"]["curve"][-1]
    if s.kd_stop is not None and s.kd_stop < end["step"]:
        by_step.axvline(s.kd_stop, color=FAINT, linewidth=1, linestyle=(0, (1, 2)))
        by_step.annotate("alone from here", (s.kd_stop, by_step.get_ylim()[1]), xytext=(5, -4), fontsize=10.5,
                         textcoords="offset points", va="top", color="#5a5a5a")  # fmt: skip
    if teacher["text"] != summary["text"]["sha256"]:
        return
    for axes, key in ((by_step, "step"), (by_time, "seconds")):
        low, high = axes.get_ylim()
        level = teacher["held_out_bpb"]
        axes.set_ylim(min(low, level - 0.08 * (high - low)), max(high, level + 0.08 * (high - low)))
        first = min(model["curve"][-1][key] for model in summary["models"].values())  # behind it stand labels
        axes.plot([0, first], [level] * 2, color=FAINT, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.annotate(f"teacher {level:.3f}", (0, level), xytext=(4, -3), textcoords="offset points", va="top",
                      fontsize=10.5, color="#5a5a5a")  # fmt: skip


def _end_axis(axes: Any, end: float, room: float = 1.28) -> None:
    """Ends the x axis at ``end``, with room for labels right of it."""
    axes.set_xlim(0, room * end)
    axes.set_xticks([tick for tick in axes.get_xticks() if 0 <= tick <= end])
    axes.spines["bottom"].set_bounds(0, end)


def _load(figure: Any, cell: Any, routing: list[dict[str, Any]], s: Settings) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    norm, palette = Normalize(-2, 2), "PuOr_r"
    strips = cell.subgridspec(s.layers, 2, hspace=0.12, wspace=0.03, width_ratios=[1, 0.025])
    end = routing[-1]["step"]
    same = len(set(s.layer_experts)) == 1
    first = None
    for layer, experts in enumerate(s.layer_experts):
        # (experts, points), in powers of two around an even load
        load = torch.tensor([entry["load"][layer] for entry in routing]).t().clamp(min=2**-4).log2()
        axes = figure.add_subplot(strips[layer, 0], sharex=first)
        first = first or axes
        axes.imshow(
            load.numpy(), aspect="auto", norm=norm, cmap=palette, interpolation="nearest", extent=(0, end, experts, 0)
        )
        axes.set_yticks([experts / 2], [f"layer {layer + 1}" + ("" if same else f"\nE = {experts}")])
        axes.tick_params(axis="y", length=0)
        axes.tick_params(axis="x", labelbottom=layer == s.layers - 1, length=3 if layer == s.layers - 1 else 0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        if layer == 0:
            axes.set_title(f"Load of each {f'of the {experts} experts' if same else 'expert'} (1 is the mean)")
        if layer == s.layers - 1:
            axes.set_xlabel("training steps")
    bar = figure.colorbar(ScalarMappable(norm, palette), cax=figure.add_subplot(strips[:, 1]))
    bar.set_ticks([-2, -1, 0, 1, 2], labels=["¼", "½", "1", "2", "4"])
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)


def _entropy(axes: Any, routing: list[dict[str, Any]], s: Settings) -> None:
    from matplotlib import colormaps

    most = math.log(max(s.layer_experts))
    steps = [entry["step"] for entry in routing]
    for experts in set(s.layer_experts):
        level = math.log(experts)
        axes.axhline(level, color=FAINT, linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(f"undecided: ln {experts} = {level:.2f}", (steps[-1], level), xytext=(0, 4), fontsize=10.5,
                      textcoords="offset points", ha="right", color="#5a5a5a")  # fmt: skip
    ends = [(routing[-1]["entropy"][layer], layer) for layer in range(s.layers)]
    heights: dict[int, float] = {}
    below = -math.inf
    for value, layer in sorted(ends):
        below = heights[layer] = max(value, below + 0.062 * 1.12 * max(most, 0.1))
    for layer in range(s.layers):
        colour = colormaps["viridis"](0.05 + 0.68 * layer / max(1, s.layers - 1))
        axes.plot(steps, [entry["entropy"][layer] for entry in routing], color=colour, linewidth=2)
        axes.annotate(f"layer {layer + 1}", (steps[-1], heights[layer]), xytext=(8, 0), textcoords="offset points",
                      color=colour, fontweight="bold", va="center", annotation_clip=False)  # fmt: skip
    axes.set_ylim(0, 1.12 * max(most, 0.1))
    _end_axis(axes, steps[-1])
    values = [value - math.log(experts) for entry in routing for value, experts in zip(
        entry["entropy"], s.layer_experts, strict=True)]  # fmt: skip
    silent = max(map(abs, values)) < 1e-6  # which is also said where nothing can be said
    axes.set_title("Router entropy" + (": this router has no probabilities" if silent else ""))
    axes.set_ylabel("entropy, nats")
    axes.set_xlabel("training steps")
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)


def _amount(number: int) -> str:
    return f"{number / 1e6:.1f} M" if number >= 1e6 else f"{number:,}"


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
