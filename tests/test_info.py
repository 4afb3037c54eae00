"""dmoe.info(): facts that are checked against their sources, and commands for what is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dmoe
from dmoe.info import report
from dmoe.ops import _library

info_module = sys.modules["dmoe.info"]  # the name dmoe.info is the function


# About the machine and the library, and no operation on tensors.
QUESTIONS = {"cuda_archs", "product_choice", "set_product_cache", "multiply_add_limit"}


def test_every_operation_is_reported_with_who_serves_it():
    served = report()["operations"]
    names = [name.removeprefix("dmoe::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("dmoe::")]
    dumps = {name: torch._C._dispatch_dump(f"dmoe::{name}") for name in names if name not in QUESTIONS}
    defined = {name: dump for name, dump in dumps.items() if "schema: dmoe::" in dump}
    assert set(served) == set(defined)
    for name, dump in defined.items():  # PyTorch's own record of where each kernel was registered
        where = {line.split(":")[0]: line for line in dump.splitlines() if "registered at" in line}
        assert (served[name]["CPU"] == "C++") == ("csrc/" in where["CPU"]), dump
        compiled = "csrc/" in where["CUDA"] or name in _library.probation  # before which stands what certifies them
        assert (served[name]["CUDA"] == "CUDA C++") == compiled, dump
    assert served["permute"]["CPU"] == ("C++" if _library.compiled else "reference")


def test_versions_and_the_library():
    facts = report()
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["versions"]["dmoe"] == dmoe.__version__
    assert facts["versions"]["python"] == sys.version.split()[0]
    assert facts["library"]["built"] == (Path(dmoe.__file__).parent / "_C.so").exists()
    assert all(arch.startswith("sm_") for arch in facts["cuda_archs"])
    assert len(facts["gpus"]) == torch.cuda.device_count()


@pytest.fixture
def bare(monkeypatch):
    """A machine with nothing but Python and torch."""
    monkeypatch.setattr(_library, "compiled", False)
    monkeypatch.setattr(_library, "missing_reason", "csrc/ was not built when dmoe was installed")
    monkeypatch.setattr(info_module, "_version", lambda distribution: None)
    monkeypatch.setattr(info_module.shutil, "which", lambda name: None)
    monkeypatch.setattr(info_module, "_gpus", list)


def test_all_that_is_missing_comes_with_a_command(bare, capsys):
    assert dmoe.info() is None
    text = capsys.readouterr().out
    assert "csrc/ was not built" in text
    assert "none that torch can use" in text
    missing = {item.what: item.command for item in report()["missing"]}
    assert set(missing) == {"the compiled operations", "the compiled operations for CUDA", "triton"}
    pip = f"{sys.executable} -m pip install"
    assert missing["triton"] == f"{pip} triton"
    assert missing["the compiled operations"].startswith("apt-get install -y g++ && DMOE_BUILD=required " + pip)
    assert "nvidia-cuda-toolkit && DMOE_CUDA=required" in missing["the compiled operations for CUDA"]
    assert all(f"\n  {command}\n" in text for command in missing.values())
    for command in missing.values():  # the paths in them may hold any word
        text = text.replace(command, "")
    assert "megatron" not in text


def test_a_complete_machine_misses_nothing(monkeypatch, capsys):
    monkeypatch.setattr(_library, "compiled", True)
    monkeypatch.setattr(_library, "cuda_archs", lambda: ("sm_80", "sm_90"))
    monkeypatch.setattr(info_module, "_version", lambda distribution: "1.2")
    gpu = {"name": "H200", "arch": "sm_90", "memory_gib": 139.8}
    monkeypatch.setattr(info_module, "_gpus", lambda: [gpu])
    dmoe.info()
    text = capsys.readouterr().out
    assert "C++ for sm_80, sm_90" in text
    assert "H200 (sm_90, 140 GiB)" in text
    assert "triton 1.2, stk 1.2, megatron-core 1.2" in text
    assert text.endswith("nothing is missing\n")
    assert max(map(len, text.splitlines())) <= 110

    gpu["arch"] = "sm_75"
    dmoe.info()
    assert "DMOE_CUDA_ARCHS=75" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("archs", "gpu", "runs"),
    [
        (["sm_80", "sm_90", "sm_100"], "sm_80", True),
        (["sm_80", "sm_90", "sm_100"], "sm_89", True),
        (["sm_80", "sm_90", "sm_100"], "sm_103", True),
        (["sm_80", "sm_90", "sm_100"], "sm_120", True),  # the newest one's PTX
        (["sm_80", "sm_90", "sm_100"], "sm_75", False),
        (["sm_80", "sm_100"], "sm_90", False),
        (["sm_89"], "sm_80", False),
    ],
)
def test_which_gpus_the_compiled_kernels_run_on(archs, gpu, runs):
    assert info_module._runs_on(archs, gpu) == runs


def test_without_triton_library_and_gpu(tmp_path):
    shutil.copytree(Path(dmoe.__file__).parent, tmp_path / "dmoe", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    code = "import sys; sys.modules['triton'] = None; import dmoe; dmoe.info(); print(dmoe.__file__)"
    env = os.environ | {"PYTHONPATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert str(tmp_path) in done.stdout
    assert "CPU ops: reference" in done.stdout
    assert "CPU ops: C++" not in done.stdout
    assert "missing: the compiled operations. " in done.stdout
