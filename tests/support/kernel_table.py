"""Compiles what the host code launches (:mod:`dmoe.kernels.offline`), and reads what the compiler made of it.

``python tests/support/kernel_table.py --arch 90`` prints the table of one architecture as JSON; with ``--changed``,
kernels whose source is what the committed one was made from keep their lines (:mod:`front_end`). ``--write`` renews
what the committed one, ``kernel_table.json`` beside it, says of the running Triton, for all. One process compiles for
one architecture only: a kernel that uses Hopper's instructions can take the whole process down when compiled for
another.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import front_end
import machine_code

ROOT = Path(__file__).resolve().parents[2]
TABLE = Path(__file__).with_suffix(".json")
ARCHITECTURES = (80, 90, 100)
# What tells in the PTX how a kernel moves and multiplies.
FEATURES = {
    "wgmma": "wgmma.mma_async",
    "tcgen05": "tcgen05.mma",
    "mma": "mma.sync",
    "tma": "cp.async.bulk.tensor",
    "cp.async": "cp.async.cg",
}


@contextlib.contextmanager
def counting():
    """Inside, launches are only counted: yields the list of kernel names. Needs no compiler and no GPU."""
    from dmoe.kernels.offline import instead_of_launching

    names = []

    def count_instead(kernel, grid, *arguments, **options):
        if all(grid):
            names.append(kernel.__name__)

    with instead_of_launching(count_instead):
        yield names


def resources(compiled, arch: int) -> dict:
    """Registers and bytes of local memory (spills) per thread, dynamic shared memory per program; ``ctas``, how many
    programs a multiprocessor holds; ``steps``, instructions a step of the main loop (see
    :func:`machine_code.main_loop`), if it has one; and features.
    """
    told = machine_code.told_about(compiled.asm["cubin"], "cuobjdump", "--dump-resource-usage")
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", told)}
    step = machine_code.main_loop(machine_code.disassembled(compiled.asm["cubin"]))
    ptx, metadata = compiled.asm["ptx"], compiled.metadata
    uses = [name for name, mark in FEATURES.items() if mark in ptx]
    return {
        "registers": usage["REG"],
        "spilled": usage["STACK"] + usage["LOCAL"],
        "shared": metadata.shared,
        "warps": metadata.num_warps,
        "ctas": machine_code.side_by_side(
            arch, usage["REG"], metadata.num_warps, metadata.shared, getattr(metadata, "tmem_size", 0) or 0
        ),
        "steps": step and len(step),
        "uses": sorted([*uses, "one by one"] if step and machine_code.one_by_one(step) else uses),
    }


def table_of(arch: int, only: str = "", known: Sequence[dict] = ()) -> dict:
    """Every case of :mod:`kernel_cases`: {case: [{"kernel": name, ...resources, "source": its digest}]}; ``known`` rows
    are taken as they are where the source is the same."""
    import kernel_cases

    with front_end.instead_of_compiling(known):
        cases = {name: run for name, run in kernel_cases.CASES.items() if only in name}
        return rows_of(cases, arch, lambda kernel, compiled: {"kernel": kernel, **resources(compiled, arch)})


def rows_of(cases: dict, arch: int, row: Callable[[str, Any], dict], begins: str = "") -> dict:
    """{case: the row of every kernel that it launches, whose name begins so}; what is compiled alike has one row."""
    from dmoe.kernels.offline import compiling

    table, seen = {}, {}
    for name, run in cases.items():
        with compiling(arch) as launched:
            run()
        table[name] = []
        for kernel, compiled in launched:
            if not kernel.startswith(begins):
                continue
            if isinstance(compiled, front_end.Known):
                table[name].append(compiled.row)
                continue
            if compiled.source not in seen:
                seen[compiled.source] = {**row(kernel, compiled), "source": compiled.source}
            table[name].append(seen[compiled.source])
    return table


def compiling_process(*arguments: str) -> str:
    """What Python, given these arguments, prints in a process that has Triton's compiler and not its interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = [str(ROOT), str(Path(__file__).parent), environment.get("PYTHONPATH")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def recorded() -> dict:
    """The committed table: {version of Triton: {architecture: {case: rows}}}."""
    return json.loads(TABLE.read_text())


def as_text(table: dict) -> str:
    """As it is committed: a line for each kernel, so that a diff reads well."""
    text = json.dumps(table, indent=1, sort_keys=False)
    return re.sub(r"\{\s*(\"kernel\"[^{}]*?)\s*\}", lambda row: "{" + re.sub(r"\s+", " ", row[1]) + "}", text) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", type=int, choices=ARCHITECTURES)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--changed", action="store_true", help="compile what has changed, and a part of the rest")
    parser.add_argument("--write", action="store_true", help=f"renew {TABLE.name}")
    options = parser.parse_args()
    import triton

    if not options.write:
        arch = options.arch or 90
        known = recorded().get(triton.__version__, {}).get(f"sm_{arch}", {}) if options.changed else {}
        print(json.dumps(table_of(arch, options.only, front_end.unchanged(known)), indent=1))
        return

    def one(arch):
        command = [sys.executable, __file__, "--arch", str(arch), *["--changed"] * options.changed]
        return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT).stdout)

    table = {f"sm_{arch}": one(arch) for arch in ARCHITECTURES}
    TABLE.write_text(as_text({**recorded(), triton.__version__: table}))


if __name__ == "__main__":
    main()
