"""The report of a run: ``report.json`` with every number, ``report.png`` with the picture."""

from __future__ import annotations

import itertools
import json
import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import dmoe

from .data import Corpus
from .layers import experts_of_a_token, moe_configs, sees_later_tokens
from .model import count_parameters
from .picture import draw
from .settings import Settings
from .training import Run


def summarise(settings: Settings, corpus: Corpus, runs: Sequence[Run]) -> dict[str, Any]:
    """Every number of the report, as plain values. Of several seeds a model's curve and end are the mean."""
    by_kind: dict[str, list[Run]] = {}
    for run in runs:
        by_kind.setdefault(run.kind, []).append(run)
    models = {kind: _of_model(settings, of_kind) for kind, of_kind in by_kind.items()}
    moe = models["moe"]["parameters"]
    config = moe_configs(settings)[0]
    leak = sees_later_tokens(config)
    teacher = runs[0].teacher
    several = f", means of {settings.seeds} seeds" if settings.seeds > 1 else ""
    summary: dict[str, Any] = {
        "settings": settings.to_dict(),
        **environment(corpus, runs[0].device),
        "models": models,
        "routing": by_kind["moe"][0].routing,
        "experts_of_a_token": experts_of_a_token(config),
        "teacher": None if teacher is None else teacher.facts,
        "notes": [
            f"seconds are those of training steps{several}; evaluation, checkpoints and a warm-up are not in them",
            f"the routers' {moe['router']:,} parameters multiply once a token on top of what the dense twin does: "
            f"{100 * moe['router'] / moe['active']:.2f}% of the active parameters",
            *([f"held-out bits per byte see later bytes: {leak}"] if leak else []),
        ],
    }
    if "dense" in by_kind:
        summary["comparison"] = comparison(models["moe"], models["dense"])
    return summary


def _of_model(settings: Settings, runs: Sequence[Run]) -> dict[str, Any]:
    curve = mean_curve([run.curve for run in runs])
    return {
        "parameters": count_parameters(runs[0].model),
        "curve": curve,
        "seeds": {str(run.settings.seed): run.curve for run in runs},
        "final": {
            **curve[-1],
            "best_held_out_bpb": min(point["held_out_bpb"] for point in curve),
            "bytes_per_second": curve[-1]["step"] * settings.batch * settings.seq_len / curve[-1]["seconds"],
        },
    }


def mean_curve(curves: Sequence[Sequence[dict[str, float]]]) -> list[dict[str, float]]:
    """The mean of curves that were measured at the same steps."""
    return [
        {
            key: statistics.fmean(point[key] for point in points) if key != "step" else points[0][key]
            for key in points[0]
        }
        for points in zip(*curves, strict=True)
    ]


def comparison(moe: dict[str, Any], dense: dict[str, Any]) -> dict[str, Any]:
    """The mixture beside its dense twin, by their mean curves and seed by seed.

    ``dense_final_reached_by_moe``: step and seconds at which the mixture is as good as the twin ends, or None;
    ``share_of_steps``, ``share_of_time``: these by what the twin took.
    """

    def of_pair(moe: list[dict[str, float]], dense: list[dict[str, float]]) -> dict[str, Any]:
        end, reached = dense[-1], crossing(moe, dense[-1]["held_out_bpb"])
        shares = {} if reached is None else {
            "share_of_steps": reached["step"] / end["step"], "share_of_time": reached["seconds"] / end["seconds"],
        }  # fmt: skip
        return {
            "held_out_bpb_moe_minus_dense": moe[-1]["held_out_bpb"] - end["held_out_bpb"],
            "seconds_moe_over_dense": moe[-1]["seconds"] / end["seconds"],
            "dense_final_reached_by_moe": reached,
            **shares,
        }

    each = {seed: of_pair(moe["seeds"][seed], dense["seeds"][seed]) for seed in moe["seeds"]}
    return {**of_pair(moe["curve"], dense["curve"]), "seeds": each}


def compared(comparison: dict[str, Any]) -> list[str]:
    """`comparison` in words, a line for the means and, of several seeds, one for each."""

    def line(pair: dict[str, Any]) -> str:
        told = f"moe - dense: {pair['held_out_bpb_moe_minus_dense']:+.4f} bits per byte"
        if "share_of_steps" not in pair:
            return told
        return told + (f"; where the twin ends, in {100 * pair['share_of_steps']:.0f}% of its steps and "
                       f"{100 * pair['share_of_time']:.0f}% of its time")  # fmt: skip

    seeds = comparison["seeds"]
    return [line(comparison), *(f"  seed {seed}: {line(pair)}" for seed, pair in seeds.items() if len(seeds) > 1)]


def environment(corpus: Corpus, device: torch.device) -> dict[str, Any]:
    """What was read, and what it ran on."""
    return {
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
        "hardware": hardware(device),
    }


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
    return {**facts, **_cpu()}


def write(folder: Path, summary: dict[str, Any]) -> tuple[Path, Path]:
    """Writes ``report.json`` and ``report.png``; returns both paths."""
    json_path, png_path = folder / "report.json", folder / "report.png"
    json_path.write_text(json.dumps(summary, indent=1) + "\n")
    draw(summary, png_path)
    return json_path, png_path


def _cpu() -> dict[str, Any]:
    """Its name, and of a virtual one, which has no other, family and model; what it has for products."""
    lines: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            lines.setdefault(key.strip(), value.strip())
    except OSError:
        pass
    name = lines.get("model name") or platform.processor() or platform.machine()
    if {"cpu family", "model"} <= lines.keys() and not any(map(str.isdigit, name)):
        name += f" family {lines['cpu family']} model {lines['model']}"
    known = {"avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16"}
    return {"name": name, "instructions": sorted(known & set(lines.get("flags", "").split()))}
