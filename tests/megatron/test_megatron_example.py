"""``examples/megatron/pretrain_gpt.py`` as a user runs it: to the end, on from a checkpoint, on two ranks."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from patience import PATIENCE

pytest.importorskip("megatron.core", reason="megatron-core is not installed")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("megatron example"),  # its run is made once
    pytest.mark.skipif("MEGATRON_WHEEL" in os.environ, reason="the example runs on the installed megatron-core"),
]

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "megatron" / "pretrain_gpt.py"
SMALL = ["--num-layers", "1", "--hidden-size", "32", "--seq-length", "32", "--global-batch-size", "16"]
SMALL += ["--micro-batch-size", "4", "--data-bytes", "400000", "--eval-bytes", "4096", "--eval-interval", "4"]
# Without a balance loss, which looks at a micro-batch, a batch is the same however ranks share it.
SMALL += ["--moe-num-experts", "4", "--moe-top-k", "2", "--moe-loss-weight", "0"]


def losses(*words, ranks=1):
    """``{step: (training loss, held-out loss)}`` of a run that has to succeed."""
    program = [sys.executable]
    program += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    path = os.pathsep.join(filter(None, [str(SCRIPT.parents[2]), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [*program, str(SCRIPT), *SMALL, *words],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = re.findall(r"step +(\d+)  train ([\d.]+)  held-out ([\d.]+)", done.stdout + done.stderr)
    return {int(step): (float(train), float(held_out)) for step, train, held_out in found}


def _packages(path, seen):
    """Top-level names that a script and the modules beside it import, but for the standard library's."""
    seen.add(path)
    for node in ast.walk(ast.parse(path.read_text())):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module] if isinstance(node, ast.ImportFrom) else []
        for module in modules:
            beside = [folder / (module.replace(".", "/") + ".py") for folder in (path.parent, SCRIPT.parents[1])]
            here = next((file for file in beside if file.exists()), None)
            if here is None:
                yield module.partition(".")[0]
            elif here not in seen:
                yield from _packages(here, seen)


def test_what_the_readme_installs_is_what_the_example_imports():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((SCRIPT.parents[2] / "pyproject.toml").read_text())["project"]
    section = (SCRIPT.parents[2] / "README.md").read_text().split("## In Megatron-Core")[1]
    extras = re.search(r"pip install '\.\[(.*?)\]'", section)[1].split(",")
    needs = [*project["dependencies"], *(need for extra in extras for need in project["optional-dependencies"][extra])]
    installed = {re.match(r"[\w-]+", need)[0].removesuffix("-core") for need in needs} | {"dmoe", "numpy"}  # torch's
    imported = set(_packages(SCRIPT, set())) - sys.stdlib_module_names
    assert imported <= installed
    assert {"tqdm", "megatron"} <= imported


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run's losses, and its checkpoints."""
    folder = tmp_path_factory.mktemp("gpt")
    return losses("--save", str(folder), "--train-iters", "8"), folder


def test_it_learns_and_goes_on_from_a_checkpoint_as_if_never_stopped(run):
    found, folder = run
    assert list(found) == [4, 8]
    assert found[8][1] < found[4][1] < 5.6, "log(256) is 5.55"
    assert (folder / "latest.txt").read_text() == "step_0000008"
    (folder / "latest.txt").write_text("step_0000004")
    assert losses("--save", str(folder), "--train-iters", "8") == {8: found[8]}


def test_two_ranks_with_half_the_experts_each_learn_the_same_and_their_checkpoint_loads_on_one(run, tmp_path):
    alone = run[0]
    words = ["--expert-model-parallel-size", "2", "--train-iters", "8", "--eval-interval", "8", "--save", str(tmp_path)]
    apart = losses(*words, ranks=2)
    assert list(apart) == [8]
    assert apart[8] == pytest.approx(alone[8], abs=2e-4)
    further = losses("--train-iters", "9", "--save", str(tmp_path), "--no-load-optim")
    assert list(further) == [9]
    assert further[9][1] < alone[4][1], "what both ranks learned is there"
