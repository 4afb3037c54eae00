"""The report of a run: ``report.json`` with every number, ``report.png`` with the picture."""

from __future__ import annotations

import itertools
import json
import math
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import dmoe

from .data import Corpus
from .model import count_parameters
from .settings import Settings
from .training import Run

# Okabe and Ito's palette: told apart by readers of every colour vision, and in grey.
COLOUR = {"moe": "#0072B2", "dense": "#D55E00"}
INK, FAINT = "#222222", "#8a8a8a"


def summarise(settings: Settings, corpus: Corpus, runs: Sequence[Run]) -> dict[str, Any]:
    """Every number of the report, as plain values."""
    by_name = {run.name: run for run in runs}
    models: dict[str, dict[str, Any]] = {}
    for run in runs:
        models[run.name] = {
            "parameters": count_parameters(run.model, settings),
            "curve": run.curve,
            "final": {
                **run.curve[-1],
                "best_held_out_bpb": min(point["held_out_bpb"] for point in run.curve),
                "bytes_per_second": run.step * settings.batch * settings.seq_len / run.seconds,
            },
        }
    moe = models["moe"]["parameters"]
    summary: dict[str, Any] = {
        "settings": settings.to_dict(),
        "text": {
            "name": corpus.name,
            "files": corpus.files,
            "training_bytes": len(corpus.train),
            "held_out_bytes": len(corpus.held_out),
            "sha256": corpus.fingerprint,
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "dmoe": getattr(dmoe, "__version__", "unknown"),
        },
        "hardware": hardware(runs[0].device),
        "models": models,
        "routing": by_name["moe"].routing,
        "notes": [
            "seconds are those of training steps; evaluation, checkpoints and a warm-up pass are not in them",
            f"the routers' {moe['router']:,} parameters multiply once a token on top of what the dense twin does: "
            f"{100 * moe['router'] / moe['active']:.2f}% of the active parameters",
        ],
    }
    if "dense" in by_name:
        mixture, dense = by_name["moe"].curve[-1], by_name["dense"].curve[-1]
        summary["comparison"] = {
            "held_out_bpb_moe_minus_dense": mixture["held_out_bpb"] - dense["held_out_bpb"],
            "seconds_moe_over_dense": mixture["seconds"] / dense["seconds"],
            "dense_final_reached_by_moe": crossing(by_name["moe"].curve, dense["held_out_bpb"]),
        }
    return summary


def crossing(curve: Sequence[dict[str, float]], level: float) -> dict[str, float] | None:
    """Step and seconds at which a curve first comes down to ``level``, linear between its points, or None."""
    for before, after in itertools.pairwise(curve):
        high, low = before["held_out_bpb"], after["held_out_bpb"]
        if low <= level < high:
            share = (high - level) / (high - low)
            return {key: before[key] + share * (after[key] - before[key]) for key in ("step", "seconds")}
    return None


def hardware(device: torch.device) -> dict[str, Any]:
    """What the run ran on."""
    facts: dict[str, Any] = {"device": device.type, "threads": torch.get_num_threads(), "cores": os.cpu_count()}
    if device.type == "cuda":
        return {**facts, "name": torch.cuda.get_device_name(device)}
    return {**facts, "name": _cpu_name()}


def write(folder: Path, summary: dict[str, Any]) -> tuple[Path, Path]:
    """Writes ``report.json`` and ``report.png``; returns both paths."""
    json_path, png_path = folder / "report.json", folder / "report.png"
    json_path.write_text(json.dumps(summary, indent=1) + "\n")
    draw(summary, png_path)
    return json_path, png_path


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
        curves = {name: model["curve"] for name, model in summary["models"].items()}
        by_step = figure.add_subplot(grid[0, 0])
        by_time = figure.add_subplot(grid[0, 1])
        _curves(by_step, curves, "step", "training steps", label=True)
        _curves(by_time, curves, "seconds", "training time, seconds", label=False)
        by_step.set_title("Held-out bits per byte, step by step")
        by_time.set_title("… and second by second")
        _mark_crossing(by_step, by_time, summary)
        _load(figure, grid[1, 0], summary["routing"], s)
        _entropy(figure.add_subplot(grid[1, 1]), summary["routing"], s)
        figure.savefig(path)


def _title(figure: Any, summary: dict[str, Any], s: Settings) -> None:
    hardware, text = summary["hardware"], summary["text"]
    parameters = summary["models"]["moe"]["parameters"]
    versus = "against its dense twin, at equal active FLOPs" if "dense" in summary["models"] else "language model"
    figure.text(0.07, 0.955, f"Mixture of experts {versus}", fontsize=19, fontweight="bold", va="center")
    line = (
        f"{s.layers} layers, {s.experts} experts, {s.top_k} at work on each byte: {_amount(parameters['total'])} "
        f"parameters, {_amount(parameters['active'])} active."
    )
    if "dense" in summary["models"]:
        line += f" Dense twin: {_amount(summary['models']['dense']['parameters']['total'])}, all active."
    figure.text(0.07, 0.917, line, fontsize=12.5, va="center")
    where = f"{hardware['name']}, {hardware['threads']} threads" if hardware["device"] == "cpu" else hardware["name"]
    figure.text(
        0.07,
        0.887,
        f"Text: {_shorten(text['name'], 50)}. {where}, {s.dtype}, PyTorch {summary['versions']['torch'].split('+')[0]}",
        fontsize=11,
        color="#5a5a5a",
        va="center",
    )


def _curves(axes: Any, curves: dict[str, list[dict[str, float]]], key: str, label_x: str, label: bool) -> None:
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
    axes.set_ylim(lowest - 0.25 * room, highest + 0.05 * room)
    _end_axis(axes, max(curve[-1][key] for curve in curves.values()))
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
        axes.annotate(
            f"{'MoE' if name == 'moe' else 'dense'} {end['held_out_bpb']:.3f}",
            (end[key], height),
            xytext=(8, 0),
            textcoords="offset points",
            color=COLOUR[name],
            fontweight="bold",
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
    for axes, key in ((by_step, "step"), (by_time, "seconds")):
        share = reached[key] / dense[key]
        axes.plot(
            [reached[key], dense[key]], [dense["held_out_bpb"]] * 2, color=INK, linewidth=1, linestyle=(0, (3, 3))
        )
        axes.plot(reached[key], dense["held_out_bpb"], marker="o", markersize=8, color=INK, fillstyle="none")
        text = f"where the twin ends,\nin {100 * share:.0f}% of its {'steps' if key == 'step' else 'time'}"
        axes.annotate(
            text,
            (reached[key], dense["held_out_bpb"]),
            xytext=(-6, -10),
            textcoords="offset points",
            ha="right",
            va="top",
            fontsize=10.5,
        )


def _end_axis(axes: Any, end: float) -> None:
    """Ends the x axis at ``end``, with room for labels right of it."""
    axes.set_xlim(0, 1.28 * end)
    axes.set_xticks([tick for tick in axes.get_xticks() if 0 <= tick <= end])
    axes.spines["bottom"].set_bounds(0, end)


def _load(figure: Any, cell: Any, routing: list[dict[str, Any]], s: Settings) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    norm, palette = Normalize(-2, 2), "PuOr_r"
    strips = cell.subgridspec(s.layers, 2, hspace=0.12, wspace=0.03, width_ratios=[1, 0.025])
    # (layers, experts, points), in powers of two around an even load
    load = torch.tensor([entry["load"] for entry in routing]).permute(1, 2, 0).clamp(min=2**-4).log2()
    end = routing[-1]["step"]
    first = None
    for layer in range(s.layers):
        axes = figure.add_subplot(strips[layer, 0], sharex=first)
        first = first or axes
        axes.imshow(
            load[layer].numpy(), aspect="auto", norm=norm, cmap=palette, interpolation="nearest",
            extent=(0, end, s.experts, 0),
        )  # fmt: skip
        axes.set_yticks([s.experts / 2], [f"layer {layer + 1}"])
        axes.tick_params(axis="y", length=0)
        axes.tick_params(axis="x", labelbottom=layer == s.layers - 1, length=3 if layer == s.layers - 1 else 0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        if layer == 0:
            axes.set_title(f"Load of each of the {s.experts} experts (1 is the mean)")
        if layer == s.layers - 1:
            axes.set_xlabel("training steps")
    bar = figure.colorbar(ScalarMappable(norm, palette), cax=figure.add_subplot(strips[:, 1]))
    bar.set_ticks([-2, -1, 0, 1, 2], labels=["¼", "½", "1", "2", "4"])
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)


def _entropy(axes: Any, routing: list[dict[str, Any]], s: Settings) -> None:
    from matplotlib import colormaps

    most = math.log(s.experts)
    steps = [entry["step"] for entry in routing]
    axes.axhline(most, color=FAINT, linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(f"undecided: ln {s.experts} = {most:.2f}", (steps[-1], most), xytext=(0, 4), fontsize=10.5,
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
    axes.set_title("Router entropy")
    axes.set_ylabel("entropy, nats")
    axes.set_xlabel("training steps")
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)


def _amount(number: int) -> str:
    return f"{number / 1e6:.1f} M" if number >= 1e6 else f"{number:,}"


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
