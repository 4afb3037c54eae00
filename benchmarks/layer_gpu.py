"""How fast are dmoe's experts and its whole layer on a GPU, beside others, and how far from what the chip allows?

    python benchmarks/layer_gpu.py [--shapes "7B,OLMoE"] [--contestants "dmoe,SonicMoE"] [--peers DIR] [--budget 300]

For each size, in a process of its own: draw weights, tokens and a routing; compare every contestant's output and
gradients with float64; time those that agree, in turns. JSON, table and plot are written anew after every size, the
JSON also while one is under way. ``--check-only`` stops after the comparison and needs no GPU with ``--shapes tiny
--device cpu``; ``--dummy`` writes invented figures, to see the report; ``--once`` runs dmoe's step once, for a profiler
to look at.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from parts import gpu_variants  # noqa: F401 - two more contestants
from parts.gpu_apart import Reporter, load, run_apart
from parts.gpu_case import Case, begin, complain, failed, one_line, run_case
from parts.gpu_contestants import CEILING, CONTESTANTS
from parts.gpu_dummy import dummy_results
from parts.gpu_peers import add_peers
from parts.gpu_problem import make_problem
from parts.gpu_report import plot, report
from parts.gpu_shapes import DECODE, H200, MODELS, ORDER, SKEWED, TINY, Rates
from parts.gpu_timing import Eager, ceilings, gpu_facts
from parts.harness import RESULTS, environment, replaced, stem, write_json

from dmoe.ops.offline import counting_compiles

FILES = ("json", "md", "png")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, check, time, write; 1 when dmoe failed its check somewhere."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    args, cases = parse(arguments)
    if args.once:
        return once(args, cases[0])
    if args.case is not None:
        return one_case(args, cases[args.case])
    args.out.mkdir(parents=True, exist_ok=True)
    if args.dummy:
        env, results = dummy_results([case for case in cases if case[0] not in TINY])
        return finish(args, env, results)
    env, results = environment(torch.get_num_threads()), []
    if args.resume:
        env, results = resumed(args, env)
    done = {entry["case"]["label"] for entry in results}
    with progress(len(cases)) as advance:
        for index, case in enumerate(cases):
            entry = begin(case)
            if entry["case"]["label"] in done:
                advance()
                continue
            if time.monotonic() > args.deadline:
                results.append({**entry, "left_out": "out of time"})
                continue
            if args.apart:
                env, entry = apart(args, arguments, index, entry, env, results)
            else:
                env = found_here(args, env)
                run_case(entry, case, args, rates_of(env), lambda: None)
            results.append(entry)
            write(args, env, results)
            print(one_line(entry), flush=True)
            advance()
    return finish(args, env, results)


def apart(
    args: argparse.Namespace,
    arguments: Sequence[str],
    index: int,
    entry: dict[str, Any],
    env: dict[str, Any],
    results: list[dict[str, Any]],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """One case in its process; returns the environment, which the first one completes, and the entry."""

    def merged(document: dict[str, Any]) -> dict[str, Any]:
        compiled = {**env.get("compiled_kernels", {}), **document["environment"].pop("compiled_kernels", {})}
        return {**document["environment"], **env, "compiled_kernels": compiled}

    def changed(document: dict[str, Any]) -> None:
        partial = {**document["cases"][0], "under_way": True}
        write_json(base(args, env).with_suffix(".json"), merged(document), settings(args), [*results, partial])

    rates = env.get("ceilings")
    document = run_apart(
        index,
        arguments,
        args.deadline,
        ceilings=None if rates is None else (rates["flops"], rates["bytes"]),
        changed=changed,
    )
    if document is None:
        return env, {**entry, "left_out": "its process left nothing"}
    return merged(document), document["cases"][0]


def one_case(args: argparse.Namespace, case: Case) -> int:
    """What a case's own process does."""
    entry = begin(case)
    env: dict[str, Any] = environment(torch.get_num_threads())
    keep = Reporter(args, env, entry)
    keep()
    with counting_compiles() as told:
        env.update(found_here(args, env))
        run_case(entry, case, args, rates_of(env), keep)
        env["compiled_kernels"] = {entry["case"]["label"]: len(told.fresh)}
    keep()
    return 1 if failed([entry]) else 0


def found_here(args: argparse.Namespace, env: dict[str, Any]) -> dict[str, Any]:
    """The environment with what this process sees: peers, the GPU, what it reaches."""
    if "peers" in env:
        return env
    env = {**env, "peers": add_peers(args.peers)}
    device = torch.device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        env["gpu"] = gpu_facts(device)
        env["versions"]["triton"] = _version("triton")
    if not args.check_only:
        rates = Rates(*args.ceilings) if args.ceilings else ceilings(device)
        env["ceilings"] = dataclasses.asdict(rates)
        print(f"measured: {rates.flops / 1e12:.0f} TFLOP/s, {rates.bytes / 1e12:.2f} TB/s", flush=True)
    return env


def rates_of(env: dict[str, Any]) -> Rates:
    """What the chip was measured to do, or is known for."""
    return Rates(**env["ceilings"]) if "ceilings" in env else H200


def once(args: argparse.Namespace, case: Case) -> int:
    """dmoe's forward and backward, twice: a profiler skips the first, in which everything is loaded."""
    device = torch.device(args.device)
    eager = Eager(CONTESTANTS[args.names[0]](make_problem(case[0], case[1], device, args.seed)))
    for _ in range(2):
        eager.backward(eager.forward())
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    print(f"ran {args.names[0]} on {case[0].label}")
    return 0


def parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[Case]]:
    """The command line, checked, and the cases that it asks for: shape, routing, ``training`` or ``decode``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shapes", default="", help="only sizes whose label contains one of these, separated by commas")
    add("--contestants", default="", help=f"only these, separated by commas; of {', '.join(CONTESTANTS)}")
    add("--peers", type=Path, default=os.environ.get("DMOE_PEERS"), help="wheels and source folders")
    add("--budget", type=float, default=3600.0, help="seconds in all; a size under way is then stopped")
    add("--first", type=int, default=0, help="only so many sizes; 0 takes all")
    add("--rounds", type=int, default=15, help="turns of each contestant, in each of two passes")
    add("--seconds", type=float, default=2.0, help="a slow contestant gets fewer turns beyond this")
    add("--out", type=Path, default=RESULTS, help="folder of the JSON, the table and the plot")
    add("--name", default="", help="of the three files, without an ending")
    add("--files", default=",".join(FILES), help="which of them; the table is printed as well")
    add("--resume", action="store_true", help="keep the sizes that the JSON has, and go on with the others")
    add("--device", default="cuda")
    add("--seed", type=int, default=0)
    add("--check-only", action="store_true", help="compare with float64, time nothing")
    add("--dummy", action="store_true", help="invented figures, to see the report; needs no GPU")
    add("--once", action="store_true", help="run dmoe's step on the first size, and stop")
    add("--apart", action=argparse.BooleanOptionalAction, default=None, help="a process for each size: on a GPU, yes")
    # Of a case's own process: which case, the file to write, rates that were measured before.
    add("--case", type=int, help=argparse.SUPPRESS)
    add("--into", type=Path, help=argparse.SUPPRESS)
    add("--ceilings", type=lambda text: [float(part) for part in text.split(",")], help=argparse.SUPPRESS)
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
    args.files = [part for part in args.files.split(",") if part]
    if set(args.files) - set(FILES):
        parser.error(f"--files: expected some of {', '.join(FILES)}, got {args.files}")
    wanted = [part.strip() for part in args.shapes.split(",") if part.strip()]
    cases = [case for case in all_cases() if not wanted or any(part in case[0].label for part in wanted)]
    if "tiny" in wanted:
        cases += [(shape, routing, "training") for shape in TINY for routing in ("uniform", "zipf")]
    if not cases:
        parser.error(f"--shapes {args.shapes!r}: no such size; labels are like {MODELS[0].label!r}, and 'tiny'")
    cases = cases[: args.first or None]
    on_gpu = args.device.startswith("cuda")
    if args.apart is None:
        args.apart = on_gpu
    # The parent of such processes asks nothing of the device.
    if on_gpu and not args.dummy and not torch.cuda.is_available():
        parser.error(
            f"--device {args.device}: PyTorch {torch.__version__} finds no CUDA device; see --dummy, --check-only"
        )
    if args.device == "cpu" and not (args.dummy or args.check_only or args.once):
        parser.error("--device cpu: only with --check-only or --dummy; layer_cpu.py times the layer on the CPU")
    return args, cases


def all_cases() -> list[Case]:
    """Every size with its routing, those that say most first."""
    models = [(MODELS[i], "uniform", "training") for i in ORDER]
    skewed = [(shape, "zipf", "training") for shape in MODELS if shape.name in SKEWED]
    decode = [(shape, "uniform", "decode") for shape in DECODE]
    return [*models[:4], *decode, *models[4:], *skewed]


def base(args: argparse.Namespace, env: dict[str, Any]) -> Path:
    """The three files' common stem."""
    name = args.name or stem("layer_gpu", env)
    path: Path = args.out / (f"DUMMY_{name}" if env.get("dummy") else name)  # .gitignore knows that prefix
    return path


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """The command line for the JSON."""
    return {key: value for key, value in vars(args).items() if key not in ("deadline", "case", "into", "ceilings")}


def resumed(args: argparse.Namespace, env: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What an earlier run with the same name left, without what it did not come to."""
    path = base(args, env).with_suffix(".json")
    if not path.exists():
        return env, []
    document = load(path)
    return document["environment"], [entry for entry in document["cases"] if not {"left_out", "under_way"} & set(entry)]


def write(args: argparse.Namespace, env: dict[str, Any], results: list[dict[str, Any]]) -> str:
    """All files, each in one piece; returns the text."""
    path = base(args, env)
    text = report(results, env, path.name)
    if "json" in args.files:
        write_json(path.with_name(path.name + ".json"), env, settings(args), results)
    if "md" in args.files:
        with replaced(path.with_name(path.name + ".md")) as partial:
            partial.write_text(text)
    if "png" in args.files:
        with replaced(path.with_name(path.name + ".png")) as partial:
            plot(results, env, partial)
    return text


def finish(args: argparse.Namespace, env: dict[str, Any], results: list[dict[str, Any]]) -> int:
    """Write and print everything."""
    print(write(args, env, results))
    print(f"written: {base(args, env)}, {', '.join(args.files)}")
    labels = failed(results)
    if labels and not args.dummy:
        complain(labels)
        return 1
    return 0


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
