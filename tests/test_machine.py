"""What `.ci/run` says of the machine is there, and follows what libraries are told to be; no run sees another one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import machine


def test_every_fact_is_told_and_a_forced_instruction_set_is_seen():
    forced = {"ATEN_CPU_CAPABILITY": "default"}
    run = [sys.executable, machine.__file__]
    done = subprocess.run(run, env=os.environ | forced, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = {name: value.strip() for name, _, value in (line.partition(":") for line in done.stdout.splitlines())}
    (torch_says,) = (value for name, value in told.items() if name.startswith("torch "))
    assert torch_says.startswith("DEFAULT, ")
    assert "ATEN_CPU_CAPABILITY=default" in told["variables"]
    assert {"processor", "instructions", "system"} <= told.keys()
    assert all(told.values())


def test_a_system_without_proc_is_described_too(monkeypatch):
    read_text = Path.read_text

    def without_proc(path, *args, **options):
        if path.parts[:2] == ("/", "proc"):
            raise FileNotFoundError(path)
        return read_text(path, *args, **options)

    monkeypatch.setattr(Path, "read_text", without_proc)
    monkeypatch.setattr(machine, "libraries", dict)
    monkeypatch.delattr(os, "getloadavg", raising=False)
    told = machine.facts()
    assert told["processor"]
    assert told["instructions"] == "unknown"
    assert "load unknown" in told["system"]


def test_what_the_libraries_say_is_found(monkeypatch):
    said = (
        "MKL_VERBOSE oneMKL 2024.0 Update 2 Product build 20240605 for Intel(R) 64 architecture Intel(R) Advanced "
        "Vector Extensions 512 (Intel(R) AVX-512) enabled processors, Lnx 2.60GHz lp64 gnu_thread\n"
        "MKL_VERBOSE SGEMM(N,N,64,64,64,0x7ffd8a2b2d30) 31.42ms CNR:OFF\n"
        "onednn_verbose,v1,info,oneDNN v3.12.0 (commit 80afa71049cd69a3df32adcccb623b12cd7baa22)\n"
        "onednn_verbose,v1,info,cpu,isa:Intel AVX-512 with Intel DL Boost\n"
    )
    monkeypatch.setattr(subprocess, "run", lambda run, **_: subprocess.CompletedProcess(run, 0, stdout=said, stderr=""))
    told = machine.libraries()
    assert told["oneDNN"] == "Intel AVX-512 with Intel DL Boost"
    assert told["MKL"].startswith("oneMKL 2024.0")
    assert told["MKL"].endswith("(Intel(R) AVX-512) enabled processors")
    monkeypatch.setattr(subprocess, "run", lambda run, **_: subprocess.CompletedProcess(run, 0, stdout="", stderr=""))
    assert machine.libraries() == {}


def test_graphs_that_another_checkout_compiled_are_not_found():
    """inductor's key has the names and arguments of our operations, and nothing of what they return."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir, default_cache_dir

    assert cache_dir() != default_cache_dir()
