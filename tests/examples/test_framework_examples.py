"""Examples in the loops of Lightning, Accelerate and Transformers: on two ranks, and further on one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from patience import PATIENCE
from training_cases import on_ranks

pytestmark = pytest.mark.xdist_group("pair")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def example(pair):
    """An example on one or two ranks: what its ``main`` gives on each."""
    run = on_ranks(pair, "rank_jobs_examples")
    return lambda ranks, name, *arguments: run(ranks, "run", name, arguments)


def test_lightning(example, tmp_path):
    first, further = str(tmp_path / "first"), str(tmp_path / "further")
    name = "train_lightning.py"
    assert example(2, name, "--ep", "2", "--steps", "10", "--out", first) == [10, 10]
    assert example(2, name, "--fsdp", "--steps", "4", "--out", str(tmp_path / "fsdp")) == [4, 4]
    resume = ("--resume", f"{first}/last.ckpt")
    assert example(1, name, "--devices", "1", "--steps", "14", "--out", further, *resume) == [14]
    assert any(file.name.startswith("events.out.tfevents") for file in Path(first).iterdir())


def test_transformers(example, tmp_path):
    first, name = str(tmp_path / "first"), "transformers/trainer_ep.py"
    assert example(2, name, "--ep", "2", "--steps", "20", "--out", first) == [20, 20]
    resume = ("--resume", f"{first}/checkpoint-20")
    assert example(1, name, "--steps", "22", "--out", str(tmp_path / "further"), *resume) == [22]
    lines = [json.loads(line) for line in (tmp_path / "first" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "step"] == [10, 20]


@pytest.mark.slow
def test_accelerate_launch(example, tmp_path):
    """The real launcher with two processes; then this one goes on from their state."""
    first, name = str(tmp_path / "first"), "train_accelerate.py"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command = [*launcher, str(ROOT / "examples" / name), "--ep", "2", "--steps", "60", "--out", first]
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    before, after = (float(each.split()[0]) for each in done.stdout.split("loss ")[1].split(", "))
    assert after < before
    (losses,) = example(1, name, "--steps", "10", "--out", str(tmp_path / "further"), "--resume", f"{first}/state")
    assert sum(losses) / 10 < before
