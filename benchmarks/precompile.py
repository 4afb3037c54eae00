"""Compiles every kernel that a GPU run will launch into one Triton cache, with all cores, and touches no GPU.

    TRITON_CACHE_DIR=cache python benchmarks/precompile.py --set smoke --set bench --first 4 [--arch 90] [--jobs 16]

The programs of the run itself are run on tensors of the ``meta`` device (see ``dmoe.ops.offline``), so what is compiled
is what they launch, with the same specialisations. Each process runs all of them and compiles what no other has
claimed. It works without a GPU, so a cache can be made elsewhere and brought along; Triton finds a kernel in it again
when version, build and Python of Triton are the same. ``--check`` fails when something was not in the cache.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import sanitize
import torch
from layer_gpu import all_cases
from parts.gpu_case import Case
from parts.gpu_contestants import CONTESTANTS, AbsentError
from parts.gpu_problem import ShapesAlone
from parts.gpu_shapes import TINY

from dmoe.ops.offline import counting_compiles, launch_shapes, offline

SETS = ("smoke", "bench", "tables")
OURS = ("dmoe", "dmoe layer", "dmoe 2026-11 shapes")  # whoever launches kernels of dmoe
Program = tuple[str, Callable[[], object]]


def of_smoke(args: argparse.Namespace) -> Iterator[Program]:
    """The cases of sanitize.py."""
    for name, run in sanitize.CASES.items():
        yield f"smoke: {name}", lambda run=run: run(torch.device("meta"))  # type: ignore[misc]


def chosen(args: argparse.Namespace) -> list[Case]:
    """The sizes, as layer_gpu.py chooses them."""
    wanted = [part.strip() for part in args.shapes.split(",") if part.strip()]
    cases = [case for case in all_cases() if not wanted or any(part in case[0].label for part in wanted)]
    if "tiny" in wanted:
        cases.append((TINY[0], "uniform", "training"))
    return cases[: args.first or None]


def of_bench(args: argparse.Namespace) -> Iterator[Program]:
    """A checked and timed size of layer_gpu.py."""

    def run(case: Case, name: str) -> None:
        contestant = CONTESTANTS[name](ShapesAlone(case[0]))
        contestant.results()
        if case[2] == "decode":
            with torch.no_grad(), contestant.around():
                contestant.forward()

    for case in chosen(args):
        for name in OURS:
            yield f"bench: {name}, {case[0].label}", lambda case=case, name=name: run(case, name)  # type: ignore[misc]


def of_tables(args: argparse.Namespace) -> Iterator[Program]:
    """What ``dmoe.tune`` measures: each size under each table that ``dmoe.tune --list --tables`` wrote."""

    def run(case: Case, table: dict[str, Any]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "table.json"
            path.write_text(json.dumps(table))
            with launch_shapes(path):
                CONTESTANTS["dmoe"](ShapesAlone(case[0])).results()

    for case in chosen(args):
        for number, table in enumerate(json.loads(args.tables.read_text())):
            yield f"table {number}, {next(iter(table))}", lambda case=case, table=table: run(case, table)  # type: ignore[misc]


def worker(args: argparse.Namespace) -> dict[str, Any]:
    """Run every program, compiling what nobody else has claimed; returns the counts."""

    def claim(key: str) -> bool:
        try:
            os.close(os.open(args.claims / hashlib.sha256(key.encode()).hexdigest(), os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True

    errors: dict[str, str] = {}
    start = time.monotonic()
    with counting_compiles() as told, offline(args.arch, claim) as launched:
        sets = {"smoke": of_smoke, "bench": of_bench, "tables": of_tables}
        for name, run in (program for part in args.set for program in sets[part](args)):
            try:
                run()
            except AbsentError:
                pass
            except Exception as error:
                errors[name] = f"{type(error).__name__}: {str(error)[:300]}"
                if not name.startswith("table"):  # such a launch shape fails in the measurement too, and is dropped
                    traceback.print_exc()
    ours = {compiled.hash: compiled for _, compiled in launched if compiled is not None}
    launchers = sum(map(launcher, ours.values()))
    return {
        "fresh": len(told.fresh),
        "found": len(told.found),
        "launches": len(launched),
        "launchers": launchers,
        "errors": errors,
        "names": told.fresh,
        "seconds": round(time.monotonic() - start, 1),
    }


def launcher(compiled: Any) -> bool:
    """Build what starts a kernel, too, where Triton compiles C for that (3.6) and the driver's library is there."""
    try:
        from triton.backends.nvidia import driver

        if not hasattr(driver, "make_launcher"):
            return False
        driver.CudaLauncher(compiled.src, compiled.metadata)
    except Exception:  # without the library, or a compiler: the run builds it when it comes to it
        return False
    return True


def spread(args: argparse.Namespace, arguments: Sequence[str]) -> list[dict[str, Any]]:
    """Start the processes, and wait for them."""
    # Nothing here is for the GPU's own process to see, and inductor and others would look for it.
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory(prefix="dmoe-claims-") as folder:
        claims = Path(folder) / "claims"
        claims.mkdir()
        commands = [
            [sys.executable, __file__, *arguments, "--claims", str(claims), "--told", str(Path(folder) / f"{i}.json")]
            for i in range(args.jobs)
        ]
        processes = [subprocess.Popen(command, env=environment) for command in commands]
        for process in processes:
            process.wait()
        told = [Path(folder) / f"{i}.json" for i in range(args.jobs)]
        return [json.loads(path.read_text()) for path in told if path.exists()]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", action="append", choices=SETS, help="what to compile for; may be repeated")
    parser.add_argument("--shapes", default="", help="sizes of bench, as for layer_gpu.py; and 'tiny'")
    parser.add_argument("--first", type=int, default=0, help="only so many sizes; 0 takes all")
    parser.add_argument("--dtypes", default="", help="of smoke, as for sanitize.py")
    parser.add_argument("--tables", type=Path, help="of set tables: a JSON list, by dmoe.tune")
    parser.add_argument("--arch", type=int, default=90, help="compute capability, 90 for Hopper")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--check", action="store_true", help="fail when anything was not in the cache")
    parser.add_argument("--json", type=Path, help="also write the counts here")
    parser.add_argument("--claims", type=Path, help=argparse.SUPPRESS)  # of a process: who compiles what
    parser.add_argument("--told", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    args.set = args.set or ["smoke", "bench"]
    if args.jobs < 1:
        parser.error(f"--jobs: expected at least 1, got {args.jobs}")
    if "tables" in args.set and args.tables is None:
        parser.error("--set tables: expected --tables FILE")
    sanitize.choose_dtypes(parser, args.dtypes)
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile; 1 when a program failed, or with ``--check`` when something had to be compiled."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    args = parse(arguments)
    if args.claims:
        args.told.write_text(json.dumps(worker(args)))
        return 0
    start = time.monotonic()
    told = spread(args, arguments)
    total: dict[str, Any] = {key: sum(one[key] for one in told) for key in ("fresh", "found", "launchers")}
    total |= {"launches": max((one["launches"] for one in told), default=0), "jobs": args.jobs, "sets": args.set}
    total["seconds"] = round(time.monotonic() - start, 1)
    total["errors"] = {name: error for one in told for name, error in one["errors"].items()}
    if args.json:
        args.json.write_text(json.dumps(total, indent=1) + "\n")
    print(
        f"{', '.join(args.set)}: {total['launches']} launches; {total['fresh']} kernels compiled, "
        f"{total['found']} found, {total['launchers']} launchers, {total['seconds']} s with {args.jobs} processes"
    )
    if args.check:
        print("compiled:", sorted(name for one in told for name in one["names"]))
    for name, error in total["errors"].items():
        print(f"FAILED {name}: {error}")
    serious = [name for name in total["errors"] if not name.startswith("table")]
    return 1 if serious or len(told) < args.jobs or (args.check and total["fresh"]) else 0


if __name__ == "__main__":
    sys.exit(main())
