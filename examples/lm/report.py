"""The report of a run: ``report.json`` with every number, ``report.png`` with the picture."""

from __future__ import annotations

import itertools
import json
import os
import platform
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
    """Every number of the report, as plain values."""
    by_name = {run.name: run for run in runs}
    models: dict[str, dict[str, Any]] = {}
    for run in runs:
        models[run.name] = {
            "parameters": count_parameters(run.model),
            "curve": run.curve,
            "final": {
                **run.curve[-1],
                "best_held_out_bpb": min(point["held_out_bpb"] for point in run.curve),
                "bytes_per_second": run.step * settings.batch * settings.seq_len / run.seconds,
            },
        }
    moe = models["moe"]["parameters"]
    config = moe_configs(settings)[0]
    leak = sees_later_tokens(config)
    teacher = runs[0].teacher
    summary: dict[str, Any] = {
        "settings": settings.to_dict(),
        **environment(corpus, runs[0].device),
        "models": models,
        "routing": by_name["moe"].routing,
        "experts_of_a_token": experts_of_a_token(config),
        "teacher": None if teacher is None else teacher.facts,
        "notes": [
            "seconds are those of training steps; evaluation, checkpoints and a warm-up pass are not in them",
            f"the routers' {moe['router']:,} parameters multiply once a token on top of what the dense twin does: "
            f"{100 * moe['router'] / moe['active']:.2f}% of the active parameters",
            *([f"held-out bits per byte see later bytes: {leak}"] if leak else []),
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
