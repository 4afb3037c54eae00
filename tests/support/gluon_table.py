"""What the compiler makes of the Gluon kernels for Hopper, and how many instructions a step of their loops takes.

``python tests/support/gluon_table.py`` prints it for the Triton at hand as JSON, and with ``--changed`` compiles only
what has changed (:mod:`front_end`); ``--write`` renews that Triton's part of the committed table, ``gluon_table.json``
beside this. Another Triton's: ``PYTHONPATH=/where/it/is``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

import front_end
import kernel_table
import machine_code

TABLE = Path(__file__).with_suffix(".json")
LINE = re.compile(r"\s*/\*[0-9a-f]{4,}\*/|\.L_x_\d+:")  # an instruction, or a label


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
    lines = [line for line in machine_code.disassembled(compiled.asm["cubin"]).splitlines() if LINE.match(line)]
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


def table(known: Sequence[dict] = ()) -> dict:
    """Every case of :mod:`gluon_cases`: {case: rows}; ``known`` ones are taken where the source is the same."""
    import gluon_cases

    os.environ["DMOE_GLUON"] = "1"
    with front_end.instead_of_compiling(known):
        return kernel_table.rows_of(gluon_cases.CASES, 90, row, begins="gluon_")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"renew this Triton's part of {TABLE.name}")
    parser.add_argument("--changed", action="store_true", help="compile what has changed, and a part of the rest")
    options = parser.parse_args()
    import triton

    recorded = json.loads(TABLE.read_text())
    known = recorded.get(triton.__version__, {}) if options.changed else {}
    made = table(front_end.unchanged(known))
    if not options.write:
        print(json.dumps(made, indent=1))
        return
    recorded[triton.__version__] = made
    TABLE.write_text(json.dumps(dict(sorted(recorded.items())), indent=1) + "\n")


if __name__ == "__main__":
    main()
