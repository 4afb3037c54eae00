"""Presets: each one runs, has the published numbers, takes overrides, and says what it is and is not."""

from __future__ import annotations

import dataclasses
import inspect

import pytest
import torch

import dmoe
from dmoe import ClampedSwiGLU, MoE, MoEConfig, presets
from dmoe.presets.__main__ import main
from dmoe.routing import Cosine, ExpertChoice, Hash, TopK

HAS_BASE = hasattr(dmoe.routing, "Base")
BUILT = [name for name in presets.NAMES if HAS_BASE or name != "base_layer"]
SMALL = {"hidden_size": 16, "ffn_hidden_size": 24, "num_experts": 16}
ARGUMENTS = [
    ("switch", {"fine_tuning": True}),
    ("gshard", {"token_groups": 2, "second_expert": "sampling"}),
    ("hash_layer", {"frequencies": list(range(50))}),
    ("vmoe", {"batch_priority": True, "token_groups": 2}),
    ("tutel", {"top_k": 2}),
    ("swin_moe", {"cosine": True}),
    ("deepspeed", {"top_k": 2}),
    ("deepspeed", {"top_k": 3}),
    ("deepspeed", {"drop_tokens": False, "use_rts": False}),
    ("deepseek_v4", {"hash_table": [[i % 16, (i + 3) % 16] for i in range(50)], "top_k": 2}),
]


@pytest.mark.parametrize(("name", "fields"), [*((name, {}) for name in BUILT), *ARGUMENTS], ids=str)
def test_every_preset_trains(name, fields):
    torch.manual_seed(0)
    layer = MoE(presets.get(name, **SMALL, **fields))
    x = torch.randn(2, 32, 16, requires_grad=True)
    y = layer(x, token_ids=torch.randint(50, (2, 32)))
    loss = dmoe.aux_loss(layer)
    (y.square().sum() + loss).backward()
    assert torch.isfinite(y).all()
    assert torch.isfinite(x.grad).all()
    assert (loss.item() > 0) == bool(layer.config.coefficients)
    frozen = {"experts.down_bias"} if layer.config.frozen_down_bias else set()
    assert {parameter for parameter, value in layer.named_parameters() if not value.requires_grad} == frozen
    for parameter, value in layer.named_parameters():
        if parameter not in frozen:
            assert value.grad is not None, parameter
            assert torch.isfinite(value.grad).all(), parameter
            assert value.grad.any(), parameter
    layer.eval()
    assert torch.isfinite(layer(x, token_ids=torch.zeros(2, 32, dtype=torch.long))).all()


@pytest.mark.parametrize("name", presets.NAMES)
def test_docstrings_say_where_it_is_from_and_what_differs(name):
    preset = presets.NAMES[name]
    text = inspect.getdoc(preset)
    assert preset.__name__ == name
    assert "Source:" in text
    assert "Differs from the original:\n    - " in text
    assert text.index("Source:") < text.index("Args:") < text.index("Differs from the original:")
    arguments = text[text.index("Args:") : text.index("Differs")]
    for argument in inspect.signature(preset).parameters:
        assert argument in arguments, argument


PUBLISHED = {
    "switch": {"hidden_size": 768, "num_experts": 128, "top_k": 1, "input_jitter": 0.01, "gate_normalization": None},
    "gshard": {"ffn_hidden_size": 8192, "num_experts": 2048, "top_k": 2, "drop_order": "choice_major"},
    "hash_layer": {"num_experts": 32, "init": "xavier", "bias": "expert", "losses": None},
    "expert_choice": {"num_experts": 64, "causal": False, "router": ExpertChoice(), "gated": True},
    "vmoe": {"num_experts": 8, "top_k": 2, "drop_order": "choice_major", "router": TopK(logit_noise="gaussian")},
    "gmoe": {"hidden_size": 384, "router": Cosine(dim=256, temperature=0.5, logit_noise="gaussian")},
    "tutel": {"top_k": 1, "capacity_formula": "floor_per_choice", "router_dtype": "input"},
    "swin_moe": {"frozen_down_bias": True, "activation_dropout": 0.1, "drop_order": "batch_prioritized"},
    "deepspeed": {"drop_order": "random", "min_capacity": 4, "capacity_formula": "ceil_float32", "bias": "expert"},
    "pr_moe": {"num_experts": 32, "shared_ffn_hidden_size": None, "init_std": 0.014, "drop_order": "random"},
    "nllb": {"num_experts": 128, "normalize_when": "after_drop", "expert_grad_scale": "sqrt_world_size"},
    "mixtral": {"ffn_hidden_size": 14336, "num_experts": 8, "top_k": 2, "softmax_order": "after_topk"},
    "olmoe": {"num_experts": 64, "top_k": 8, "gate_normalization": None, "capacity_factor": None},
    "qwen3": {"ffn_hidden_size": 768, "num_experts": 128, "top_k": 8, "gate_normalization": 1.0},
    "deepseek_v2": {"num_experts": 160, "top_k": 6, "num_groups": 8, "top_k_groups": 3, "gate_scale": 16.0},
    "deepseek_v3": {
        "num_experts": 256,
        "top_k": 8,
        "score_function": "sigmoid",
        "num_groups": 8,
        "top_k_groups": 4,
        "group_score": "top2_sum",
        "gate_scale": 2.5,
        "selection_bias": True,
        "selection_bias_rule": "sign",
        "selection_bias_update_rate": 1e-3,
        "load_balancing_choices": "plain",
    },
    "deepseek_v4": {
        "score_function": "sqrt_softplus",
        "gate_scale": 1.5,
        "top_k": 6,
        "gate_weight_on": "activation",
        "activation": ClampedSwiGLU(10.0, alpha=1.0, up_offset=0.0),
    },
    "gpt_oss": {
        "hidden_size": 2880,
        "top_k": 4,
        "router_bias": True,
        "softmax_order": "after_topk",
        "bias": "expert",
        "activation": ClampedSwiGLU(7.0, alpha=1.702, up_offset=1.0),
    },
    "llama4": {"num_experts": 16, "top_k": 1, "gate_weight_on": "input", "score_function": "sigmoid"},
    "megablocks": {"hidden_size": 1024, "bias": "output", "activation": "gelu_tanh", "capacity": None},
}
LOSSES = {
    "switch": {"load_balancing": 0.01},
    "hash_layer": {},
    "expert_choice": {},
    "vmoe": {"importance": 0.005, "load": 0.005},
    "swin_moe": {"load_importance": 0.01},
    "olmoe": {"load_balancing": 0.01, "z": 0.001},
    "mixtral": {"load_balancing": 2 * 0.02},  # of a loss that is K in Transformers where it is 1 here
    "qwen3": {"global": 8 * 0.001},
    "deepseek_v2": {"sequence": 0.003},
    "deepseek_v3": {"sequence": 1e-4},
    "megablocks": {"load_balancing": 0.1},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_numbers(name):
    config = presets.get(name)
    assert {field: getattr(config, field) for field in PUBLISHED[name]} == PUBLISHED[name]
    if name in LOSSES:
        assert dict(config.coefficients) == LOSSES[name]


@pytest.mark.skipif(not HAS_BASE, reason="dmoe.routing.Base is not there")
def test_published_numbers_of_base_layers():
    config = presets.base_layer()
    assert (config.num_experts, config.top_k, config.coefficients) == (128, 1, ())
    assert config.router == dmoe.routing.Base()
    assert config.allow_future_leak


@pytest.mark.parametrize(
    ("config", "tokens", "training", "evaluation"),
    [
        (presets.switch(), 1024, int(1024 * 1.25 / 128), 16),
        (presets.switch(), 100, 4, 4),
        (presets.gshard(num_experts=8), 50, 12, 12),  # 2 * 50 / 8 = 12.5, floored, a multiple of 4 already
        (presets.gshard(num_experts=8), 60, 16, 16),  # 15
        (presets.vmoe(), 8 * 197, 416, 416),  # 413.7, then a multiple of 4
        (presets.gmoe(), 100, 25, 25),  # int(1.5 * 17)
        (presets.tutel(num_experts=8, top_k=2), 100, 26, 26),
        (presets.deepspeed(num_experts=4, capacity_factor=1.2), 100, 31, 25),  # in float32 1.2 is more than 1.2
        (presets.nllb(), 1000, 16, 1000),
        (presets.mixtral(), 1000, None, None),
    ],
)
def test_capacities_as_the_originals_count_them(config, tokens, training, evaluation):
    assert config.capacity_for(tokens) == training
    assert config.capacity_for(tokens, training=False) == evaluation


def test_named_variants():
    assert presets.switch(fine_tuning=True).activation_dropout == 0.4
    assert presets.switch().activation_dropout == 0.0
    assert presets.vmoe(batch_priority=True).drop_order == "batch_prioritized"
    assert presets.swin_moe(cosine=True).router == Cosine(dim=256, temperature=0.5, logit_noise="gaussian")
    assert presets.gshard(token_groups=4, second_expert="all").router == TopK()
    assert presets.gshard(token_groups=4).token_groups == 4
    second = presets.deepspeed(top_k=2)
    assert second.router == TopK(second_expert="sampling", noise_in_eval=True, masked_tokens="unrouted")
    assert (second.drop_order, second.normalize_when, second.gate_normalization) == ("choice_major", "after_drop", 1.0)
    assert presets.deepspeed(top_k=3).drop_order == "gate_weight"
    assert presets.deepspeed(top_k=2, drop_tokens=False).dropless
    assert presets.tutel(top_k=2).gate_normalization == 1.0
    assert presets.tutel().gate_normalization is None
    lite = presets.deepseek_v2(
        2048, 1408, 64, shared_ffn_hidden_size=2816, num_groups=1, top_k_groups=None, gate_scale=1
    )
    assert (lite.num_experts, lite.top_k, lite.num_groups) == (64, 6, 1)


def test_pr_moe_is_the_half_of_a_residual_layer():
    moe = MoE(presets.pr_moe(16, 24, 4))
    layer = dmoe.ResidualMoE(
        moe, torch.nn.Sequential(torch.nn.Linear(16, 24), torch.nn.GELU(), torch.nn.Linear(24, 16))
    )
    x = torch.randn(2, 8, 16)
    layer(x).sum().backward()
    assert layer.coefficient.weight.grad.any()
    assert moe.router.weight.grad.any()


@pytest.mark.parametrize("name", ["deepspeed", "pr_moe", "nllb"])
def test_padding_of_fairseq_and_deepspeed_counts_in_the_mean_probability(name):
    torch.manual_seed(0)
    layer = MoE(presets.get(name, **SMALL))
    x, mask = torch.randn(4, 16, 16), torch.ones(4, 16, dtype=torch.bool)
    mask[:, 10:] = False
    layer(x, token_mask=mask)
    probs = torch.softmax(layer.router.logits(x.view(-1, 16)), 1)
    first = torch.bincount(probs.argmax(1)[mask.flatten()], minlength=16)
    expected = 16 * (first / 64 * probs.mean(0)).sum() * 0.01
    torch.testing.assert_close(dmoe.aux_loss(layer), expected)


def test_expert_choice_rounds_as_flaxformer_does():
    for tokens, taken in [(88, 1), (152, 2), (160, 2), (224, 4)]:  # T / 64: 1.375, 2.375, 2.5 (half to even), 3.5
        layer = MoE(presets.expert_choice(hidden_size=8, ffn_hidden_size=8))
        layer(torch.randn(tokens, 8))
        assert layer.last_metrics.kept_per_expert.tolist() == [taken] * 64


def test_overrides_are_any_field_and_what_they_replace_gives_way():
    config = presets.switch(32, 64, 4, top_k=2, activation="gelu", num_moe_layers=3)
    assert (config.hidden_size, config.ffn_sizes, config.top_k) == (32, (64,) * 4, 2)
    assert (config.activation, config.num_moe_layers) == ("gelu", 3)
    assert presets.switch(init_std=0.02).init == "linear"
    assert presets.mixtral(init="xavier").init_std is None
    assert presets.switch(capacity=7).capacity_for(1000, training=False) == 7
    assert presets.switch(capacity_factor=None).dropless
    assert presets.nllb(capacity_factor=None).dropless
    assert presets.switch(capacity_factor=None, eval_capacity_factor=1.0).eval_capacity_factor == 1.0
    assert dict(presets.switch(losses={"z": 0.1}).coefficients) == {"z": 0.1}
    assert not presets.swin_moe(bias="none").frozen_down_bias
    assert presets.gshard(router=TopK()).router == TopK()
    assert presets.llama4(ffn_hidden_size=[8, 16], num_experts=2).shared_ffn_hidden_size == 16
    frequencies = [5, 3, 1]
    assert presets.hash_layer(num_experts=2, frequencies=frequencies).router == Hash(frequencies=frequencies)
    assert presets.get("switch", fine_tuning=True) == presets.switch(fine_tuning=True)


@pytest.mark.parametrize(
    ("error", "call", "message"),
    [
        (ValueError, lambda: presets.get("swich"), "presets: expected one of switch, gshard, .*got 'swich'"),
        (ValueError, lambda: presets.table("mixtral", "mixstral"), "presets: expected one of .*got 'mixstral'"),
        (
            TypeError,
            lambda: presets.mixtral(top_p=1, a=2),
            "presets.mixtral: expected its own arguments and .*a, top_p",
        ),
        (
            ValueError,
            lambda: presets.vmoe(load_balancing_coefficient=0.1),
            "presets.vmoe: load_balancing_coefficient: expected losses=.*got 0.1",
        ),
        (ValueError, lambda: presets.vmoe(top_k=9), "MoEConfig: top_k: expected at most num_experts = 8, got 9"),
        (ValueError, lambda: presets.deepseek_v3(num_experts=100), "MoEConfig: num_groups: expected a divisor of"),
    ],
)
def test_errors_name_what_was_expected(error, call, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.skipif(not HAS_BASE, reason="dmoe.routing.Base is not there")
def test_table_of_all():
    text = presets.table()
    lines = text.splitlines()
    assert max(map(len, lines)) <= 120
    assert [line.split()[0] for line in lines[2:] if not line.startswith(" ")] == list(presets.NAMES)


def paragraphs(text):
    """The text below the head by preset."""
    found = {}
    for line in text.splitlines()[2:]:
        if line[0] != " ":
            name = line.split()[0]
        found[name] = [*found.get(name, []), line.strip()]
    return found


def test_table_of_many_has_a_paragraph_each():
    text = presets.table(*BUILT)
    assert max(map(len, text.splitlines())) <= 120
    shown = paragraphs(text)
    assert list(shown) == BUILT
    assert shown["mixtral"][0].split() == ["mixtral", "4096", "14336", "8", "2", "init_std=0.02"]
    assert shown["mixtral"][1:] == ["softmax_order=after_topk", "losses=0.04 load_balancing"]
    assert "router=cosine (logit_noise=gaussian), causal=False" in shown["gmoe"]


def test_table_shows_all_that_differs_from_the_defaults():
    shown = paragraphs(presets.table(*BUILT))
    default = MoEConfig(1, 1, 1, 1)
    told_otherwise = {"router", "losses", "load_balancing_coefficient", "load_balancing_over"}
    told_otherwise |= {"router_z_loss_coefficient", "hidden_size", "ffn_hidden_size", "num_experts", "top_k"}
    for name in BUILT:
        config = presets.get(name)
        for field in {field.name for field in dataclasses.fields(config)} - told_otherwise:
            value, text = getattr(config, field), " ".join(shown[name])
            told = f"{field}={value:g}" if isinstance(value, float) else f"{field}={value}"
            assert (told in text) == (value != getattr(default, field)), (name, field)


def test_table_of_a_few_in_columns():
    assert presets.table("olmoe", "qwen3").splitlines() == [
        "                    default              olmoe                          qwen3",
        "------------------  -------------------  -----------------------------  ------------",
        "hidden_size         -                    2048                           2048",
        "ffn_hidden_size     -                    1024                           768",
        "num_experts         -                    64                             128",
        "top_k               2                    8                              8",
        "init_std            None                 0.02                           0.02",
        "gate_normalization  None                 None                           1",
        "losses              0.01 load_balancing  0.01 load_balancing + 0.001 z  0.008 global",
    ]
    four = presets.table("vmoe", "gshard", "swin_moe", "deepseek_v3").splitlines()
    assert four[0].split() == ["default", "vmoe", "gshard", "swin_moe", "deepseek_v3"]
    assert max(map(len, four)) <= 120


def test_command(capsys):
    assert main(["olmoe", "qwen3"]) == 0
    assert capsys.readouterr().out == presets.table("olmoe", "qwen3") + "\n"
    assert main(["olmo"]) == 2
    assert "error: presets: expected one of switch" in capsys.readouterr().err
