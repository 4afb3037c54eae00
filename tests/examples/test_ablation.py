"""The ablation: that it goes on where it was, what its figures mean, and that the committed page has them."""

import dataclasses
import json
import math
from pathlib import Path

import ablation
import pytest
import torch
from lm.ablation_table import rows, table
from lm.settings import Settings
from lm.training import Run
from lm.upcycling import begin_as_copies, flops_of_a_byte, upcycled_run
from lm.variants import BASE, variants
from lm_cases import CPU, EXAMPLES, TINY, never
from tqdm import tqdm

BAR = tqdm(disable=True)


@pytest.fixture
def tiny(monkeypatch):
    sizes = dataclasses.replace(TINY, steps=8, eval_every=4, compare_dense=False)
    monkeypatch.setattr(ablation, "QUICK", sizes)
    return sizes


def test_finished_runs_are_kept_and_not_made_again(tiny, text, tmp_path, monkeypatch, capsys):
    line = ["--quick", "--data", str(text), "--seeds", "2", "--out", str(tmp_path)]
    assert ablation.main([*line, "--only", "base,raw-gates"]) == 0
    assert ablation.main([*line, "--only", "base,upcycled,upcycled-free"]) == 0
    first = json.loads((tmp_path / "ablation.json").read_text())
    names = ("base", "raw-gates", "upcycled", "upcycled-free")
    assert set(first["runs"]) == {f"{name}/{seed}" for name in names for seed in (0, 1)}
    assert (tmp_path / "ablation.png").read_bytes().startswith(b"\x89PNG")
    runs = first["runs"]
    assert len({run["held_out_bpb"] for run in runs.values()}) == 8
    assert runs["raw-gates/0"]["settings"]["gate_normalization"] == "none"
    assert runs["raw-gates/1"]["settings"]["seed"] == 1
    assert runs["upcycled/0"]["steps"] == 6 < runs["upcycled-free/0"]["steps"] == 8
    assert all(run["seconds"] > 0 and run["busiest"] >= 1 for run in runs.values())

    monkeypatch.setattr("lm.training.Run._train_step", lambda self: pytest.fail("a finished run was made again"))
    capsys.readouterr()
    assert ablation.main([*line, "--only", "base,raw-gates"]) == 0
    assert json.loads((tmp_path / "ablation.json").read_text()) == first
    assert "| gate weights | the router's probabilities |" in capsys.readouterr().out


def test_the_first_run_is_that_of_the_settings(tiny, corpus):
    (base,) = [variant for variant in variants(tiny) if variant.name == BASE]
    kept = ablation.measured(base, base.settings(tiny, 5), corpus, BAR)
    run = Run("moe", dataclasses.replace(tiny, seed=5), corpus, CPU)
    run.advance(4, BAR, never)
    run.advance(8, BAR, never)
    assert kept["held_out_bpb"] == round(run.curve[-1]["held_out_bpb"], 5)
    assert [step for step, _ in kept["curve"]] == [4, 8]


def test_every_variant_changes_the_base_and_nothing_else_twice():
    base = Settings()
    every = variants(base)
    assert len({variant.name for variant in every}) == len(every)
    changed = [variant.settings(base, 0) for variant in every if variant.upcycled is None]
    assert changed[0] == base
    assert len(set(changed)) == len(changed)
    assert all(settings.dense_ffn == base.dense_ffn for settings in changed)  # equal active FLOPs


def test_a_mixture_begins_as_the_dense_run_ended(tiny, corpus):
    parent, run = upcycled_run(tiny, "free", lambda name, own: Run(name, own, corpus, CPU), BAR)
    assert (parent.step, run.step, run.settings.steps) == (2, 0, 8)
    assert parent.settings.dense_ffn == tiny.ffn
    tokens = torch.randint(256, (2, 16))
    with torch.no_grad():
        torch.testing.assert_close(run.model.eval()(tokens), parent.model.eval()(tokens))
    scratch = Run("moe", run.settings, corpus, CPU)
    for mine, theirs in zip(run.model.moe_layers, scratch.model.moe_layers, strict=True):
        assert torch.equal(mine.router.weight, theirs.router.weight)
    begin_as_copies(scratch, parent)
    for mine, theirs in zip(run.model.parameters(), scratch.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_the_dense_runs_flops_are_taken_from_the_mixtures(tiny, corpus):
    settings = dataclasses.replace(tiny, steps=400, warmup=40)
    make = lambda name, own: Run(name, own, corpus, CPU)  # noqa: E731
    monkey = Run.advance
    try:
        Run.advance = lambda *_, **__: None  # type: ignore[method-assign]
        parent, run = upcycled_run(settings, "counted", make, BAR)
    finally:
        Run.advance = monkey  # type: ignore[method-assign]
    spent = 100 * flops_of_a_byte(parent) + run.settings.steps * flops_of_a_byte(run)
    assert spent == pytest.approx(400 * flops_of_a_byte(run), rel=0.002)
    assert parent.settings.steps == 100
    assert parent.settings.warmup == 10
    H, F, L, S = 16, 8, 2, 16
    per_layer = 4 * H * H + 3 * H * F
    expected = 6 * (2 * 256 * H + L * per_layer) + L * 6 * S * H
    norms = 6 * sum(p.numel() for name, p in parent.model.named_parameters() if p.ndim < 2)
    assert flops_of_a_byte(parent) == expected + norms


def result_of(**bits):
    return {"runs": {
        f"{name}/{seed}": {"held_out_bpb": value, "seconds": 10 + seed, "busiest": 1.5}
        for name, values in bits.items() for seed, value in enumerate(values)
    }}  # fmt: skip


def test_a_difference_is_clear_where_the_seeds_agree():
    result = result_of(**{BASE: [2.0, 2.1, 2.2], "shared": [2.1, 2.21, 2.29], "raw-gates": [2.1, 2.0, 2.2],
                          "balance-0": [1.0]})  # fmt: skip
    found = {row.variant.name: row for row in rows(result, variants(Settings()))}
    assert list(found) == [BASE, "raw-gates", "shared"]  # what has not all seeds is left out
    assert found["shared"].differences == pytest.approx([0.1, 0.11, 0.09])
    assert found["shared"].half_width == pytest.approx(4.303 * 0.01 / math.sqrt(3))
    assert found["shared"].clear
    assert not found["raw-gates"].clear
    lines = table(list(found.values())).splitlines()
    assert lines[2].startswith("| base | gates sum to 1, balance 0.05, no z-loss | 2.1000 ± 0.1000 |  |")
    assert "| 2.2000 ± 0.0954 | **+0.1000** | +0.0900 .. +0.1100 | ± 0.0248 | 1.5x | 11 |" in lines[4]
    (alone,) = rows(result_of(base=[2.0]), variants(Settings()))
    assert not alone.clear


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--only", "base,what"], "--only must be of base, raw-gates"),
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--data", "nowhere"], "--data nowhere: no such file or folder"),
    ],
)
def test_bad_input_is_one_clear_line(flags, message, tmp_path, capsys):
    assert ablation.main(["--quick", "--out", str(tmp_path / "out"), *flags]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("content", "message"), [("{", "cannot be read"), ("{}", "holds runs of other settings")])
def test_results_of_another_base_are_not_mixed(tiny, content, message, text, tmp_path, capsys):
    (tmp_path / "ablation.json").write_text(content)
    assert ablation.main(["--quick", "--data", str(text), "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert (tmp_path / "ablation.json").read_text() == content


def test_the_committed_page_has_the_committed_figures():
    page = Path(EXAMPLES / "ablation.md").read_text()
    result = json.loads((EXAMPLES / "ablation.json").read_text())
    base = Settings.from_dict(result["base"])
    assert table(rows(result, variants(base))) in page
    assert base == dataclasses.replace(ablation.SIZES, data=())
