"""Accelerate's loop with experts on one and two ranks: steps, states, clipping, half precision, and the launcher."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace

import pytest
import torch
from parallel_layer_cases import close
from training_cases import Case, Net, by_hand, on_ranks

pytestmark = pytest.mark.xdist_group("pair")
CASE = Case()


@pytest.fixture
def job(pair):
    return on_ranks(pair, "rank_jobs_accelerate")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("states")


@pytest.fixture(scope="module")
def expected():
    return by_hand(CASE)


def check(results, expected, tolerance=1e-12):
    net, losses = expected
    for rank, (values, losses_there, state) in enumerate(results):
        close("losses", losses_there, losses[-len(losses_there) :], tolerance)
        assert values.keys() == net.state_dict().keys()
        assert set(state) == (set() if rank else values.keys())  # get_state_dict
        for name, value in net.state_dict().items():
            close(name, values[name], value, tolerance)
            close(name, state.get(name, value), value, tolerance)


@pytest.mark.parametrize(
    ("how", "ep", "ranks"), [("ddp", 2, 2), ("ddp", 1, 2), ("fsdp2", 2, 2), ("fsdp2", 1, 2), ("ddp", 1, 1)]
)
def test_steps_equal_one_process(job, folder, expected, how, ep, ranks):
    """Losses and parameters, with accumulation and clipping; a state is saved on the way."""
    results = job(ranks, "fit", CASE, how, ep, str(folder / f"{how} {ep} {ranks}"))
    assert len(results[0][1]) == CASE.steps * CASE.accumulate
    check(results, expected)


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (("ddp", 2, 2), ("ddp", 1, 1)),
        (("ddp", 1, 1), ("ddp", 2, 2)),
        (("fsdp2", 2, 2), ("ddp", 2, 2)),
        (("ddp", 2, 2), ("fsdp2", 1, 2)),
    ],
)
def test_a_run_goes_on_elsewhere(job, folder, expected, written, read):
    how, ep, ranks = written
    path = folder / "{} {} {}".format(*written)
    if not path.exists():  # where this test runs without the one above
        job(ranks, "fit", CASE, how, ep, str(path))
    how, ep, ranks = read
    results = job(ranks, "fit", CASE, how, ep, None, str(path))
    assert len(results[0][1]) == CASE.steps * CASE.accumulate // 2
    check(results, expected)


def test_float32(job):
    case = replace(CASE, dtype=torch.float32)
    check(job(2, "fit", case, "ddp", 2), by_hand(case), 1e-5)


def test_gradients_clipped_by_value(job):
    case = replace(CASE, clip=0.002, clip_by="value")
    check(job(2, "fit", case, "ddp", 2), by_hand(case))


def test_bfloat16(job):
    """Under autocast: near float32's, and not equal to it."""
    case = replace(CASE, dtype=torch.float32)
    _, losses = by_hand(case)
    for _, losses_there, _ in job(2, "fit", case, "ddp", 2, None, None, {"mixed_precision": "bf16"}):
        close("losses", losses_there, losses, 2e-2)
        assert (losses_there - losses).abs().max() > 1e-5


def test_half_precision_skips_alike(job):
    """A loss scale that overflows at first: all ranks skip the same steps, and then take the same ones."""
    (first, skipped), (second, skipped_there) = job(2, "fit_float16", CASE)
    assert skipped == skipped_there
    assert 0 < skipped < CASE.steps
    for name, value in first.items():
        assert torch.equal(value, second[name])
        assert torch.isfinite(value).all()


def test_what_is_refused(job, tmp_path):
    for told in job(2, "refusals", CASE, str(tmp_path)):
        assert "parallelize: ep: expected a divisor of the 2 ranks of the Accelerator, got 3" in told["divisor"]
        assert "parallelize: ep: expected a divisor of the 2 ranks of the Accelerator, got True" in told["bool"]
        assert "expected one that has prepared nothing yet, got one with 1 models" in told["prepared"]
        assert "expected experts whose parameters are DTensor, got 2 plain tensors" in told["plain experts"]
        assert "expected a folder that an Accelerator taught by dmoe wrote, with sharded_state in it" in told["folder"]
        assert "expected an optimizer for each of the 1 models, or none, got 2" in told["optimizers"]
        assert "expected an FSDP plugin with cpu_ram_efficient_loading=False" in told["loading"]
        assert "expected DDP, FSDP2 (fsdp_version=2) or one process, got FSDP1" in told["fsdp1"]


def test_what_is_no_accelerator_or_absent(monkeypatch):
    import dmoe.integrations.accelerate as on_accelerate
    from dmoe.integrations.accelerate import accelerator

    with pytest.raises(TypeError, match=r"teach: accelerator: expected an accelerate\.Accelerator, got int"):
        on_accelerate.parallelize(3, Net(CASE))
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ImportError, match="expected Accelerate, which is not installed: pip install accelerate"):
        importlib.reload(accelerator)
    monkeypatch.undo()
    importlib.reload(accelerator)
