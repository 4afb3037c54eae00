"""DeepSpeed's engine with dmoe's layers equals plain PyTorch on the same batch of all ranks: 1, 2 and 4 of them."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import deepspeed_cases as cases
import pytest
import torch
from patience import PATIENCE

import dmoe
from dmoe.checkpoint.__main__ import main

INSTALLED = Path(sys.prefix) / "deepspeed"  # `make .venv/deepspeed`
SUPPORT = Path(cases.__file__).parent
RUNS = [(world, name) for world, of_world in cases.CASES.items() for name in of_world]
pytestmark = pytest.mark.xdist_group("deepspeed engine")


def start(world, *command):
    """Ranks that run a command, which have to end well; what the first one wrote."""
    path = os.pathsep.join([str(INSTALLED), str(SUPPORT), os.environ.get("PYTHONPATH", "")])
    ranks = [
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            env=os.environ
            | {"DS_ACCELERATOR": "cpu", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
            | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    told = [rank.communicate(timeout=PATIENCE)[0] for rank in ranks]
    assert all(rank.returncode == 0 for rank in ranks), told[0][-3000:]
    return told[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of all runs, and what each rank found, by the number of ranks."""
    if not INSTALLED.is_dir():
        pytest.skip("DeepSpeed is not installed: make .venv/deepspeed")
    out = tmp_path_factory.mktemp("deepspeed")
    for world in cases.CASES:
        start(world, SUPPORT / "deepspeed_trains.py", out)
    found = {world: [torch.load(out / f"{world}/rank{rank}.pt") for rank in range(world)] for world in cases.CASES}
    return out, found


@functools.cache
def plain(world, name):
    return cases.plain_loop(cases.CASES[world][name])


def whole(ranks, name, case):
    """The tensors of the model on all ranks, experts put together; what every rank has is alike on all of them."""
    ep = case.ep or len(ranks)
    found = {}
    for key, first in ranks[0][name]["tensors"].items():
        parts = [rank[name]["tensors"][key] for rank in ranks]
        shared = ep > 1 and ".experts." in key
        for other, part in enumerate(parts):
            assert torch.equal(part, parts[other % ep] if shared else first), (key, other)
        found[key] = torch.cat(parts[:ep]) if shared else first
    return found


@pytest.mark.parametrize(("world", "name"), RUNS, ids=[f"{world} ranks, {name}" for world, name in RUNS])
def test_losses_norms_and_parameters_equal_plain_pytorch(trained, world, name):
    case, ranks, expected = cases.CASES[world][name], trained[1][world], plain(world, name)
    found = whole(ranks, name, case)
    half = case.dtype != torch.float32
    began = cases.STEPS // 2 if case.load else 0
    if case.aux == "explicit":
        for rank in ranks:
            assert rank[name]["losses"] == pytest.approx(expected["losses"][began:], rel=0, abs=1e-5)
    told = [norm for norm in ranks[0][name]["norms"] if norm is not None]
    if case.clip or case.zero["stage"]:
        assert len(told) == cases.STEPS - began
    wanted = [norm for step, norm in enumerate(expected["norms"]) if step >= began]
    for step, (norm, right) in enumerate(zip(told, wanted, strict=True) if told else ()):
        if step != case.overflow:
            assert norm == pytest.approx(right, rel=1e-2 if half else 1e-5)
    states = expected["states"]
    assert found.keys() == states[-1].keys()
    moved = max(float((states[-1][key] - states[0][key]).abs().max()) for key in found)
    for key, tensor in found.items():
        error = float((tensor - states[-1][key]).abs().max())
        assert error <= (0.05 * moved if half else 1e-5), (key, error, moved)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_expert_that_overflows_on_one_rank_skips_the_step_on_all(trained, stage):
    name = f"fp16, ZeRO {stage}"
    at = cases.CASES[2][name].overflow
    for rank in trained[1][2]:
        assert rank[name]["skipped"] == 1
        scales = rank[name]["scales"]
        assert scales == [scales[0]] * at + [scales[0] / 2] * (cases.STEPS - at)
