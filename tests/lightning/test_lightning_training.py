"""Lightning's Trainer with experts on one and two ranks: steps, checkpoints, clipping, mixed precision."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace

import pytest
import torch
from parallel_layer_cases import close
from training_cases import Case, by_hand, on_ranks

pytestmark = pytest.mark.xdist_group("pair")
CASE = Case()
ALL_RUNS = [("plain", 2, 2), ("plain", 1, 2), ("fsdp2", 2, 2), ("fsdp2", 1, 2), ("plain", 1, 1), ("fsdp2", 1, 1)]


@pytest.fixture
def job(pair):
    return on_ranks(pair, "rank_jobs_lightning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def expected():
    return by_hand(CASE)


def check(results, expected, tolerance=1e-12):
    net, losses = expected
    for values, losses_there in results:
        close("losses", losses_there, losses[-len(losses_there) :], tolerance)
        assert values.keys() == net.state_dict().keys()
        for name, value in net.state_dict().items():
            close(name, values[name], value, tolerance)


@pytest.mark.parametrize(("how", "ep", "ranks"), [*ALL_RUNS, ("built there", 2, 2)])
def test_steps_equal_one_process(job, folder, expected, how, ep, ranks):
    """Losses and parameters, with accumulation and clipping; a checkpoint is written on the way."""
    results = job(ranks, "fit", CASE, how, ep, str(folder / f"{how} {ep} {ranks}"))
    assert len(results[0][1]) == CASE.steps * CASE.accumulate
    check(results, expected)


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (("plain", 2, 2), ("plain", 1, 1)),
        (("plain", 1, 1), ("plain", 2, 2)),
        (("plain", 2, 2), ("fsdp2", 2, 2)),
        (("fsdp2", 2, 2), ("plain", 1, 1)),
        (("fsdp2", 1, 1), ("fsdp2", 1, 2)),
    ],
)
def test_a_run_goes_on_elsewhere(job, folder, expected, written, read):
    """From the middle of a run, on another number of ranks and by the other strategy."""
    how, ep, ranks = written
    path = folder / "{} {} {}".format(*written) / "step=3.ckpt"
    if not path.exists():  # where this test runs without the one above
        job(ranks, "fit", CASE, how, ep, str(path.parent))
    how, ep, ranks = read
    results = job(ranks, "fit", CASE, how, ep, None, str(path))
    assert len(results[0][1]) == CASE.steps * CASE.accumulate // 2
    check(results, expected)


def test_float32(job):
    case = replace(CASE, dtype=torch.float32)
    check(job(2, "fit", case, "plain", 2), by_hand(case), 1e-5)


@pytest.mark.parametrize("how", ["plain", "fsdp2"])
def test_gradients_clipped_by_value(job, how):
    case = replace(CASE, clip=0.002, clip_by="value")
    check(job(2, "fit", case, how, 2, None, None, {"gradient_clip_algorithm": "value"}), by_hand(case))


def test_bfloat16(job):
    """Under autocast: near float32's, and in what comes out of the layer's experts not equal to it."""
    case = replace(CASE, dtype=torch.float32)
    _, losses = by_hand(case)
    for _, losses_there in job(2, "fit", case, "plain", 2, None, None, {"precision": "bf16-mixed"}):
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


def test_validation_leaves_experts_where_they_are(job, expected):
    """Without a wrapper Lightning copies the first rank's values to all others."""
    net, _ = by_hand(replace(CASE, steps=0))
    for values, losses in job(2, "validate", CASE, "plain", 2):
        for name, value in net.state_dict().items():
            close(name, values[name], value)
        assert len(losses) == CASE.steps * CASE.accumulate


def test_what_the_strategies_refuse(job, tmp_path):
    from dmoe.integrations.lightning import MoEDDPStrategy, MoEModelParallelStrategy

    for strategy in (MoEDDPStrategy, MoEModelParallelStrategy):
        for wrong in (0, True, "2"):
            with pytest.raises(ValueError, match=f"{strategy.__name__}: ep: expected an integer of at least 1, got"):
                strategy(wrong)
    for told in job(2, "refusals", CASE, str(tmp_path)):
        assert "MoEDDPStrategy: ep: expected a divisor of the 2 ranks (devices * num_nodes), got 3" in told["divisor"]
        assert "expected experts whose parameters are DTensor, got 2 plain tensors" in told["plain experts"]
        assert "expected a folder that this strategy or ModelParallelStrategy wrote, with meta.pt" in told["no folder"]
        assert "expected a checkpoint with the state of optimizers, got " in told["weights alone"]
        assert "storage_options: expected None for a folder" in told["storage options"]


def test_lightning_goes_by_two_names_or_is_absent(monkeypatch):
    from dmoe.integrations.lightning import package

    assert package.lightning().__name__ == "lightning.pytorch"
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    monkeypatch.setitem(sys.modules, "pytorch_lightning", sys)  # stands for the other one
    assert package.lightning() is sys
    monkeypatch.setitem(sys.modules, "pytorch_lightning", None)
    with pytest.raises(ImportError, match="expected Lightning, which is not installed: pip install lightning"):
        importlib.reload(package)
    monkeypatch.undo()
    importlib.reload(package)
