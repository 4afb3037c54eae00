"""Files that belong together: whoever dies, whenever, the old ones or the new ones are there, whole."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import signal
import sys
from unittest.mock import patch

import pytest
import rank_jobs_together as jobs
import torch

from dmoe import MoE
from dmoe.checkpoint import finish_writing, read_file, remove_together, write_together
from dmoe.checkpoint.__main__ import main

OLD, NEW, NEXT = 1.0, 2.0, 3.0


def alone(folder, value):
    """One process writes the files of both ranks."""
    files = {path: content for rank in range(2) for path, content in jobs.files_of(folder, rank, value).items()}
    write_together(folder / "ck", files, overwrite=True)


def found(folder):
    """The value in the files, which is that of all of them."""
    contents = [read_file(folder / name) for name in jobs.NAMES]
    assert [content["name"] for content in contents] == list(jobs.NAMES)
    (value,) = {float(number) for content in contents for number in content["value"]}
    return value


def names(folder):
    return sorted(os.listdir(folder))


@pytest.fixture
def run_ranks(tmp_path):
    """Two processes that write together, one of which is killed; what each came to, None of the killed one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rank_jobs"])
    stores = (tmp_path / f"store-{n}" for n in itertools.count())

    def run(folder, value, killed=None, stage=None):
        started, store = [], next(stores)
        for rank in range(2):
            here, there = context.Pipe()
            arguments = (rank, str(folder), str(store), value, stage if rank == killed else None, there)
            process = context.Process(target=jobs.process, args=arguments, daemon=True)
            with patch.dict(os.environ, {"PYTHONPATH": os.pathsep.join(sys.path)}):
                process.start()
            there.close()
            started.append((process, here))
        for _, pipe in started:
            assert pipe.recv() == "connected"
        for _, pipe in started:
            pipe.send("begin")
        answers = []
        for rank, (process, pipe) in enumerate(started):
            answers.append(None if rank == killed else pipe.recv())
            process.join()
            assert process.exitcode == (-signal.SIGKILL if rank == killed else 0)
        return answers

    return run


@pytest.mark.parametrize("killed", [0, 1])
def test_a_rank_killed_at_any_stage_leaves_the_old_files_or_the_new_ones(run_ranks, tmp_path, killed):
    folder = tmp_path / "files"
    folder.mkdir()
    alone(folder, OLD)
    stages = run_ranks(folder, NEW)[killed][0]
    assert stages.count("half a file") == 2 - killed
    assert "talk" in stages
    outcomes = []
    for stage in range(len(stages)):
        alone(folder, OLD)
        assert names(folder) == list(jobs.NAMES)  # of what the killed ones had begun nothing is left
        other = run_ranks(folder, NEW, killed, stage)[1 - killed]
        outcomes.append(found(folder))
        if other[1] == "written":
            assert outcomes[-1] == NEW
    assert outcomes == sorted(outcomes)
    assert outcomes[0] == OLD
    assert outcomes[-1] == NEW


@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize("stage", ["half a file", "open x"])
def test_a_full_disk_is_told_on_all_ranks_and_leaves_the_old_files(ranks, tmp_path, where, stage):
    alone(tmp_path, OLD)
    told = ranks.run(jobs.fail, str(tmp_path), NEW, where, stage, ranks=2)
    assert told[0] == told[1]
    assert told[0] == (
        "OSError",
        f"{tmp_path}/ck: expected every rank to write its files, got from rank {where}: "
        "OSError: [Errno 28] No space left on device",
    )
    assert names(tmp_path) == list(jobs.NAMES)
    assert found(tmp_path) == OLD


def test_no_space_for_the_journal_is_told_on_all_ranks(ranks, tmp_path):
    alone(tmp_path, OLD)
    told = ranks.run(jobs.fail, str(tmp_path), NEW, 0, "os.rename", ranks=2)
    assert [kind for kind, _ in told] == ["OSError"] * 2
    assert names(tmp_path) == list(jobs.NAMES)
    assert found(tmp_path) == OLD


@pytest.mark.parametrize(
    ("stage", "times", "value"),
    [("open x", 1, OLD), ("half a file", 1, OLD), ("os.rename", 1, OLD), ("os.rename", 2, NEW)],
)
def test_one_file_needs_no_journal(tmp_path, stage, times, value):
    path = tmp_path / "ck.pt"

    def write(value):
        write_together(path, {path: {"value": value}}, overwrite=True)

    write(OLD)
    assert jobs.killed_at(stage, lambda: write(NEW), times=times) == (value == OLD)
    assert read_file(path)["value"] == value
    write(NEXT)
    assert names(tmp_path) == ["ck.pt"]


def test_what_is_removed_together_is_gone_for_whoever_looks_next(tmp_path):
    files = [tmp_path / name for name in jobs.NAMES]
    alone(tmp_path, OLD)
    assert jobs.killed_at("os.rename", lambda: remove_together(tmp_path / "ck", files))  # before the journal
    assert found(tmp_path) == OLD
    assert jobs.killed_at(
        "os.remove", lambda: remove_together(tmp_path / "ck", files), times=3
    )  # a draft, a file, a file
    assert any(path.exists() for path in files)
    finish_writing(tmp_path)
    assert names(tmp_path) == []
    with pytest.raises(ValueError, match=r"ck: expected files whose names begin with this, got .*/other\.pt"):
        remove_together(tmp_path / "ck", [tmp_path / "other.pt"])


def test_files_in_folders_of_ranks_find_their_journal(tmp_path):
    """As of ``out{rank}/model.pt``: killed between two renames, a reader of either folder gets the new ones."""
    for rank in range(2):
        (tmp_path / f"ck{rank}").mkdir()
    files = [tmp_path / f"ck{rank}" / "model.pt" for rank in range(2)]

    def write(value):
        write_together(tmp_path / "ck{rank}", {path: {"value": value} for path in files}, overwrite=True)

    write(OLD)
    assert jobs.killed_at("os.rename", lambda: write(NEW), times=3)  # after the journal and the first file
    assert read_file(files[1])["value"] == NEW
    assert read_file(files[0])["value"] == NEW
    assert jobs.killed_at("os.rename", lambda: write(NEXT), times=1)
    assert [read_file(path)["value"] for path in files] == [NEW, NEW]
    write(OLD)
    assert names(tmp_path) == ["ck0", "ck1"]
    assert [names(path.parent) for path in files] == [["model.pt"]] * 2


@pytest.mark.parametrize(
    "content",
    [
        {"moves": [[".ck.0123456789abcdef.x.part", "../x", 1, 1]]},
        {"moves": [["../.ck.0123456789abcdef.x.part", "../x", 1, 1]]},
        {"moves": [["other", "x", 1, 1]]},
        {"removals": ["other"]},
        {"removals": ["../ck"]},
        {"removals": ["/ck"]},
        {"moves": 3},
        [],
    ],
    ids=str,
)
def test_a_journal_from_anywhere_moves_and_removes_nothing_of_others(tmp_path, content):
    folder = tmp_path / "folder"
    folder.mkdir()
    for path in (tmp_path / "ck", tmp_path / "x", folder / "other", folder / "x"):
        path.write_text(path.name)
    if isinstance(content, dict):
        content["format"] = "dmoe.checkpoint files 1"
    (folder / ".ck.0123456789abcdef.dmoe-commit").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"expected a journal of dmoe\.checkpoint, got"):
        finish_writing(folder)
    assert [path.read_text() for path in (tmp_path / "ck", tmp_path / "x", folder / "other", folder / "x")] == [
        "ck", "x", "other", "x",
    ]  # fmt: skip


def test_the_program_splits_into_all_files_or_none(tmp_path):
    whole = tmp_path / "whole.pt"
    for value in (OLD, NEW):
        model = MoE(hidden_size=2, ffn_hidden_size=2, num_experts=2, top_k=1)
        torch.save({"model": model.state_dict(), "value": value}, whole)
        out = str(tmp_path / "ck-{rank}.pt")
        split = ["split", str(whole), "2", out, "--overwrite"]
        if value == OLD:
            assert main(split) == 0
    parts = [tmp_path / f"ck-{rank}.pt" for rank in range(2)]
    assert jobs.killed_at("half a file", lambda: main(split), times=2)
    assert [torch.load(part)["value"] for part in parts] == [OLD, OLD]
    assert jobs.killed_at("os.rename", lambda: main(split), times=3)
    assert [read_file(part)["value"] for part in parts] == [NEW, NEW]
    assert names(tmp_path) == ["ck-0.pt", "ck-1.pt", "whole.pt"]
