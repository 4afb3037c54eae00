"""Invented results in the form of real ones, so that JSON, table and plot can be seen and tested without a GPU."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

from parts.gpu_contestants import CEILING, OWN
from parts.gpu_kernels import role
from parts.gpu_shapes import H200, Shape, floor
from parts.harness import Timing, environment

SPEED = {"dmoe": 0.8, "dmoe layer": 0.74, "grouped_mm": 0.3, "HF grouped_mm": 0.35, "Liger": 0.45, CEILING: 1.05}


def dummy_results(cases: list[tuple[Shape, str, str]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Environment and results; no number in them was measured, and every file made of them says so."""
    env = environment(1)
    env["dummy"] = True
    env["gpu"] = {"name": "DUMMY, nothing was measured", "cuda": "0.0", "driver_version": "0"}
    env["ceilings"] = dataclasses.asdict(H200)
    env["peers"] = []
    return env, [_entry(shape, routing, kind, number) for number, (shape, routing, kind) in enumerate(cases)]


def _entry(shape: Shape, routing: str, kind: str, number: int) -> dict[str, Any]:
    chance = random.Random(number)
    label = {**dataclasses.asdict(shape), "routing": routing, "label": f"{shape.label} {routing}"}
    entry: dict[str, Any] = {"kind": kind, "case": label}
    if number == 13:
        return {**entry, "left_out": "out of time"}
    entry |= {
        "load": {"least": 0.9, "most": 1.1},
        "errors": {name: {"y": 4e-3, "gate_up": 5e-3, "worst y": 0.02} for name in SPEED},
        "not_run": {"HF batched_mm": "needs 480 GiB for a copy of the weights per row", "SonicMoE": "does not import"},
        "refused": {"MegaBlocks sparse": "differs from float64: y by 3.0e-01"},
        "first_call_seconds": dict.fromkeys(SPEED, 1.0),
    }
    if kind == "decode":
        entry["floor"] = {"chip": 1e-5, "measured": 1e-5}
        entry["decode"] = {
            name: {"eager": chance.uniform(4e-5, 2e-4), "graph": chance.uniform(2e-5, 5e-5), "launches": 5}
            for name in SPEED
            if name != CEILING
        }
        entry["decode"]["Liger"]["graph"] = "it synchronises"
        return entry
    entry["floor"] = {"chip": floor(shape, H200), "measured": floor(shape, H200)}
    entry["timings"], entry["memory"] = {}, {}
    for name, share in SPEED.items():
        forward, backward = (seconds / share * chance.uniform(0.95, 1.05) for seconds in floor(shape, H200))
        parts = {"forward": forward, "backward": backward, "step": forward + backward}
        entry["timings"][name] = {part: Timing.of([value, value * 1.01]) for part, value in parts.items()}
        entry["timings"][name]["spread"] = 0.004
        if name != CEILING:
            entry["memory"][name] = {"held": int(shape.least_saved * 1.01 / share), "peak": 3 * shape.least_saved}
    entry["graphs"] = {name: timing for name, timing in entry["timings"].items() if name != "Liger"}
    entry["no_graph"] = {"Liger": "it synchronises"}
    entry["launches"] = dict.fromkeys(OWN[:2], 12)
    names = {"forward": ["up_kernel", "rows_kernel", "combine_kernel"], "backward": ["weight_grad_kernel"] * 2}
    entry["kernels"] = {
        "dmoe layer": {
            direction: [
                {"name": name, "role": role(name, direction, called[:i]), "seconds": chance.uniform(1e-3, 3e-3)}
                for i, name in enumerate(called)
            ]
            for direction, called in names.items()
        }
    }
    return entry
