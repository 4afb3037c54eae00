"""The example's FFNs: a pyramid of experts, PR-MoE's dense FFN beside them, and other systems' layers."""

import dataclasses
import json
import math

import pytest
import torch
import train_lm
from lm import checkpoint
from lm.layers import moe_configs, sees_later_tokens
from lm.loads import Loads
from lm.model import ByteLM, count_parameters
from lm.settings import Settings, UsageError
from lm.training import Run, train
from lm_cases import CPU, TINY, command_line, never

import dmoe

PYRAMID = dataclasses.replace(TINY, experts=(2, 6), top_k=1, residual=True, compare_dense=False)
PRESETS = list(dmoe.presets.NAMES)
PRESET = dataclasses.replace(TINY, top_k=None, compare_dense=False, ffn=16, experts=8, steps=3)


def of_preset(name, **changes):
    published = dmoe.presets.NAMES[name]().top_k
    return dataclasses.replace(PRESET, preset=name, top_k=min(2, published), **changes)


# ------------------------------------------------------------------------------------------------ pyramid and residual


def test_a_pyramid_beside_dense_ffns_trains_and_is_drawn(text, tmp_path):
    out = tmp_path / "out"
    flags = ["--experts", "2,6", "--top-k", "1", "--residual", "--steps", "12", "--eval-every", "6", "--compare-dense"]
    assert train_lm.main(command_line(text, out, *flags)) == 0
    summary = json.loads((out / "report.json").read_text())
    assert summary["settings"]["experts"] == [2, 6]
    for entry in summary["routing"]:
        assert [len(load) for load in entry["load"]] == [2, 6]
        assert [sum(load) / len(load) for load in entry["load"]] == pytest.approx([1, 1], abs=1e-6)
        assert entry["dropped"] == [0, 0]
        assert 0 < entry["entropy"][0] <= math.log(2) + 1e-6
        assert 0 < entry["entropy"][1] <= math.log(6) + 1e-6
    first, last = summary["models"]["moe"]["curve"]
    assert last["held_out_bpb"] < first["held_out_bpb"]
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")
    # ... and goes on without flags, or with the same ones.
    assert train_lm.main(["--out", str(out), "--resume", "--experts", "2,6", "--residual"]) == 0


def test_parameters_of_a_pyramid_are_counted_layer_by_layer():
    s = PYRAMID
    mixture, twin = ByteLM(s), ByteLM(s, dense=True)
    moe, dense = count_parameters(mixture), count_parameters(twin)
    one = 3 * s.hidden * s.ffn  # gate, up, down
    routers = (2 + 6) * s.hidden + 2 * (2 * s.hidden + 2)  # two coefficients a layer, with biases
    assert moe["router"] == routers
    assert moe["total"] == sum(parameter.numel() for parameter in mixture.parameters())
    assert moe["active_ffn"] == dense["active_ffn"] == 2 * 2 * one  # in two layers an expert and the dense FFN
    assert moe["active"] == moe["total"] - (1 + 5) * one
    assert moe["active"] - moe["router"] == dense["active"] == dense["total"]


def test_the_residual_layer_is_the_weighted_sum_of_both():
    torch.manual_seed(0)
    block = ByteLM(PYRAMID).blocks[1].eval()
    x = torch.randn(2, 5, PYRAMID.hidden)
    tokens = torch.zeros(2, 5, dtype=torch.int64)
    with torch.no_grad():
        weights = torch.softmax(x @ block.ffn.coefficient.weight.T + block.ffn.coefficient.bias, -1)
        expected = weights[..., :1] * block.ffn.moe(x) + weights[..., 1:] * block.ffn.mlp(x)
        torch.testing.assert_close(block.ffn(x, token_ids=tokens), expected)
    assert block.ffn.mlp.down_proj.weight.shape == (PYRAMID.hidden, PYRAMID.ffn)
    assert block.ffn.moe.config.num_experts == 6


def test_experts_of_each_layer_learn_at_their_own_rate(corpus):
    settings = dataclasses.replace(PYRAMID, steps=1, warmup=1, eval_every=1, lr=0.1, weight_decay=0.0)
    run = Run("moe", settings, corpus, CPU)
    before = {name: parameter.detach().clone() for name, parameter in run.model.named_parameters()}
    train([run], lambda: None, never)
    # Adam's first step moves every weight that has a gradient by the rate.
    for name, parameter in run.model.named_parameters():
        experts = {"0": 2, "1": 6}[name.split(".")[1]] if ".experts." in name else 1
        moved = float((parameter.detach() - before[name]).abs().max())
        assert moved == pytest.approx(0.1 * math.sqrt(1 / experts), rel=1e-3), name


def test_a_pyramid_resumes_to_the_same_bits(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("lm.training.ROUTING_POINTS", 2)  # the stop comes inside an entry
    whole, first, second = (Run("moe", PYRAMID, corpus, CPU) for _ in range(3))
    train([whole], lambda: None, never)
    train([first], lambda: None, lambda: first.step >= 4)
    checkpoint.save(tmp_path, PYRAMID, corpus, [first])
    saved = checkpoint.load(tmp_path)
    assert Settings.from_dict(saved["settings"]) == PYRAMID
    checkpoint.restore(saved, corpus, [second])
    train([second], lambda: None, never)
    assert second.routing == whole.routing
    for (name, expected), actual in zip(whole.model.named_parameters(), second.model.parameters(), strict=True):
        assert torch.equal(expected, actual), name


def test_a_checkpoint_of_before_pyramids_goes_on(corpus, tmp_path):
    """It had a table of loads, a row for each layer, and knew nothing of drops, presets and teachers."""
    settings = dataclasses.replace(TINY, compare_dense=False)
    whole, first, second = (Run("moe", settings, corpus, CPU) for _ in range(3))
    train([whole], lambda: None, never)
    train([first], lambda: None, lambda: first.step >= 3)
    checkpoint.save(tmp_path, settings, corpus, [first])
    old = checkpoint.load(tmp_path)
    for name in ("residual", "preset", "teacher", "kd_temperature", "kd_coefficient", "kd_stop"):
        del old["settings"][name]
    del old["teacher"]
    sums = old["runs"]["moe"]["sums"]
    del sums["dropped"]
    sums["load"] = sums["load"].view(2, 4)
    assert Settings.from_dict(old["settings"]) == settings
    checkpoint.restore(old, corpus, [second])
    train([second], lambda: None, never)
    assert second.routing == whole.routing
    for expected, actual in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(expected, actual)


# ------------------------------------------------------------------------------------------------------------- presets


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_its_layer_and_sees_later_bytes_only_where_it_says_so(name):
    torch.manual_seed(0)
    settings = of_preset(name, seq_len=48)
    model = ByteLM(settings).eval()
    configs = [layer.config for layer in model.moe_layers]
    published = dmoe.presets.NAMES[name]()
    for config in configs:
        assert (config.hidden_size, config.ffn_hidden_size, config.num_experts) == (16, 16, 8)
        for field in ("activation", "gated", "bias", "score_function", "capacity_factor", "drop_order"):
            assert getattr(config, field) == getattr(published, field), field
        assert [loss for loss, _ in config.coefficients] == [loss for loss, _ in published.coefficients]
        assert type(config.family) is type(published.family)
    if sees_later_tokens(configs[0]):
        return
    tokens = torch.randint(256, (1, 48))
    changed = tokens.clone()
    changed[0, 24:] = (changed[0, 24:] + torch.randint(1, 256, (24,))) % 256
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :24], after[:, :24])
    assert not torch.allclose(before[:, 24:], after[:, 24:])


def test_expert_choice_sees_later_bytes_and_the_report_says_so(text, tmp_path):
    torch.manual_seed(0)
    model = ByteLM(of_preset("expert_choice")).eval()
    tokens = torch.randint(256, (1, 16))
    changed = tokens.clone()
    changed[0, 8:] = (changed[0, 8:] + 7) % 256
    with torch.no_grad():
        assert not torch.allclose(model(tokens)[:, :8], model(changed)[:, :8], atol=1e-5)
    out = tmp_path / "out"
    assert train_lm.main(command_line(text, out, "--preset", "expert_choice", "--top-k", "1", "--steps", "2")) == 0
    notes = json.loads((out / "report.json").read_text())["notes"]
    assert any(note.startswith("held-out bits per byte see later bytes: experts choose") for note in notes)


def test_what_a_preset_says_of_groups_and_shared_experts_shrinks_with_the_sizes():
    """DeepSeek-V2: 160 experts 1536 wide in 8 groups, of which 3 are looked at, and a shared one of 3072."""
    config = moe_configs(of_preset("deepseek_v2"))[0]
    assert config.shared_ffn_hidden_size == 2 * 16
    assert (config.num_groups, config.top_k_groups) == (4, 2)  # two experts in a group
    assert moe_configs(of_preset("deepseek_v2", experts=32))[0].num_groups == 8
    assert moe_configs(of_preset("deepseek_v3", experts=7))[0].num_groups == 1
    assert moe_configs(of_preset("olmoe"))[0].shared_ffn_hidden_size is None


def test_a_presets_layers_begin_as_they_say_at_this_width():
    torch.manual_seed(0)
    model = ByteLM(of_preset("deepseek_v3", hidden=32, ffn=64))
    config = model.moe_layers[0].config
    assert config.init_std == pytest.approx(0.006 * math.sqrt(7168 / 32))
    for name, parameter in model.moe_layers[0].named_parameters():
        assert float(parameter.detach().std()) == pytest.approx(config.init_std, rel=0.1), name
    # ... and all else by the example's own rule.
    assert float(model.blocks[0].attention.qkv.weight.detach().std()) == pytest.approx(32**-0.5, rel=0.1)


def test_bytes_are_the_ids_by_which_hash_layers_route(corpus):
    settings = of_preset("hash_layer", experts=(4, 8))
    run = Run("hash_layer", settings, corpus, CPU)
    tokens = torch.randint(256, (3, 16))
    run.model(tokens)
    for layer, experts in zip(run.model.moe_layers, (4, 8), strict=True):
        table = layer.config.router.experts_of_ids(experts).flatten()
        assert torch.equal(layer.last_metrics.tokens_per_expert, table[tokens.flatten()].bincount(minlength=experts))


def test_a_selection_bias_moves_in_training_and_not_in_the_warm_up(corpus):
    settings = of_preset("deepseek_v3")
    cold, warm = (Run("deepseek_v3", settings, corpus, CPU) for _ in range(2))
    warm.warm_up(2)
    counts = [layer.router.load_since_update for layer in warm.model.moe_layers]
    assert not any(count.any() for count in counts)
    biases = [layer.router.selection_bias for layer in warm.model.moe_layers]
    assert not any(bias.any() for bias in biases)
    for run in (cold, warm):
        train([run], lambda: None, never)
    assert all(bias.any() for bias in biases)
    assert all(float(bias.abs().max()) <= 3 * 1e-3 + 1e-6 for bias in biases)  # three steps of 0.001
    for before, after in zip(cold.model.state_dict().values(), warm.model.state_dict().values(), strict=True):
        assert torch.equal(before, after)


def test_what_a_capacity_drops_is_counted(corpus):
    settings = of_preset("switch")
    run = Run("switch", settings, corpus, CPU)
    with torch.no_grad():
        for layer in run.model.moe_layers:  # every token to one expert, which takes 1.25 / 8 of them
            layer.router.weight.zero_()
    run._update(0, rate=0.0)
    loads = Loads(run.model.moe_layers, CPU)
    loads.add(1.0)
    told = loads.told(run.ranks)
    kept = int(1.25 * 2 * 16 / 8)
    assert told["dropped"] == pytest.approx([1 - kept / 32] * 2)
    assert told["load"] == [[8, 0, 0, 0, 0, 0, 0, 0]] * 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--preset", "nobody"], "--preset must be one of switch, gshard"),
        (["--preset", "olmoe"], "--preset olmoe: MoEConfig: top_k: expected at most num_experts = 4"),
        (["--preset", "switch", "--balance", "0.1"], "--balance: --preset switch has its own losses"),
        (["--preset", "switch", "--compare-dense"], "--compare-dense: the dense twin is that of the example's own"),
        (["--experts", "4,4,4"], "--experts must be one number, or one for each of the 2 layers (--layers), got 4,4,4"),
        (["--experts", "4,0"], "--experts must be at least 1, got 4,0"),
        (["--experts", "4,1", "--top-k", "2"], "--top-k must be at most --experts (4,1), got 2"),
    ],
)
def test_bad_layers_are_one_clear_line(text, tmp_path, capsys, flags, message):
    line = command_line(text, tmp_path / "out")
    if "--preset" in flags:
        at = line.index("--top-k")
        del line[at : at + 2]
    assert train_lm.main([*line, *flags]) == 2
    error = capsys.readouterr().err
    assert f"error: {message}" in error
    assert not (tmp_path / "out").exists()


def test_what_is_no_list_of_numbers_is_refused(text, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        train_lm.main(command_line(text, tmp_path / "out", "--experts", "4,x"))
    assert "--experts: expected a number, or numbers as 4,4,8,8, got '4,x'" in capsys.readouterr().err


def test_a_batch_that_a_preset_cannot_take_is_said(corpus, monkeypatch):
    run = Run("switch", of_preset("switch"), corpus, CPU)

    def refuse(*_, **__):
        raise ValueError("MoE: x: expected a number of tokens divisible by 8")

    monkeypatch.setattr(run.model.moe_layers[0].router, "forward", refuse)
    with pytest.raises(UsageError, match="--preset switch: MoE: x: expected a number of tokens"):
        run.warm_up()
