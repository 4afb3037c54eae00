"""One case of ``layer_gpu.py``: compare with float64 who takes part, then time those who agree."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch

from parts.gpu_contestants import CONTESTANTS, OWN, AbsentError, Contestant
from parts.gpu_kernels import kernel_seconds
from parts.gpu_problem import Problem, Truth, make_problem
from parts.gpu_shapes import H200, Rates, Shape, decode_floor, floor
from parts.gpu_timing import (
    Eager,
    Flush,
    Graphed,
    Runner,
    launches,
    memory,
    memory_returned,
    replay_seconds,
    seconds_of,
    step_of,
    time_training,
)
from parts.harness import milliseconds

# Half of bfloat16's last place is 2e-3 of a value, and a gradient passes four roundings. A swapped weight is off by
# 1; one lost row of sixteen moves its token by a quarter.
TOLERANCE, WORST = 3e-2, 0.15

Case = tuple[Shape, str, str]  # size, routing, "training" or "decode"
Keep = Callable[[], None]  # what has been found so far is worth keeping


class BrokenDeviceError(Exception):
    """A kernel left the device unusable, as an access outside memory does: nothing more can run in this process."""


def begin(case: Case) -> dict[str, Any]:
    """An entry without results."""
    shape, routing, kind = case
    label = f"{shape.label} {routing}"
    return {"kind": kind, "case": {**dataclasses.asdict(shape), "routing": routing, "label": label}}


def run_case(entry: dict[str, Any], case: Case, args: argparse.Namespace, rates: Rates, keep: Keep) -> None:
    """Draw, check and time one case, filling ``entry``; a device that breaks ends it with ``entry["broken"]``."""
    device = torch.device(args.device)
    with memory_returned(device):
        try:
            problem = make_problem(case[0], case[1], device, args.seed)
            field = check(entry, problem, args)
            keep()
            if field and not args.check_only:
                time_case(entry, problem, field, args, rates, keep)
        except BrokenDeviceError as error:
            entry["broken"] = str(error)
        except torch.OutOfMemoryError as error:
            entry["broken"] = last_line(error)
    keep()


def check(entry: dict[str, Any], problem: Problem, args: argparse.Namespace) -> dict[str, Contestant]:
    """The contestants that compute the right thing, and in ``entry`` the errors of all and why others do not run."""
    device = problem.x.device
    entry["load"] = problem.load()
    truth = Truth(problem)
    entry.update({"errors": {}, "not_run": {}, "refused": {}, "first_call_seconds": {}})
    field: dict[str, Contestant] = {}
    for name in args.names:
        if time.monotonic() > args.deadline:
            entry["not_run"][name] = "out of time"
            continue
        start = time.monotonic()
        try:
            contestant = CONTESTANTS[name](problem)
            got = contestant.results()
            synchronize(device)
            entry["first_call_seconds"][name] = time.monotonic() - start
            errors = contestant.truth(truth).errors(got)
        except AbsentError as error:
            entry["not_run"][name] = str(error)
        except BrokenDeviceError:
            entry["refused"][name] = "broke the device"
            raise
        except torch.OutOfMemoryError:
            entry["not_run"][name] = "out of memory"
        except Exception as error:
            entry["refused"][name] = last_line(error)
            if name in OWN:
                traceback.print_exc()
        else:
            entry["errors"][name] = errors
            off = {key: e for key, e in errors.items() if not e <= (WORST if key.startswith("worst") else TOLERANCE)}
            if off:
                listed = ", ".join(f"{key} by {error:.1e}" for key, error in off.items())
                entry["refused"][name] = f"differs from float64: {listed}"
            else:
                field[name] = contestant
        contestant = got = None  # type: ignore[assignment]  # a failed one's memory is needed
        synchronize(device)
    return field


def time_case(
    entry: dict[str, Any],
    problem: Problem,
    field: dict[str, Contestant],
    args: argparse.Namespace,
    rates: Rates,
    keep: Keep,
) -> None:
    """All figures of one case, those that matter most first."""
    shape, device = problem.shape, problem.x.device
    if entry["kind"] == "decode":
        used = int((torch.bincount(problem.indices.flatten(), minlength=shape.experts) > 0).sum())
        entry["floor"] = {"chip": decode_floor(shape, used, H200), "measured": decode_floor(shape, used, rates)}
        entry["decode"] = {name: time_decode(contestant, device) for name, contestant in field.items()}
        return
    entry["floor"] = {"chip": floor(shape, H200), "measured": floor(shape, rates)}
    entry["memory"] = {name: memory(contestant, device) for name, contestant in field.items()}
    timed = {"rounds": args.rounds, "seconds_each": args.seconds}
    entry["timings"] = time_training({name: Eager(contestant) for name, contestant in field.items()}, device, **timed)
    synchronize(device)
    keep()
    graphs: dict[str, Runner] = {}
    entry["no_graph"] = {}
    for name, contestant in field.items():
        if contestant.synchronises:
            entry["no_graph"][name] = "it synchronises"
            continue
        graph = attempt(functools.partial(Graphed, contestant))
        if isinstance(graph, str):
            entry["no_graph"][name] = graph
        else:
            graphs[name] = graph
        synchronize(device)
    if graphs:
        entry["graphs"] = time_training(graphs, device, **timed)
    graphs.clear()
    synchronize(device)
    keep()
    entry["launches"] = {}
    for name in OWN:
        if name in field:
            entry["launches"][name] = attempt(functools.partial(launches, step_of(field[name]), device))
    for name in ("dmoe layer", "dmoe"):  # the layer's has the router's too
        if name in field:
            eager = Eager(field[name])
            entry.setdefault("kernels", {})[name] = attempt(
                functools.partial(kernel_seconds, eager.forward, eager.backward, device)
            )
            keep()
    synchronize(device)


def time_decode(contestant: Contestant, device: torch.device) -> dict[str, Any]:
    """Seconds of an inference forward, launched one by one, the host's gaps included, and as a CUDA graph."""

    def forward() -> Any:
        with contestant.around():
            return contestant.forward()

    with torch.no_grad():
        found: dict[str, Any] = {"eager": seconds_of(forward, device, flush=Flush(device, head_start=False))}
        if not contestant.synchronises:
            found["graph"] = attempt(functools.partial(replay_seconds, forward, device, Flush(device)))
        found["launches"] = attempt(functools.partial(launches, forward, device))
    return found


def attempt(run: Callable[[], Any]) -> Any:
    """The result, or the error in words: what is beside the main figures must not take them along."""
    try:
        return run()
    except Exception as error:
        return last_line(error)


def synchronize(device: torch.device) -> None:
    """Wait, and find out whether the device still works."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError as error:
            raise BrokenDeviceError(f"the device broke down: {last_line(error)}") from error


def last_line(error: BaseException) -> str:
    """The kind of an error and its first line, short enough for a table."""
    words = str(error).strip().splitlines()
    return f"{type(error).__name__}: {words[0] if words else ''}"[:200]


def one_line(entry: dict[str, Any]) -> str:
    """A case as it is done, for the log."""
    parts = []
    for name, timing in entry.get("graphs", entry.get("timings", {})).items():
        parts.append(f"{name} {milliseconds(timing['forward'].median)}+{milliseconds(timing['backward'].median)} ms")
    for name, timing in entry.get("decode", {}).items():
        parts.append(f"{name} {timing['eager'] * 1e6:.0f} us")
    if not parts:
        parts = [f"{name} agrees" for name in entry.get("errors", {}) if name not in entry["refused"]]
    parts += [f"{name} REFUSED ({why})" for name, why in entry.get("refused", {}).items()]
    parts += [f"ENDED: {entry[key]}" for key in ("broken", "left_out") if key in entry]
    return f"{entry['case']['label']}: {'; '.join(parts) or 'nothing ran'}"


def failed(results: list[dict[str, Any]]) -> list[str]:
    """The cases in which dmoe computed something else, or broke the device."""
    return [entry["case"]["label"] for entry in results if set(entry.get("refused", {})) & set(OWN)]


def complain(labels: list[str]) -> None:
    """On stderr, where a failed case must not be missed."""
    print(f"dmoe FAILED its check, and has no figures, in: {'; '.join(labels)}", file=sys.stderr)
