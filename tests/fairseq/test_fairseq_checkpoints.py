"""Checkpoints of fairseq on several ranks: files as the branch names them, resumed on any number of ranks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import rank_jobs_fairseq as jobs
import torch
from fairseq_pool import needs_fairseq
from fairseq_ranks import BACKENDS, alone, data, differences, failure, models, train
from patience import PATIENCE

pytestmark = needs_fairseq

OF_TWO = ["checkpoint_last-rank-0.pt", "checkpoint_last-rank-1.pt", "checkpoint_last-shared.pt"]
SAVING = {"no_epoch_checkpoints": True}


def read(path):
    return torch.load(path, map_location="cpu", weights_only=False)


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """What two ranks wrote after 7 updates."""
    folder = tmp_path_factory.mktemp("saved")
    runs = train(2, save_dir=folder, max_update=7, **SAVING)
    assert runs[0]["files"] == OF_TWO
    return folder, models(runs)


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved[0], tmp_path / "ck")


@pytest.mark.parametrize("backend", BACKENDS)
def test_from_two_ranks_to_one_and_back(tmp_path, backend):
    """Seven updates each, Adam's state and the place in the data included: as 20 updates without a break."""
    uninterrupted = alone(update_freq=2)
    where = {"save_dir": tmp_path / "ck", **SAVING}
    two = train(2, max_update=7, ddp_backend=backend, **where)
    assert two[0]["files"] == OF_TWO
    one = train(1, max_update=14, update_freq=2, **where)
    assert one[0]["files"] == [*OF_TWO, "checkpoint_last.pt"]
    back = train(2, max_update=20, ddp_backend=backend, **where)
    assert [len(run["norms"]) for run in (*two, *one, *back)] == [7, 7, 7, 6, 6]
    assert two[0]["norms"] + one[0]["norms"] + back[0]["norms"] == pytest.approx(uninterrupted["norms"], rel=1e-5)
    experts, others = differences(uninterrupted["model"], models(back))
    print(f"{backend}: experts {experts:.1e}, others {others:.1e}")
    assert experts < 1e-6
    assert others < 1e-4


def test_saving_again_after_going_on_changes_nothing_in_training(tmp_path):
    """What an optimizer took from a file may not change with it: the file is written anew while training goes on."""
    whole = train(2, max_update=8)
    where = {"save_dir": tmp_path / "ck", "save_interval_updates": 2, **SAVING}
    first = train(2, max_update=4, **where)
    rest = train(2, max_update=8, **where)
    assert first[0]["norms"] + rest[0]["norms"] == pytest.approx(whole[0]["norms"], rel=1e-5)
    experts, others = differences(merged(models(whole)), models(rest))
    assert experts < 1e-6
    assert others < 1e-5


def test_half_precision_goes_on_where_it_stopped(tmp_path):
    """Loss scale and the optimizer's float32 states, for both ways of --fp16."""
    for half in ("fp16", "memory_efficient_fp16"):
        changes = {half: True, "fp16_init_scale": 4, "fp16_scale_window": 3}
        where = {"save_dir": tmp_path / half, **SAVING, **changes}
        whole = train(2, max_update=8, **changes)
        first = train(2, max_update=4, **where)
        rest = train(2, max_update=8, **where)
        assert [run["scales"] for run in first] == [[4.0, 4.0, 8.0, 8.0]] * 2
        assert [run["scales"][:2] for run in rest] == [[8.0, 8.0]] * 2
        assert rest[0]["norms"] == rest[1]["norms"] == pytest.approx(whole[0]["norms"][4:], rel=0.01)


def test_files_hold_what_the_branch_puts_there(saved):
    folder, (first, second) = saved
    shared, ranks = read(folder / OF_TWO[2]), [read(folder / name) for name in OF_TWO[:2]]
    layer = "decoder.layers.1.moe_layer."
    fields = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
    for state, model in zip(ranks, (first, second), strict=True):
        assert set(state["model"]) == {f"{layer}experts.{i}.{field}" for i in range(2) for field in fields}
        assert all(torch.equal(value, model[name]) for name, value in state["model"].items())
        assert state["optimizer_history"][-1]["num_updates"] == 7
        assert len(state["last_optimizer_state"]["state"]) == 4
    assert layer + "gate.wg.weight" in shared["model"]
    assert set(shared["model"]) | set(ranks[0]["model"]) == set(first)
    assert not set(shared["model"]) & set(ranks[0]["model"])
    assert not set(shared["last_optimizer_state"]["state"]) & set(ranks[0]["last_optimizer_state"]["state"])
    storages = {value.untyped_storage().data_ptr(): value for value in ranks[0]["model"].values()}
    assert sum(v.untyped_storage().nbytes() for v in storages.values()) == sum(
        v.nbytes for v in ranks[0]["model"].values()
    )


def merged(parts):
    """A whole model from its parts, by the rule of the names alone."""
    whole = {name: value for name, value in parts[0].items() if ".experts." not in name}
    local = sum(".experts." in name for name in parts[0]) // 4
    for rank, part in enumerate(parts):
        for name, value in part.items():
            layer, dot, rest = name.partition(".experts.")
            expert, _, field = rest.partition(".")
            if dot:
                whole[f"{layer}.experts.{local * rank + int(expert)}.{field}"] = value
    return whole


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("named", ["checkpoint_last.pt", "checkpoint_last-rank-0.pt"])
def test_any_number_of_ranks_loads_them(saved, tmp_path, ranks, named):
    folder, parts = saved
    loaded = train(ranks, only_load=True, save_dir=tmp_path / "empty", restore_file=folder / named)
    assert differences(merged(parts), models(loaded)) == (0, 0)
    assert {run["updates"] for run in loaded} == {7}


@pytest.mark.parametrize("missing", ["rank-0", "rank-1", "shared"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_missing_file_is_told_on_every_rank(copy, ranks, missing):
    path = copy / f"checkpoint_last-{missing}.pt"
    path.unlink()
    told = failure(ranks, save_dir=copy, no_save=True)
    assert len(told) == ranks
    for error in told:
        assert error.startswith(f"{path}: expected ")
        assert "\n" not in error


@pytest.mark.parametrize("ranks", [1, 2])
def test_another_number_of_experts_is_told_on_every_rank(copy, ranks):
    for error in failure(ranks, save_dir=copy, no_save=True, moe_expert_count=8):
        assert error == (
            f"{copy}/checkpoint_last-shared.pt: expected a checkpoint of 8 experts (--moe-expert-count), got one of 4"
        )


def test_files_of_different_steps_are_told(copy, saved):
    state = read(copy / OF_TWO[1])
    state["optimizer_history"][-1]["num_updates"] = 6
    torch.save(state, copy / OF_TWO[1])
    for error in failure(2, save_dir=copy, no_save=True):
        assert "rank-1.pt: expected 2 experts after 7 updates, as beside it, got 2 after 6" in error


@pytest.mark.parametrize("with_everything", [False, True], ids=["shared", "older"])
def test_checkpoints_of_the_branch_load(copy, saved, tmp_path, with_everything):
    """With its own state of the optimizer, which counts experts one by one; and older files, each with everything."""
    shared = read(copy / OF_TWO[2])
    for name in OF_TWO:
        state = read(copy / name)
        del state["optimizer_parameters"]
        if with_everything:
            state["model"] |= shared["model"]
        torch.save(state, copy / name)
    if with_everything:
        (copy / OF_TWO[2]).unlink()
    for error in failure(2, save_dir=copy, no_save=True):
        assert "expected --reset-optimizer, or an optimizer's state that this package wrote" in error
    for ranks in (1, 4):
        loaded = train(ranks, only_load=True, save_dir=copy, reset_optimizer=True)
        assert differences(merged(saved[1]), models(loaded)) == (0, 0)


def test_old_checkpoints_go_with_all_their_files(tmp_path):
    options = {"save_interval_updates": 1, "keep_interval_updates": 1, "no_last_checkpoints": True, **SAVING}
    (files, *_) = (run["files"] for run in train(2, save_dir=tmp_path / "ck", max_update=4, **options))
    assert files == [f"checkpoint_1_4-{part}.pt" for part in ("rank-0", "rank-1", "shared")]


def torchrun(tool, *flags):
    """Two processes as a user starts them."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--no-python"]
    run += [sys.executable, "-m", "dmoe.integrations.fairseq_moe", tool, *map(str, flags)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(run, capture_output=True, text=True, check=False, timeout=PATIENCE, env=env)


def test_two_processes_from_the_shell(tmp_path):
    """Sharded training; then evaluation with a file that is not there: told, and the exit status is not 0."""
    words = jobs.flags(save_dir=tmp_path / "ck", max_update=2, ddp_backend="fully_sharded", **SAVING)
    trained = torchrun("train", data(), *words)
    assert trained.returncode == 0, trained.stderr[-3000:]
    assert sorted(path.name for path in (tmp_path / "ck").iterdir()) == OF_TWO
    (tmp_path / "ck" / OF_TWO[1]).unlink()
    path = tmp_path / "ck" / "checkpoint_last.pt"
    failed = torchrun("eval_lm", data(), "--path", path, "--cpu", "--task", "language_modeling", "--is-moe")
    assert failed.returncode == 1
    told = [line for line in failed.stderr.splitlines() if line.startswith("fairseq_moe: ")]
    # Of both ranks, unless torchrun was quicker to end the second one.
    assert set(told) == {
        f"fairseq_moe: {tmp_path}/ck/{OF_TWO[1]}: expected the files of 2 ranks (4 experts, 2 in each file), "
        "got none of rank 1"
    }
    assert "Traceback" not in failed.stderr.partition("torch/distributed")[0]
