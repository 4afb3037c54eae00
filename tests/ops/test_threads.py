"""Same input, same shapes, same machine: the same bits for any number of threads, on any code path of libraries."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import thread_cases
import torch
from patience import PATIENCE

import dmoe.ops._library as library

pytestmark = pytest.mark.skipif(not library.compiled, reason="promised of the compiled library; csrc/ is not built")

# What MKL asks about the processor: on one of another maker it takes a path of its own, that cuts fewer products.
_INTEL = "int mkl_serv_intel_cpu_true(void) { return 1; }"


@pytest.mark.parametrize("dtype", thread_cases.DTYPES, ids=str)
@pytest.mark.parametrize("name", thread_cases.CASES)
def test_bits_do_not_depend_on_the_number_of_threads(name, dtype):
    assert thread_cases.changes(name, dtype) == []


@pytest.fixture(scope="module")
def intel(tmp_path_factory):
    """Environment under which MKL believes that it runs on an Intel processor."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or platform.machine() != "x86_64":
        pytest.skip("needs a C compiler, and MKL")
    folder = tmp_path_factory.mktemp("intel")
    (folder / "intel.c").write_text(_INTEL)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", folder / "intel.so", folder / "intel.c"], check=True)
    return {"LD_PRELOAD": str(folder / "intel.so")}


PATHS = {
    "as it comes": ({}, ("float32", "float64")),
    "avx2": (
        {"MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
        ("float32", "bfloat16"),
    ),
    "sse": (
        {"MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default"},
        ("float32",),
    ),
}


@pytest.mark.parametrize("path", PATHS)
def test_nor_on_the_code_paths_of_libraries(path, intel):
    """Each path keeps the promise; two paths differ from each other, as they should."""
    settings, dtypes = PATHS[path]
    program = Path(thread_cases.__file__)
    # Threads that wait asleep: there are more of them than cores.
    path = os.pathsep.join([str(program.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | intel | settings | {"PYTHONPATH": path, "OMP_WAIT_POLICY": "passive"}
    run = subprocess.run(
        [sys.executable, program, *dtypes], env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert run.returncode == 0, run.stderr
    changed = {name: found for name, found in json.loads(run.stdout).items() if found}
    assert changed == {}


def test_the_comparison_sees_a_sum_that_threads_share(monkeypatch):
    """PyTorch's own sum to one number changes; this machine shows it, so what is equal above is equal on purpose."""
    monkeypatch.setitem(thread_cases.CASES, "own", lambda dtype: [thread_cases.random(300_000, dtype=dtype).sum()])
    assert thread_cases.changes("own", torch.float32)
