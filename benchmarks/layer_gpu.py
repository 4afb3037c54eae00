"""How fast are dmoe's experts and its whole layer on a GPU, beside others, and how far from what the chip allows?

    python benchmarks/layer_gpu.py [--shapes "7B,OLMoE"] [--contestants "dmoe,SonicMoE"] [--peers DIR] [--budget 300]

For each size: draw weights, tokens and a routing; compare every contestant's output and gradients with float64; time
those that agree, in turns; write JSON after every size, and a table and a plot at the end. ``--check-only`` stops after
the comparison and needs no GPU with ``--shapes tiny --device cpu``; ``--dummy`` writes invented figures, to see the
report.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from parts.gpu_contestants import CEILING, CONTESTANTS, OWN, AbsentError, Contestant
from parts.gpu_dummy import dummy_results
from parts.gpu_peers import add_peers
from parts.gpu_problem import Problem, Truth, make_problem
from parts.gpu_report import plot, report
from parts.gpu_shapes import DECODE, H200, MODELS, ORDER, SKEWED, TINY, Rates, Shape, decode_floor, floor
from parts.gpu_timing import (
    Flush,
    ceilings,
    gpu_facts,
    launches,
    memory,
    memory_returned,
    replay_seconds,
    seconds_of,
    step_of,
    time_training,
)
from parts.harness import RESULTS, environment, milliseconds, stem, write_json

# Half of bfloat16's last place is 2e-3 of a value, and a gradient passes four roundings. A swapped weight is off by
# 1; one lost row of sixteen moves its token by a quarter.
TOLERANCE, WORST = 3e-2, 0.15


class BrokenDeviceError(Exception):
    """A kernel left the device unusable, as an access outside memory does: nothing more can run in this process."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, check, time, write; 1 when dmoe failed its check somewhere."""
    args, cases = parse(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.dummy:
        return finish(args, *dummy_results([case for case in cases if case[0] not in TINY]))
    device = torch.device(args.device)
    env = environment(torch.get_num_threads())
    env["peers"] = add_peers(args.peers)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        env["gpu"] = gpu_facts(device)
        env["versions"]["triton"] = _version("triton")
    rates = H200
    if not args.check_only:
        rates = ceilings(device)
        env["ceilings"] = dataclasses.asdict(rates)
        print(f"measured: {rates.flops / 1e12:.0f} TFLOP/s, {rates.bytes / 1e12:.2f} TB/s", flush=True)

    results: list[dict[str, Any]] = []
    broken = ""
    with progress(len(cases)) as advance:
        for shape, routing, kind in cases:
            if time.monotonic() > args.deadline or broken:
                results.append({"kind": kind, "case": described(shape, routing), "left_out": broken or "out of time"})
                continue
            with memory_returned(device):
                entry: dict[str, Any] = {"kind": kind, "case": described(shape, routing)}
                results.append(entry)
                try:
                    run_case(entry, make_problem(shape, routing, device, args.seed), args, rates)
                except BrokenDeviceError as error:
                    broken = str(error)
            save(args, env, results)
            print(one_line(entry), flush=True)
            advance()
    return finish(args, env, results)


def parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[tuple[Shape, str, str]]]:
    """The command line, checked, and the cases that it asks for: shape, routing, ``training`` or ``decode``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shapes", default="", help="only sizes whose label contains one of these, separated by commas"
    )
    parser.add_argument(
        "--contestants", default="", help=f"only these, separated by commas; of {', '.join(CONTESTANTS)}"
    )
    parser.add_argument("--peers", type=Path, default=os.environ.get("DMOE_PEERS"), help="wheels and source folders")
    parser.add_argument("--budget", type=float, default=3600.0, help="seconds, after which no further size is begun")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each contestant, in each of two passes")
    parser.add_argument("--seconds", type=float, default=2.0, help="a slow contestant gets fewer turns beyond this")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON, the table and the plot")
    parser.add_argument("--name", default="", help="of the three files, without an ending")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check-only", action="store_true", help="compare with float64, time nothing")
    parser.add_argument("--dummy", action="store_true", help="invented figures, to see the report; needs no GPU")
    args = parser.parse_args(arguments)
    args.deadline = time.monotonic() + args.budget
    if args.rounds < 1:
        parser.error(f"--rounds: expected at least 1, got {args.rounds}")
    args.names = [name.strip() for name in args.contestants.split(",") if name.strip()] or list(CONTESTANTS)
    if CEILING not in args.names:
        args.names.append(CEILING)
    unknown = [name for name in args.names if name not in CONTESTANTS]
    if unknown:
        parser.error(f"--contestants: expected some of {list(CONTESTANTS)}, got {unknown}")
    wanted = [part.strip() for part in args.shapes.split(",") if part.strip()]
    cases = [case for case in all_cases() if not wanted or any(part in case[0].label for part in wanted)]
    if "tiny" in wanted:
        cases += [(shape, routing, "training") for shape in TINY for routing in ("uniform", "zipf")]
    if not cases:
        parser.error(f"--shapes {args.shapes!r}: no such size; labels are like {MODELS[0].label!r}, and 'tiny'")
    if args.device.startswith("cuda") and not args.dummy and not torch.cuda.is_available():
        parser.error(
            f"--device {args.device}: PyTorch {torch.__version__} finds no CUDA device; see --dummy, --check-only"
        )
    if args.device == "cpu" and not (args.dummy or args.check_only):
        parser.error("--device cpu: only with --check-only or --dummy; layer_cpu.py times the layer on the CPU")
    return args, cases


def all_cases() -> list[tuple[Shape, str, str]]:
    """Every size with its routing, those that say most first."""
    models = [(MODELS[i], "uniform", "training") for i in ORDER]
    skewed = [(shape, "zipf", "training") for shape in MODELS if shape.name in SKEWED]
    decode = [(shape, "uniform", "decode") for shape in DECODE]
    return [*models[:4], *decode, *models[4:], *skewed]


def described(shape: Shape, routing: str) -> dict[str, Any]:
    """A case for the JSON."""
    return {**dataclasses.asdict(shape), "routing": routing, "label": f"{shape.label} {routing}"}


def run_case(entry: dict[str, Any], problem: Problem, args: argparse.Namespace, rates: Rates) -> None:
    """Check and time one case, filling ``entry``."""
    device = problem.x.device
    shape = problem.shape
    entry["load"] = problem.load()
    field = check(entry, problem, args)
    if args.check_only or not field:
        return
    if entry["kind"] == "decode":
        used = int((torch.bincount(problem.indices.flatten(), minlength=shape.experts) > 0).sum())
        entry["floor"] = {"chip": decode_floor(shape, used, H200), "measured": decode_floor(shape, used, rates)}
        entry["decode"] = {name: time_decode(contestant, device) for name, contestant in field.items()}
        return
    entry["floor"] = {"chip": floor(shape, H200), "measured": floor(shape, rates)}
    entry["memory"] = {name: memory(contestant, device) for name, contestant in field.items()}
    entry["timings"] = time_training(field, device, rounds=args.rounds, seconds_each=args.seconds)
    entry["graph"] = {}
    entry["launches"] = {}
    for name in OWN:
        if name in field:
            step = step_of(field[name])
            entry["launches"][name] = attempt(functools.partial(launches, step, device))
            entry["graph"][name] = attempt(functools.partial(replay_seconds, step, device))


def attempt(run: Callable[[], Any]) -> Any:
    """The result, or the error in words: what is beside the main figures must not take them along."""
    try:
        return run()
    except Exception as error:
        return last_line(error)


def check(entry: dict[str, Any], problem: Problem, args: argparse.Namespace) -> dict[str, Contestant]:
    """The contestants that compute the right thing, and in ``entry`` the errors of all and why others do not run."""
    device = problem.x.device
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


def synchronize(device: torch.device) -> None:
    """Wait, and find out whether the device still works."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError as error:
            raise BrokenDeviceError(f"the device broke down: {last_line(error)}") from error


def time_decode(contestant: Contestant, device: torch.device) -> dict[str, Any]:
    """Seconds of an inference forward, launched one by one and as a CUDA graph."""
    flush = Flush(device)
    with torch.no_grad():
        found: dict[str, Any] = {"eager": seconds_of(contestant.forward, device, flush=flush)}
        if not contestant.synchronises:
            found["graph"] = attempt(functools.partial(replay_seconds, contestant.forward, device, flush))
        found["launches"] = attempt(functools.partial(launches, contestant.forward, device))
    return found


def one_line(entry: dict[str, Any]) -> str:
    """A case as it is done, for the log."""
    parts = []
    for name, timing in entry.get("timings", {}).items():
        parts.append(f"{name} {milliseconds(timing['forward'].median)}+{milliseconds(timing['backward'].median)} ms")
    for name, timing in entry.get("decode", {}).items():
        parts.append(f"{name} {timing['eager'] * 1e6:.0f} us")
    if not parts:
        parts = [f"{name} agrees" for name in entry.get("errors", {}) if name not in entry["refused"]]
    parts += [f"{name} REFUSED ({why})" for name, why in entry.get("refused", {}).items()]
    return f"{entry['case']['label']}: {'; '.join(parts) or 'nothing ran'}"


def save(args: argparse.Namespace, env: dict[str, Any], results: list[dict[str, Any]]) -> Path:
    """Write the JSON; returns the three files' common stem."""
    name = args.name or stem("layer_gpu", env)
    base: Path = args.out / (f"DUMMY_{name}" if env.get("dummy") else name)  # .gitignore knows that prefix
    settings = {key: value for key, value in vars(args).items() if key != "deadline"}
    write_json(base.with_name(base.name + ".json"), env, settings, results)
    return base


def finish(args: argparse.Namespace, env: dict[str, Any], results: list[dict[str, Any]]) -> int:
    """Write and print everything."""
    base = save(args, env, results)
    text = report(results, env, base.name)
    base.with_name(base.name + ".md").write_text(text)
    plot(results, env, base.with_name(base.name + ".png"))
    print(text)
    print(f"written: {base}.json, .md, .png")
    failed = [entry["case"]["label"] for entry in results if set(entry.get("refused", {})) & set(OWN)]
    if failed and not args.dummy:
        print(f"dmoe FAILED its check, and has no figures, in: {'; '.join(failed)}", file=sys.stderr)
        return 1
    return 0


def last_line(error: BaseException) -> str:
    """The kind of an error and its first line, short enough for a table."""
    words = str(error).strip().splitlines()
    return f"{type(error).__name__}: {words[0] if words else ''}"[:200]


def _version(package: str) -> str:
    try:
        return str(__import__(package).__version__)
    except ImportError:
        return "absent"


class progress:  # noqa: N801 - used like a function
    """A progress bar where tqdm is installed."""

    def __init__(self, total: int) -> None:
        try:
            from tqdm import tqdm
        except ImportError:
            self.bar = None
        else:
            self.bar = tqdm(total=total, unit="case", mininterval=1)

    def __enter__(self) -> Callable[[], Any]:
        return (lambda: None) if self.bar is None else self.bar.update

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()


if __name__ == "__main__":
    sys.exit(main())
