"""Says what the tests run on, since bits, tolerances and times depend on it: ``python tests/support/machine.py``.

The processor and those of its instruction sets that libraries choose their code by, what PyTorch, MKL and oneDNN made
of them, the variables that tell these to choose otherwise, cores and load.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from parts.harness import RESTRICTIONS, environment

VARIABLES = (*RESTRICTIONS, "MKL_CBWR", "OMP_NUM_THREADS")
# The libraries say which code they chose when they first compute something.
_COMPUTE = "import torch; a = torch.ones(1, 1, 8, 8); torch.mm(a[0, 0], a[0, 0]); torch.conv2d(a, a)"
_ASK = {"MKL_VERBOSE": "1", "ONEDNN_VERBOSE": "1"}
_TOLD = {"MKL": r"^MKL_VERBOSE (.* processors), ", "oneDNN": r"^onednn_verbose,.*info,cpu,isa:(.*)$"}


def libraries() -> dict[str, str]:
    """What MKL and oneDNN say of themselves; a library that PyTorch is built without says nothing."""
    run = [sys.executable, "-c", _COMPUTE]
    said = subprocess.run(run, env=os.environ | _ASK, capture_output=True, text=True, check=False).stdout
    found = {name: re.search(pattern, said, re.MULTILINE) for name, pattern in _TOLD.items()}
    return {name: match.group(1).strip() for name, match in found.items() if match}


def facts() -> dict[str, str]:
    """Line by line what :func:`main` prints."""
    known = environment(torch.get_num_threads())
    load = [f"{value:.1f}" for value in os.getloadavg()] if hasattr(os, "getloadavg") else ["unknown"]
    changed = [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    return {
        "processor": f"{known['hardware']} {known['family']}".strip(),
        "instructions": " ".join(known["instructions"]) or "unknown",
        "system": f"{known['system']}, {known['cores']} cores, {known['memory_gib']} GiB, load {' '.join(load)}",
        f"torch {torch.__version__}": f"{torch.backends.cpu.get_cpu_capability()}, {known['threads']} threads",
        **libraries(),
        "variables": " ".join(changed) or "none",
    }


def main() -> None:
    for name, value in facts().items():
        print(f"{name + ':':<24}{value}")


if __name__ == "__main__":
    main()
