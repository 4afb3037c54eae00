"""What the compiler makes of the Gluon kernels for Hopper, and how many instructions a step of their loops takes.

``python tests/support/gluon_table.py`` prints it for the Triton at hand as JSON; ``--write`` renews that Triton's part
of the committed table, ``gluon_table.json`` beside this. Another Triton's: ``PYTHONPATH=/where/it/is``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import tempfile
from pathlib import Path

import kernel_table

TABLE = Path(__file__).with_suffix(".json")


def machine_code(compiled) -> list[str]:
    """Instructions and labels, a line each."""
    from triton.backends import nvidia

    nvdisasm = Path(nvidia.__file__).parent / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        told = subprocess.run([nvdisasm, "-c", cubin.name], capture_output=True, text=True, check=True).stdout
    return [line for line in told.splitlines() if re.match(r"\s*/\*[0-9a-f]{4,}\*/|\.L_x_\d+:", line)]


def loops(lines: list[str]) -> list[tuple[int, int]]:
    """First and last line of what a branch back encloses, the shortest first; without the retries of waiting."""
    labels, found = {}, []
    for number, line in enumerate(lines):
        if line.startswith("."):
            labels[line.strip()[:-1]] = number
        elif branch := re.search(r"BRA `\((\.L_x_\d+)\)", line):
            first = labels.get(branch[1])
            if first is not None and not any("PHASECHK" in one for one in lines[max(number - 2, 0) : number]):
                found.append((first, number))
    return sorted(found, key=lambda pair: pair[1] - pair[0])


def per_step(lines: list[str], mark: str, step: str) -> int:
    """Instructions of the innermost loop around a mark for each step in it (unrolled, there are several); the most."""
    most, every = 0, loops(lines)
    for number, line in enumerate(lines):
        if mark in line:
            around = next(((a, b) for a, b in every if a <= number <= b), None)
            if around is not None:
                body = lines[around[0] : around[1] + 1]
                steps = sum(step in one for one in body)
                most = max(most, sum(not one.startswith(".") for one in body) // max(steps, 1))
    return most


def row(kernel: str, compiled) -> dict:
    """One kernel's line of the table."""
    lines = machine_code(compiled)
    groups = sorted(int(n) for n in re.findall(r"setmaxnreg\.\w+\.sync\.aligned\.u32 \s*(\d+)", compiled.asm["ptx"]))
    used = kernel_table.resources(compiled, 90)
    del used["steps"]  # there are two loops: see below
    copy = "UTMALDG" if "tma" in used["uses"] else "LDGSTS.E"
    return {
        "kernel": kernel,
        **used,
        "setmaxnreg": sorted(set(groups)),
        "consumer step": per_step(lines, "HGMMA", "gsb0, 0x1 "),
        "producer step": per_step(lines, copy, "PHASECHK"),
        "instructions": sum(not line.startswith(".") for line in lines),
    }


def table() -> dict:
    """Every case of :mod:`gluon_cases`: {case: rows}."""
    import gluon_cases

    from dmoe.kernels.offline import compiling

    os.environ["DMOE_GLUON"] = "1"
    result, seen = {}, {}
    for name, run in gluon_cases.CASES.items():
        with compiling(90) as launched:
            run()
        rows = []
        for kernel, compiled in launched:
            if kernel.startswith("gluon_"):
                digest = hashlib.sha256(compiled.asm["cubin"]).hexdigest()
                if digest not in seen:
                    seen[digest] = {**row(kernel, compiled), "binary": len(seen)}
                rows.append(seen[digest])
        result[name] = rows
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"renew this Triton's part of {TABLE.name}")
    options = parser.parse_args()
    made = table()
    if not options.write:
        print(json.dumps(made, indent=1))
        return
    import triton

    recorded = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    recorded[triton.__version__] = made
    TABLE.write_text(json.dumps(dict(sorted(recorded.items())), indent=1) + "\n")


if __name__ == "__main__":
    main()
