"""Saving of fairseq's ranks as one event, and which of several checkpoints is read."""

from __future__ import annotations

import os
import shutil

import pytest
import rank_jobs_fairseq as jobs
import torch
from fairseq_pool import needs_fairseq
from fairseq_ranks import data, failure, models, pool, train
from rank_pool import RankError

pytestmark = needs_fairseq

SAVING = {"no_epoch_checkpoints": True, "save_interval_updates": 2}
PARTS = ("rank-0", "rank-1", "shared")


def files_of(*names):
    return sorted(f"{name}-{part}.pt" for name in names for part in PARTS)


def change(path, **changes):
    """Write a file again with other values at its top; None removes one."""
    state = torch.load(path, weights_only=False) | changes
    torch.save({key: value for key, value in state.items() if value is not None}, path)


def load(ranks=2, **where):
    return train(ranks, only_load=True, no_save=True, **where)


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """What two ranks wrote after 2 and after 4 updates."""
    folder = tmp_path_factory.mktemp("several")
    runs = train(2, save_dir=folder, max_update=4, **SAVING)
    assert runs[0]["files"] == files_of("checkpoint_1_2", "checkpoint_1_4", "checkpoint_last")
    return folder, models(runs)


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved[0], tmp_path / "ck")


@pytest.fixture(scope="session")
def whole():
    return train(2, max_update=7)[0]["norms"]


@pytest.mark.parametrize(
    ("where", "stage", "times", "updates"),
    [(1, "half a file", 2, 2), (0, "os.rename", 15, 4)],
    ids=["writing", "renaming"],
)
def test_a_training_killed_while_it_saves_goes_on_from_a_whole_checkpoint(
    tmp_path, whole, where, stage, times, updates
):
    """In its second save: rank 1 with half of its file, or rank 0 with one of checkpoint_last's three files renamed."""
    saving = {"save_dir": tmp_path / "ck", "keep_interval_updates": 1, **SAVING}
    argv = [data(), *jobs.flags(max_update=5, **saving)]
    with pytest.raises(RankError) as died:
        pool().run(jobs.killed, argv, where, stage, times, ranks=2)
    assert died.value.by_rank[where][0] == "died"
    assert set(files_of("checkpoint_1_2")) < set(os.listdir(tmp_path / "ck"))  # nothing old goes before all is saved
    rest = train(2, max_update=7, **saving)
    assert rest[0]["norms"] == pytest.approx(whole[updates:], rel=1e-5)
    assert rest[0]["files"] == files_of("checkpoint_1_6", "checkpoint_last")


def test_fairseqs_rules_hold_for_whole_checkpoints(tmp_path):
    """Names and numbers of what is kept: of epochs, of the best ones, and those without a number."""
    rules = {"keep_last_epochs": 1, "keep_best_checkpoints": 1, "batch_size": 64, "max_epoch": 3, "max_update": None}
    (files, _) = (run["files"] for run in train(2, save_dir=tmp_path / "ck", disable_validation=None, **rules))
    best = {name.rpartition("-")[0].removesuffix("-rank") for name in files if name.startswith("checkpoint.best_loss_")}
    assert len(best) == 1
    assert files == sorted(files_of(*best, "checkpoint3", "checkpoint_best", "checkpoint_last"))
    contents = {name: torch.load(tmp_path / "ck" / name, weights_only=False) for name in files}
    assert {content["saved"]["set"] for content in contents.values()} == {
        contents["checkpoint3-shared.pt"]["saved"]["set"]
    }
    assert {content["extra_state"]["train_iterator"]["epoch"] for content in contents.values()} == {4}


@pytest.mark.parametrize("where", [0, 1])
def test_a_full_disk_is_told_on_all_ranks_and_costs_no_checkpoint(tmp_path, where):
    saving = {"save_dir": tmp_path / "ck", **SAVING}
    times = 2 if where else 3  # rank 0 writes two files in each save
    argv = [data(), *jobs.flags(max_update=5, **saving)]
    for told in pool().run(jobs.full, argv, where, times, ranks=2):
        assert told.startswith(f"{tmp_path}/ck/checkpoint_1_4: expected every rank to write its files, got from rank")
        assert told.endswith("[Errno 28] No space left on device")
    assert sorted(os.listdir(tmp_path / "ck")) == files_of("checkpoint_1_2", "checkpoint_last")
    assert [run["updates"] for run in load(**saving)] == [2, 2]


def test_of_a_mixture_the_newest_whole_checkpoint_is_taken(copy):
    """As an earlier release left it, killed while it saved."""
    shutil.copy(copy / "checkpoint_1_2-rank-1.pt", copy / "checkpoint_last-rank-1.pt")
    runs = load(save_dir=copy)
    assert [run["updates"] for run in runs] == [4, 4]
    (said,) = runs[0]["said"]
    assert said.startswith(
        f"{copy}/checkpoint_last-rank-1.pt: expected 2 experts after 4 updates, as beside it, got 2 "
    )
    assert f". Going on with {copy}/checkpoint_1_4-shared.pt (4 updates, saved 20" in said
    assert runs[1]["said"] == []
    newest = f"The newest whole checkpoint of this folder is {copy}/checkpoint_1_4-shared.pt (4 updates, saved 20"
    flags = {"base": "--cpu --task language_modeling --is-moe", "path": copy / "checkpoint_last.pt"}
    for told in failure(1, "eval_lm", **flags):  # which looks at what it was told to look at
        assert newest in told
    (copy / "checkpoint_1_2-shared.pt").unlink()
    for told in failure(2, save_dir=copy, no_save=True, restore_file=copy / "checkpoint_1_2.pt"):
        assert newest in told


def test_files_of_the_same_updates_have_to_be_saved_together(copy):
    change(copy / "checkpoint_last-rank-1.pt", saved={"time": 0.0, "set": "another"})
    for name in files_of("checkpoint_1_2", "checkpoint_1_4"):
        (copy / name).unlink()
    for told in failure(2, save_dir=copy, no_save=True):
        assert told == (
            f"{copy}/checkpoint_last-rank-1.pt: expected a file saved together with {copy}/checkpoint_last-shared.pt, "
            "got one saved at another time, after 4 updates as well"
        )


def test_a_checkpoint_that_is_saved_while_another_process_reads_is_told(copy):
    part = str(copy / "checkpoint_last-rank-1.pt")
    (told,) = pool().run(jobs.replaced, str(copy / "checkpoint_last.pt"), part, ranks=1)
    assert told == f"{part}: expected the checkpoint of 4 updates, got another one, saved meanwhile"


def test_of_one_file_and_parts_the_one_saved_later_is_read(copy):
    """By what the files say or, where one says nothing, by the file system; fewer updates do not matter."""
    one, shared = copy / "checkpoint_last.pt", copy / "checkpoint_last-shared.pt"
    train(1, save_dir=copy / "one", max_update=2, no_epoch_checkpoints=True)
    shutil.copy(copy / "one" / "checkpoint_last.pt", one)

    def read(path):
        (run,) = load(1, save_dir=copy, restore_file=path)
        return run["updates"], run["said"]

    updates, (said,) = read(one)
    assert updates == 2
    assert said.startswith(f"{one} (2 updates, saved 20")
    assert f"is read, not {shared} (4 updates, saved 20" in said
    assert said.endswith("which was saved before it")
    assert read(shared) == (4, [])
    change(one, saved={"time": 0.0})
    updates, (said,) = read(one)
    assert updates == 4
    assert f"is read, not {one} (2 updates, saved 1970-01-01" in said
    change(one, saved=None)
    for modified, expected in ((0, 4), (shared.stat().st_mtime + 1, 2)):
        os.utime(one, (modified, modified))
        assert read(one)[0] == expected
    one.write_bytes(one.read_bytes()[:700])
    updates, (said,) = read(one)
    assert updates == 4
    assert said.startswith(f"{one}: expected a file of torch.save, got: ")
    assert f". Going on with {shared} (4 updates, saved 20" in said


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_checkpoint_of_several_ranks_is_finetuned(saved, tmp_path, ranks):
    folder, parts = saved
    loaded = load(ranks, save_dir=tmp_path / "empty", finetune_from_model=folder / "checkpoint_last.pt")
    assert {run["updates"] for run in loaded} == {0}
    for name, value in parts[0].items():
        if not name.endswith("_float_tensor"):  # memory that fairseq leaves unwritten
            assert torch.equal(loaded[0]["model"][name], value), name
    for told in failure(ranks, save_dir=tmp_path / "empty", no_save=True, finetune_from_model=tmp_path / "none.pt"):
        assert told == (
            f"--finetune-from-model {tmp_path}/none.pt: expected a checkpoint, of one rank or more, got none"
        )
    with pytest.raises(RankError, match="can not be set together"):
        load(ranks, save_dir=folder, finetune_from_model=folder / "checkpoint_last.pt", reset_meters=True)
    begun = load(ranks, save_dir=folder, finetune_from_model=tmp_path / "none.pt")
    assert {run["updates"] for run in begun} == {4}
