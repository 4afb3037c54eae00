"""The language-model example under torchrun: it trains as one process does, and goes on with any number of ranks."""

from __future__ import annotations

import dataclasses
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import rank_jobs_lm as jobs
import torch
import train_lm
from lm import checkpoint
from lm.generate import generate
from lm.model import count_parameters
from lm.ranks import ALONE, Ranks, check
from lm.settings import Settings, UsageError
from lm.training import train
from patience import PATIENCE
from torch.testing import assert_close

SETTINGS = Settings(
    layers=2, hidden=16, heads=2, ffn=8, experts=4, top_k=2, batch=6, seq_len=16, steps=8, warmup=2, eval_every=4,
    eval_bytes=144, dtype="float32", balance=0.3, clip=0.5,
)  # fmt: skip
FIELDS = dataclasses.asdict(SETTINGS)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    words = ["def", "return", "expert", "token", "self", "=", "(", ")", "\n"]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(random.Random(0).choices(words, k=4000)))
    return str(path)


@pytest.fixture(scope="module")
def alone(text, tmp_path_factory):
    """One process from beginning to end, and half way: its runs, and the folder of the checkpoint at step 5."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("alone")
    _, runs = jobs.runs_of(SETTINGS, text)
    train(runs, lambda: None, lambda: False)
    corpus, half = jobs.runs_of(SETTINGS, text)
    train(half, lambda: None, lambda: half[0].step >= 5)
    checkpoint.save(folder, SETTINGS, corpus, half)
    return runs[0], folder


def close_curves(actual, expected):
    assert [point["step"] for point in actual] == [point["step"] for point in expected]
    for one, other in zip(actual, expected, strict=True):
        for name in ("held_out_bpb", "train_bpb"):
            assert one[name] == pytest.approx(other[name], rel=TOLERANCE), (name, one["step"])


TOLERANCE = 2e-6  # float32; 8e-8 was seen


@pytest.mark.parametrize(
    ("expert_parallel", "parallel"), [(1, "ddp"), (2, "ddp"), (4, "ddp"), (1, "fsdp2"), (2, "fsdp2"), (4, "fsdp2")]
)
def test_ranks_train_as_one_process_does(ranks, text, alone, tmp_path, expert_parallel, parallel):
    expected, _ = alone
    said = "".join(generate(expected, "def", length=20))
    results = ranks.run(jobs.train_lm, FIELDS, text, expert_parallel, str(tmp_path), None, False, parallel)
    saved = checkpoint.load(tmp_path)["runs"]["moe"]
    for result in results:
        if parallel == "ddp":
            assert result["experts here"] == {4 // expert_parallel}
        else:  # cut further over replicas: in all, each rank has a quarter of everything
            assert result["numbers here"] == result["sizes"]["total"] // 4
        assert result["sizes"] == count_parameters(expected.model)
        assert result["text"] == said
        close_curves(result["curves"][0], expected.curve)
        assert [entry["step"] for entry in result["routing"]] == list(range(1, 9))
        for entry, other in zip(result["routing"], expected.routing, strict=True):
            for name in ("entropy", "load"):
                assert_close(torch.tensor(entry[name]), torch.tensor(other[name]), rtol=0, atol=1e-5)
    for name, value in expected.model.state_dict().items():
        assert_close(saved["model"][name], value, rtol=0, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize(("expert_parallel", "parallel"), [(2, "ddp"), (4, "ddp"), (2, "fsdp2")])
def test_a_taught_pyramid_on_ranks_is_that_of_one_process(ranks, text, alone, tmp_path, expert_parallel, parallel):
    """DeepSeek-V3's layers, whose bias counts loads over all ranks, beside dense FFNs, with a teacher; resumed."""
    _, halfway = alone
    school = tmp_path / "teacher"
    school.mkdir()
    content = checkpoint.load(halfway)
    content["settings"]["steps"] = 5
    torch.save(content, school / checkpoint.FILE)
    settings = dataclasses.replace(
        SETTINGS, preset="deepseek_v3", balance=None, experts=(8, 16), residual=True, batch=8, teacher=str(school),
        kd_stop=6,
    )  # fmt: skip
    _, (expected,) = jobs.runs_of(settings, text)
    train([expected], lambda: None, lambda: False)
    out = tmp_path / "out"
    out.mkdir()
    fields = dataclasses.asdict(settings)
    ranks.run(jobs.train_lm, fields, text, expert_parallel, str(out), 5, False, parallel)
    results = ranks.run(jobs.train_lm, fields, text, expert_parallel, str(out), None, True, parallel)
    saved = checkpoint.load(out)
    assert saved["teacher"] == expected.teacher.facts
    for result in results:
        assert result["sizes"] == count_parameters(expected.model)
        close_curves(result["curves"][0], expected.curve)
    for name, value in expected.model.state_dict().items():
        assert_close(
            saved["runs"]["moe"]["model"][name], value, rtol=0, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((2, "ddp"), None),
        (None, (4, "ddp")),
        ((4, "ddp"), (2, "ddp")),
        ((2, "fsdp2"), None),
        (None, (1, "fsdp2")),
        ((4, "ddp"), (2, "fsdp2")),
    ],
)
def test_a_run_goes_on_with_another_number_of_ranks(ranks, text, alone, tmp_path, before, after):
    expected, halfway = alone
    folder = str(halfway)
    if before is not None:
        folder = str(tmp_path)
        for result in ranks.run(jobs.train_lm, FIELDS, text, before[0], folder, 5, False, before[1]):
            assert result["steps"] == [5]  # on all ranks, though the last one alone wished to stop
        assert checkpoint.progress(tmp_path) == (5, 8)
    if after is None:
        corpus, (run,) = jobs.runs_of(SETTINGS, text)
        checkpoint.restore(checkpoint.load(Path(folder)), corpus, [run])
        train([run], lambda: None, lambda: False)
        curve, routing = run.curve, run.routing
    else:
        shutil.copy(Path(folder) / checkpoint.FILE, tmp_path / "copy.pt")
        start = tmp_path / "start"
        start.mkdir()
        (tmp_path / "copy.pt").rename(start / checkpoint.FILE)
        (result, *_) = ranks.run(jobs.train_lm, FIELDS, text, after[0], str(start), None, True, after[1])
        (curve,), routing = result["curves"], result["routing"]
    close_curves(curve, expected.curve)
    assert [entry["step"] for entry in routing] == list(range(1, 9))


def test_a_file_of_ranks_is_that_of_one_process(ranks, text, alone, tmp_path):
    _, halfway = alone
    ranks.run(jobs.train_lm, {**FIELDS, "compare_dense": True}, text, 2, str(tmp_path), 5)
    ours, theirs = (checkpoint.load(folder)["runs"] for folder in (tmp_path, halfway))
    assert set(ours) == {"moe", "dense"}
    mine, other = ours["moe"], theirs["moe"]
    assert list(mine) == list(other)
    assert mine["sums"]["loss_steps"] == other["sums"]["loss_steps"]
    for name in ("loss", "entropy"):
        assert_close(mine["sums"][name], other["sums"][name], rtol=1e-5, atol=0)
    assert mine["optimizer"]["param_groups"] == other["optimizer"]["param_groups"]
    moments = [{(i, kind): t for i, state in run["optimizer"]["state"].items() for kind, t in state.items()}
               for run in (mine, other)]  # fmt: skip
    for actual, wanted in [(mine["model"], other["model"]), moments]:
        assert actual.keys() == wanted.keys()
        for key, value in wanted.items():
            assert_close(actual[key], value, rtol=1e-4, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")


def test_a_full_disk_is_told_on_all_ranks(ranks, text, tmp_path):
    """They used to wait for the first one for ever."""
    told = ranks.run(jobs.save_on_a_full_disk, FIELDS, text, str(tmp_path))
    assert len(set(told)) == 1
    assert told[0].startswith(f"--out {tmp_path}: expected to write checkpoint.pt, got: ")
    assert told[0].endswith("No space left on device")
    assert checkpoint.progress(tmp_path) == (0, 8)
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.FILE]


def test_what_ranks_cannot_share_is_refused(capsys):
    with pytest.raises(UsageError, match=r"--batch must be at least the number of ranks \(8\), got 6"):
        check(SETTINGS, Ranks(count=8))
    with pytest.raises(UsageError, match=r"--expert-parallel must divide --experts \(4\), got 3"):
        check(SETTINGS, Ranks(count=3, expert_parallel=3))
    with pytest.raises(UsageError, match="--compile: expected one process, got 2 ranks"):
        check(dataclasses.replace(SETTINGS, compile=True), Ranks(count=2))
    assert train_lm.main(["--expert-parallel", "2", "--device", "cpu"]) == 2
    assert "--expert-parallel 2 needs as many ranks: torchrun --nproc-per-node 2" in capsys.readouterr().err
    assert train_lm.main(["--parallel", "fsdp2", "--device", "cpu"]) == 2
    assert "--parallel fsdp2 needs several ranks: torchrun" in capsys.readouterr().err


@pytest.mark.parametrize("batch", [1, 4, 7])
def test_every_sequence_is_one_ranks(batch):
    taken = []
    for rank in range(4):
        rows, counted = Ranks(4, rank).rows(batch)
        assert len(range(batch)[rows]) == max(counted, 1)
        taken += range(batch)[rows] if counted else []
    assert taken == list(range(batch))
    assert ALONE.rows(batch) == (slice(0, batch), batch)


def test_torchrun_ends_with_a_checkpoint_on_a_signal_and_one_process_goes_on(text, tmp_path):
    flags = "--layers 1 --hidden 16 --heads 2 --ffn 8 --experts 4 --batch 4 --seq-len 32 --steps 3000 --eval-every 10"
    out = tmp_path / "out"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        str(Path(train_lm.__file__)), *flags.split(), "--eval-bytes", "256", "--dtype", "float32", "--device", "cpu",
        "--data", text, "--out", str(out), "--expert-parallel", "2",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
    assert process.stdout is not None
    said = []
    try:
        for line in process.stdout:
            said.append(line)
            if line.lstrip().startswith("moe  step"):
                break
        process.send_signal(signal.SIGINT)
        said += process.communicate(timeout=PATIENCE)[0].splitlines(keepends=True)
    finally:
        process.kill()
    whole = "".join(said)
    assert process.returncode != 0
    assert whole.count("text: text.txt, 1 files") == 1  # rank 0 alone prints
    assert whole.count("SIGINT: saved") == 1
    assert "torchrun --nproc-per-node 2 " in whole
    assert f"--out {out} --resume --expert-parallel 2" in whole
    made, wanted = checkpoint.progress(out)
    assert 10 <= made < wanted == 3000
    saved = checkpoint.load(out)
    assert saved["runs"]["moe"]["model"]["blocks.0.ffn.experts.down_proj"].shape == (4, 16, 8)
    settings = Settings.from_dict(saved["settings"])
    corpus, (run,) = jobs.runs_of(settings, text)
    checkpoint.restore(saved, corpus, [run])
    train([run], lambda: None, lambda: run.step >= made + 10)
    assert run.step == made + 10
