"""Several seeds of the example, the dense twin's own rate, and the options that the ablation turns."""

import dataclasses
import json
import statistics

import pytest
import torch
import train_lm
from lm import checkpoint, report
from lm.layers import moe_configs
from lm.model import ByteLM, count_parameters
from lm.settings import Settings, UsageError
from lm.training import Run, learning_rate, train
from lm_cases import CPU, TINY, command_line, never

SEVERAL = dataclasses.replace(TINY, seed=3, seeds=2, lr=0.01, dense_lr=0.02)


def runs_of(settings, corpus):
    return [Run(name, own, corpus, CPU) for name, own in settings.each_run().items()]


def test_each_seed_has_both_models_and_the_twin_its_own_rate():
    runs = SEVERAL.each_run()
    assert list(runs) == ["moe", "dense", "moe-4", "dense-4"]
    assert [own.seed for own in runs.values()] == [3, 3, 4, 4]
    assert [learning_rate(2, own) for own in runs.values()] == pytest.approx([0.01, 0.02, 0.01, 0.02])
    same = dataclasses.replace(SEVERAL, dense_lr=None).each_run()
    assert {own.lr for own in same.values()} == {0.01}
    assert list(dataclasses.replace(SEVERAL, compare_dense=False, dense_lr=None).each_run()) == ["moe", "moe-4"]


def test_the_report_has_each_seed_and_their_mean(text, tmp_path, capsys):
    flags = ["--steps", "8", "--eval-every", "4", "--compare-dense", "--dense-lr", "0.02"]
    assert train_lm.main(command_line(text, tmp_path / "both", *flags, "--seeds", "2")) == 0
    printed = capsys.readouterr().out
    summary = json.loads((tmp_path / "both" / "report.json").read_text())
    assert train_lm.main(command_line(text, tmp_path / "second", *flags, "--seed", "1")) == 0
    second = json.loads((tmp_path / "second" / "report.json").read_text())
    for name, model in summary["models"].items():
        seeds = model["seeds"]
        assert list(seeds) == ["0", "1"]
        alone = [point["held_out_bpb"] for point in second["models"][name]["curve"]]
        assert [point["held_out_bpb"] for point in seeds["1"]] == alone
        assert [point["step"] for point in model["curve"]] == [4, 8]
        for key in ("held_out_bpb", "seconds"):
            mean = statistics.fmean(curve[-1][key] for curve in seeds.values())
            assert model["final"][key] == pytest.approx(mean)
    differences = [pair["held_out_bpb_moe_minus_dense"] for pair in summary["comparison"]["seeds"].values()]
    assert summary["comparison"]["held_out_bpb_moe_minus_dense"] == pytest.approx(statistics.fmean(differences))
    assert f"seed 1: moe - dense: {differences[1]:+.4f} bits per byte" in printed
    assert (tmp_path / "both" / "report.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("stop_at", [(4, 2, 0, 0), (4, 4, 4, 3)])
def test_seeds_resume_to_the_same_bits(corpus, tmp_path, stop_at):
    whole = runs_of(SEVERAL, corpus)
    train(whole, lambda: None, never)
    first = runs_of(SEVERAL, corpus)
    train(first, lambda: None, lambda: all(run.step >= stop for run, stop in zip(first, stop_at, strict=True)))
    assert tuple(run.step for run in first) == stop_at
    checkpoint.save(tmp_path, SEVERAL, corpus, first)
    saved = checkpoint.load(tmp_path)
    second = runs_of(Settings.from_dict(saved["settings"]), corpus)
    checkpoint.restore(saved, corpus, second)
    train(second, lambda: None, never)
    for expected, actual in zip(whole, second, strict=True):
        assert expected.step == actual.step == SEVERAL.steps
        for parameter, other in zip(expected.model.parameters(), actual.model.parameters(), strict=True):
            assert torch.equal(parameter, other)


def test_minutes_shorten_every_seed(text, tmp_path, monkeypatch):
    monkeypatch.setattr(Run, "warm_up", lambda self, steps=1: 1.0)
    flags = command_line(text, tmp_path / "out", "--steps", "50", "--compare-dense", "--seeds", "2", "--minutes", "0.2")
    assert train_lm.main(flags) == 0  # four models in 12 s, at a second for a step
    saved = checkpoint.load(tmp_path / "out")
    assert saved["settings"]["steps"] == 3
    assert [run["step"] for run in saved["runs"].values()] == [3] * 4


def curve(*points):
    return [{"step": step, "seconds": seconds, "held_out_bpb": bits} for step, seconds, bits in points]


def test_shares_are_those_of_the_means_and_of_each_seed():
    moe = {"0": curve((10, 20, 4.0), (20, 40, 2.0)), "1": curve((10, 20, 4.0), (20, 40, 3.0))}
    dense = {"0": curve((10, 10, 5.0), (20, 20, 3.0)), "1": curve((10, 10, 4.0), (20, 20, 2.8))}
    models = [{"seeds": seeds, "curve": report.mean_curve(list(seeds.values()))} for seeds in (moe, dense)]
    told = report.comparison(*models)
    assert told["seeds"]["0"]["share_of_steps"] == pytest.approx(0.75)
    assert told["seeds"]["0"]["share_of_time"] == pytest.approx(1.5)
    assert told["seeds"]["1"]["dense_final_reached_by_moe"] is None
    assert "share_of_steps" not in told["seeds"]["1"]
    assert told["share_of_steps"] == pytest.approx((10 + 10 * (4 - 2.9) / (4 - 2.5)) / 20)
    assert told["seconds_moe_over_dense"] == 2
    words = report.compared(told)
    assert words[1].endswith("-1.0000 bits per byte; where the twin ends, in 75% of its steps and 150% of its time")
    assert words[2] == "  seed 1: moe - dense: +0.2000 bits per byte"
    assert len(report.compared({**told, "seeds": {"0": told["seeds"]["0"]}})) == 1


def test_options_of_the_layer_reach_it():
    (config, _) = moe_configs(dataclasses.replace(TINY, gate_normalization="none", z_loss=1e-3, shared=24))
    assert config.gate_normalization is None
    assert config.router_z_loss_coefficient == 1e-3
    assert config.shared_ffn_hidden_size == 24
    (config, _) = moe_configs(TINY)
    assert (config.gate_normalization, config.router_z_loss_coefficient, config.shared_ffn_hidden_size) == (1, 0, None)
    assert moe_configs(dataclasses.replace(TINY, top_k=1))[0].gate_normalization is None
    assert moe_configs(dataclasses.replace(TINY, top_k=1, gate_normalization="sum"))[0].gate_normalization == 1


def test_the_dense_twin_multiplies_as_much_as_routed_and_shared_experts():
    settings = dataclasses.replace(TINY, top_k=1, shared=24)
    moe, dense = (count_parameters(ByteLM(settings, dense=dense)) for dense in (False, True))
    assert moe["active_ffn"] == dense["active_ffn"]


def test_routers_begin_with_smaller_weights():
    plain, small = (ByteLM(dataclasses.replace(TINY, router_init=factor)) for factor in (1.0, 0.1))
    ratios = [float(a.router.weight.detach().std() / b.router.weight.detach().std())
              for a, b in zip(small.moe_layers, plain.moe_layers, strict=True)]  # fmt: skip
    assert ratios == pytest.approx([0.1] * len(ratios), rel=0.5)
    same = Run("moe", dataclasses.replace(TINY, router_init=0.0), None, CPU).model  # type: ignore[arg-type]
    assert not any(layer.router.weight.any() for layer in same.moe_layers)


@pytest.mark.parametrize(("power", "scale"), [(0.0, 1.0), (0.25, 0.5**0.25), (1.0, 0.5)])
def test_experts_learn_at_a_power_of_their_share(power, scale):
    run = Run("moe", dataclasses.replace(TINY, expert_lr_power=power), None, CPU)  # type: ignore[arg-type]
    scales = {id(p): group["scale"] for group in run.optimizer.param_groups for p in group["params"]}
    experts = run.model.moe_layers[0].experts
    assert [scales[id(p)] for p in experts.parameters()] == pytest.approx([scale] * 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": 0}, "--seeds must be at least 1, got 0"),
        ({"dense_lr": 0.0}, "--dense-lr must be positive and finite, got 0.0"),
        ({"dense_lr": 0.1, "compare_dense": False}, "--dense-lr: expected --compare-dense"),
        ({"expert_lr_power": -1.0}, "--expert-lr-power must not be negative, got -1.0"),
        ({"gate_normalization": "max"}, "--gate-normalization must be sum or none, got max"),
        ({"z_loss": 0.1, "preset": "switch", "compare_dense": False}, "--z-loss: --preset switch has its own losses"),
        ({"balance": 0.0, "preset": "switch", "compare_dense": False}, "--balance: --preset switch has its own losses"),
        (
            {"router_init": 0.0, "preset": "switch", "compare_dense": False},
            "--router-init: --preset switch has its own",
        ),
        ({"shared": 8, "preset": "switch", "compare_dense": False}, "--shared: --preset switch has its own experts"),
    ],
)
def test_bad_options_are_refused(changes, message):
    with pytest.raises(UsageError) as told:
        dataclasses.replace(TINY, top_k=None, **changes)
    assert message in str(told.value)
