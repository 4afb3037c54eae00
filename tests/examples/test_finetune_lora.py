"""The recipe with four-bit experts and LoRA: what it trains, needs and writes, and what it says when it cannot."""

from __future__ import annotations

import dataclasses
import json

import finetune_lora
import pytest
import torch
import train_lm
from lm import checkpoint
from lm.finetune import FineTuning, Way, settings_of
from lm.settings import Settings
from lm_cases import CPU, command_line

import dmoe

SHORT = ["--steps", "12", "--batch", "4", "--lr", "0.02", "--rank", "4"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A finished run of train_lm.py whose sizes four-bit groups divide."""
    from lm_cases import write_text

    folder = tmp_path_factory.mktemp("base")
    line = command_line(
        write_text(folder / "text.txt"), folder / "run", "--hidden", "64", "--ffn", "64", "--steps", "6"
    )
    assert train_lm.main(line) == 0
    return folder / "run"


def test_it_trains_adapters_alone_and_compares_them(base, text, tmp_path, capsys):
    out, before = tmp_path / "out", (base / checkpoint.FILE).read_bytes()
    assert finetune_lora.main([*SHORT, "--base", str(base), "--data", str(text), "--out", str(out)]) == 0
    assert (base / checkpoint.FILE).read_bytes() == before
    assert (out / "finetune_lora.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    written, printed = json.loads((out / "finetune_lora.json").read_text()), capsys.readouterr().out
    names = ["nf4 experts, LoRA of rank 4", "float32 experts, LoRA of rank 4", "float32, all weights trained"]
    assert list(written["curves"]) == list(written["memory"]) == names
    for name in names:
        (first_step, first), *_, (last_step, last) = written["curves"][name]
        assert (first_step, last_step) == (0, 12)
        assert last < first
        assert f"{first:.3f} -> {last:.3f}" in printed
    four, plain, whole = (written["memory"][name] for name in names)
    assert plain["experts"] == whole["experts"]
    codes_and_scales = plain["experts"] * 4.25 / 32  # a bfloat16 scale for 64 codes, and a few bytes name the format
    assert codes_and_scales <= four["experts"] <= codes_and_scales + 16 * 4
    assert four["gradients"] == plain["gradients"] < whole["gradients"]
    trained = written["trained"]
    # a and b of 4 x (inputs + outputs) numbers for 4 experts in 2 layers, and both projections
    assert trained[names[0]] == trained[names[1]] == 2 * 4 * 4 * (64 + 128 + 64 + 64)

    # The adapter fits the quantised base, and brings the loss with it.
    content = checkpoint.load(base)
    settings = settings_of(content["settings"], data=(str(text),))
    from lm.data import load_corpus

    corpus = load_corpus([str(text)], settings.data_bytes, settings.seq_len)
    run = FineTuning(Way("nf4", None), content["runs"]["moe"]["model"], settings, corpus, CPU)
    assert run.evaluate() == pytest.approx(written["curves"][names[0]][0][1], abs=1e-6)
    dmoe.lora.load_state_dict(run.model, torch.load(out / "adapter.pt", weights_only=True))
    settings_for_batch = dataclasses.replace(settings, batch=4)
    run.settings = settings_for_batch
    assert run.evaluate() == pytest.approx(written["curves"][names[0]][-1][1], abs=1e-5)


def test_only_one_way_and_another_format(base, text, tmp_path):
    line = ["--only", "--experts", "int8", "--base", str(base), "--data", str(text), "--out", str(tmp_path)]
    assert finetune_lora.main([*SHORT, *line]) == 0
    assert list(json.loads((tmp_path / "finetune_lora.json").read_text())["curves"]) == ["int8 experts, LoRA of rank 4"]


def test_a_base_is_trained_where_there_is_none(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # there is no runs/demo here
    seen = []

    def trains(arguments):
        seen.append(arguments)
        return 3

    monkeypatch.setattr(finetune_lora.train_lm, "main", trains)
    assert finetune_lora.main(["--base-steps", "7", "--data", str(text)]) == 2
    assert seen == [["--out", "runs/finetune_lora/base", "--steps", "7"]]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (["--experts", "int3"], "int3"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--rank", "0"], "rank"),
        (["--base", "nowhere"], "--base nowhere: expected a folder of train_lm.py with checkpoint.pt, found none"),
        (["--data", "nowhere.txt"], "--data nowhere.txt: no such file or folder"),
    ],
)
def test_what_cannot_be_done_is_said(base, tmp_path, line, says, capsys):
    given = line if "--base" in line else ["--base", str(base), *line]
    assert finetune_lora.main([*given, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("finetune_lora.py: error: ")
    assert says in error
    assert not (tmp_path / "out" / "adapter.pt").exists()


def test_settings_are_the_bases_without_its_comparisons():
    base = Settings(compare_dense=True, steps=5, hidden=64, teacher=None)
    found = settings_of(base.to_dict(), steps=9)
    assert (found.compare_dense, found.steps, found.hidden) == (False, 9, 64)
