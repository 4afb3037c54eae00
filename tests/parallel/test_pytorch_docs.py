"""docs/pytorch.md runs on one rank, and the examples of plain PyTorch on several: in processes of their own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import rank_jobs_whole_model as jobs
from doc_blocks import ROOT
from patience import PATIENCE

import dmoe

PAGE = ROOT / "docs" / "pytorch.md"


def run(*command, **environment):
    """What a command prints."""
    paths = [str(ROOT), str(ROOT / "tests" / "support"), os.environ.get("PYTHONPATH", "")]
    ended = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def test_the_page_runs():
    run("-c", "from doc_blocks import run_page; page = run_page('pytorch.md'); assert len(page['losses']) == 4")


def test_links_and_commands_of_the_page_lead_somewhere():
    text = PAGE.read_text()
    for script in re.findall(r"examples/\S+\.py", text):
        assert (ROOT / script).exists()
    for name in re.findall(r"`dmoe\.([\w.]+)`", text):
        found = dmoe
        for part in name.split("."):
            found = getattr(found, part)


def test_the_example_goes_on_on_another_mesh(ranks, tmp_path):
    told = []
    for steps, options in ((20, ("--ep", "2")), (30, ("--data", "ddp"))):
        told += ranks.run(jobs.example, "train_mesh", ["--steps", str(steps), "--out", str(tmp_path), *options])[:1]
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", "".join(told))]
    assert len(losses) == 3
    assert losses[0] > losses[1]
    assert "step 30" in told[1]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "step" in line] == [0, 10, 20]


def test_the_example_of_a_pipeline_learns(ranks):
    told = "".join(ranks.run(jobs.example, "train_pipeline", ["--ep", "2", "--steps", "20"]))
    first, last = (float(loss) for loss in re.findall(r"loss ([\d.]+)", told))
    assert last < first
