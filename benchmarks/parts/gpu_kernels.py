"""Seconds of each kernel of dmoe's step, by PyTorch's profiler, and the table that holds them to what was predicted."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._C._autograd import DeviceType

from parts.gpu_predictions import combined_bytes, predicted_seconds, products
from parts.gpu_shapes import Shape
from parts.harness import markdown_table

REPEATS = 5


def device_events(run: Callable[[], Any], device: torch.device) -> list[tuple[str, float]]:
    """Kernels, copies and fills that a call puts on the device, in the order of their starts: name and seconds."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=activities) as profile:
        run()
        torch.cuda.synchronize(device)
    events = [event for event in profile.events() if event.device_type == DeviceType.CUDA]
    events.sort(key=lambda event: event.time_range.start)
    return [(event.name, event.time_range.elapsed_us() / 1e6) for event in events]


def kernel_seconds(forward: Callable[[], Any], backward: Callable[[Any], Any], device: torch.device) -> dict[str, Any]:
    """Both passes' kernels with their median seconds over a few steps.

    Returns:
        {"forward": [{"name", "role", "seconds"}, ...], "backward": [...]}, in the order of their starts.
    """
    runs: dict[str, list[list[tuple[str, float]]]] = {"forward": [], "backward": []}
    for _ in range(REPEATS):
        kept: list[Any] = []
        runs["forward"].append(device_events(lambda kept=kept: kept.append(forward()), device))  # type: ignore[misc]
        runs["backward"].append(device_events(lambda kept=kept: backward(kept[0]), device))  # type: ignore[misc]
    return {direction: _medians(direction, steps) for direction, steps in runs.items()}


def _medians(direction: str, steps: Sequence[list[tuple[str, float]]]) -> list[dict[str, Any]]:
    names = [name for name, _ in steps[-1]]
    alike = [step for step in steps if [name for name, _ in step] == names]  # a first step may do more
    found = []
    for i, name in enumerate(names):
        called = role(name, direction, names[:i])
        found.append({"name": name[:120], "role": called, "seconds": statistics.median(step[i][1] for step in alike)})
    return found


def role(name: str, direction: str, before: Sequence[str]) -> str:
    """What a kernel is for: one source serves two products, told apart by the pass and by what ran before.

    The names are those of dmoe's kernels without what follows an underscore: ``up_kernel`` and any other ``up_...``.
    """
    if "plan_kernel" in name:
        return "plan"
    for start, called in (
        ("up_", "up"),
        ("rows_", "down" if direction == "forward" else "row_grad"),
        ("hidden_grad", "hidden_grad"),
        ("combine", f"combine, {direction}"),
        ("logits_", "router logits"),
    ):
        if name.startswith(start):
            return called
    if name.startswith("weight_grad"):
        return f"weight_grad of {'up' if any(other.startswith('weight_grad') for other in before) else 'down'}"
    return ""


def kernel_table(measured: Sequence[tuple[str, Shape, dict[str, Any]]]) -> str:
    """A line for each kernel of each size.

    Args:
        measured: label, size, and what :func:`kernel_seconds` found.
    """
    rows = []
    for label, shape, passes in measured:
        flops = products(shape)
        for direction in ("forward", "backward"):
            for kernel in passes[direction]:
                called, seconds = kernel["role"] or kernel["name"][:40], kernel["seconds"]
                rate = "-"
                if called in flops:
                    rate = f"{flops[called] / seconds / 1e12:.0f} TFLOP/s"
                elif called.startswith("combine"):
                    rate = f"{combined_bytes(shape) / seconds / 1e12:.2f} TB/s"
                expected = predicted_seconds(called, shape)
                rows.append(
                    [
                        label,
                        direction,
                        called,
                        f"{seconds * 1e6:.0f}",
                        rate,
                        "-" if expected is None else f"{expected * 1e6:.0f}",
                        # As speeds: above 1 it is faster than predicted.
                        "-" if expected is None else f"{expected / seconds:.2f}",
                    ]
                )
    header = ["model (T, H, F, E, K)", "pass", "kernel", "us", "speed", "predicted us", "measured/predicted speed"]
    return markdown_table(header, rows)
