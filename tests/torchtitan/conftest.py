"""One run of torchtitan's processes for all tests here: torchtitan lies in a folder that is on the path of no other."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchtitan_paths as paths
from patience import PATIENCE


class Jobs:
    """What the jobs of torchtitan_jobs.py returned."""

    def __init__(self, folder):
        self.folder = folder

    def __getitem__(self, name):
        failed = self.folder / f"{name}.error.txt"
        assert not failed.exists(), failed.read_text()
        assert (self.folder / f"{name}.pt").exists(), f"{name}: not done, as a job before it has failed"
        return torch.load(self.folder / f"{name}.pt", weights_only=False)


@pytest.fixture(scope="session")
def titan(tmp_path_factory):
    """The results of all jobs, by name."""
    if not paths.INSTALLED.is_dir():
        pytest.skip(paths.MISSING)
    folder = tmp_path_factory.mktemp("torchtitan")
    script = Path(paths.__file__).with_name("torchtitan_ranks.py")
    done = subprocess.run(
        [sys.executable, script, folder],
        env=os.environ | {"PYTHONPATH": paths.PYTHONPATH, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    return Jobs(folder)
