"""A test that breaks the device takes no other test along; rehearsed without a GPU, by one that says so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from patience import PATIENCE

pytest.importorskip("xdist")

CONFTEST = """
import broken_device
from broken_device import pytest_runtest_makereport, pytest_runtest_protocol
broken_device.illegal = []
broken_device.is_broken = lambda: bool(broken_device.illegal)
"""
TESTS = """
import broken_device, pytest

@pytest.mark.gpu
def test_breaks():
    broken_device.illegal.append("access")
    assert False

@pytest.mark.gpu
def test_later():
    assert not broken_device.illegal

@pytest.mark.gpu
def test_last():
    assert not broken_device.illegal
"""


def run(folder, *flags):
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_fake.py").write_text(TESTS)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs a GPU\n")
    support = str(Path(__file__).resolve().parents[1] / "support")
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *flags, str(folder)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([support, str(folder)])},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def test_the_worker_is_replaced_and_the_other_tests_pass(tmp_path):
    done = run(tmp_path, "-n", "1")
    assert "2 passed" in done.stdout, done.stdout + done.stderr
    assert "node down" in done.stdout
    assert "FAILED test_fake.py::test_breaks" in done.stdout
    assert "FAILED test_fake.py::test_later" not in done.stdout


def test_without_workers_the_run_ends_and_says_why(tmp_path):
    done = run(tmp_path)
    assert done.returncode == 3, done.stdout
    assert "the CUDA device broke down" in done.stdout
