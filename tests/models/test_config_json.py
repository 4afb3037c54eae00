"""Configs as JSON: what goes in comes out, and what is wrong is told in one sentence."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dmoe
from dmoe import MoEConfig, config_from_json, config_to_json, presets
from dmoe.routing import Cosine, Hash, RouterFamily, TopK

SIZES = {"hidden_size": 16, "ffn_hidden_size": 24, "num_experts": 16}
ARGUMENTS = [
    ("switch", {"fine_tuning": True}),
    ("gshard", {"token_groups": 2, "second_expert": "sampling"}),
    ("hash_layer", {"frequencies": list(range(50))}),
    ("swin_moe", {"cosine": True}),
    ("deepspeed", {"drop_tokens": False, "use_rts": False}),
    ("deepseek_v4", {"hash_table": [[i % 16, (i + 3) % 16] for i in range(50)], "top_k": 2}),
]


def through_text(config):
    return config_from_json(json.loads(json.dumps(config_to_json(config), allow_nan=False)))


@pytest.mark.parametrize(("name", "more"), [*((name, {}) for name in presets.NAMES), *ARGUMENTS], ids=str)
def test_presets_come_back(name, more):
    for config in (presets.get(name, **more), presets.get(name, **SIZES, **more)):
        back = through_text(config)
        assert back == config
        assert hash(back) == hash(config)
        assert type(back.family) is type(config.family)
        assert back.ffn_sizes == config.ffn_sizes


OPTIONS = {
    "ffn_hidden_size": st.one_of(st.integers(1, 64), st.lists(st.integers(1, 64), min_size=4, max_size=4)),
    "top_k": st.integers(1, 3),
    "activation": st.sampled_from(["gelu", "silu", dmoe.ClampedSwiGLU(3.0), dmoe.SoftcappedSwiGLU(4.0, 25.0)]),
    "bias": st.sampled_from(["none", "expert", "output"]),
    "expert_dropout": st.floats(0, 0.9),
    "shared_ffn_hidden_size": st.none() | st.integers(1, 32),
    "router": st.sampled_from(["top_k", TopK(), TopK(logit_noise="gaussian", noise_std=0.5), Cosine(dim=8)]),
    "gate_normalization": st.none() | st.just(1.0),
    "capacity_factor": st.none() | st.floats(0.5, 4.0),
    "drop_order": st.sampled_from(["token_major", "choice_major", "batch_prioritized"]),
    "losses": st.none() | st.dictionaries(st.sampled_from(["load_balancing", "z"]), st.floats(0, 1)),
    "num_moe_layers": st.integers(1, 12),
    "wire_dtype": st.sampled_from([None, "fp8"]),
}


@given(st.fixed_dictionaries({}, optional=OPTIONS))
def test_options_come_back_and_defaults_are_not_written(options):
    config = MoEConfig(**{"hidden_size": 8, "ffn_hidden_size": 12, "num_experts": 4, **options})
    written = config_to_json(config)
    assert through_text(config) == config
    for name, value in written.items():
        default = MoEConfig.__dataclass_fields__[name].default
        assert default is dataclasses.MISSING or getattr(config, name) != default, (name, value)


def test_what_is_written():
    config = MoEConfig(hidden_size=8, ffn_hidden_size=[3, 4], num_experts=2, router=Cosine(dim=4), losses={"z": 0.5})
    assert config_to_json(config) == {
        "hidden_size": 8,
        "ffn_hidden_size": [3, 4],
        "num_experts": 2,
        "router": {"name": "cosine", "dim": 4},
        "losses": {"z": 0.5},
    }
    assert config_to_json(MoEConfig(hidden_size=8, ffn_hidden_size=3, num_experts=2, router=TopK())) == {
        "hidden_size": 8,
        "ffn_hidden_size": 3,
        "num_experts": 2,
    }
    gpt_oss = MoEConfig(hidden_size=8, ffn_hidden_size=3, num_experts=2, activation=dmoe.ClampedSwiGLU(5.0))
    assert config_to_json(gpt_oss)["activation"] == {"limit": 5.0, "alpha": 1.702, "up_offset": 1.0}
    by_text = {"hidden_size": 8, "ffn_hidden_size": 3, "num_experts": 2, "activation": str(dmoe.ClampedSwiGLU(5.0))}
    assert config_from_json(by_text) == gpt_oss
    table = config_to_json(MoEConfig(**SIZES, top_k=1, router=Hash(table=torch.tensor([3, 1, 2]))))
    assert table["router"] == {"name": "hash", "table": [3, 1, 2]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_q": 2}, "expected fields of MoEConfig, got top_q"),
        ({"router": "nobody"}, "router: expected one of .*'top_k'.* got 'nobody'"),
        ({"router": {"name": "os.system"}}, "router: expected a name, one of .*, got 'os.system'"),
        ({"router": {"dim": 3}}, "router: expected a name, one of .*, got None"),
        ({"router": {"name": "cosine", "dims": 3}}, "router 'cosine': expected options of it, got dims"),
        ({"router": {"name": "cosine", "dim": "wide"}}, "Cosine: dim: expected an integer, got 'wide'"),
        ({"router": 3}, "router: expected an object with names, got 3"),
        ({"router": {"name": []}}, r"router: expected a name, one of .*, got \[\]"),
        ({"losses": [["z", 1]]}, "losses: expected an object with names"),
        ({"losses": {"z": "much"}}, "losses: expected a mapping"),
        ({"top_k": "2"}, "top_k: expected an integer, got '2'"),
        ({"top_k": True}, "top_k: expected an integer, got True"),
        ({"ffn_hidden_size": "wide"}, "ffn_hidden_size: expected an integer, or a list"),
        ({"ffn_hidden_size": [3, "a"]}, "ffn_hidden_size: expected an integer, or a list"),
        ({"activation": {"limit": "x", "alpha": 1, "up_offset": 0}}, "limit: expected a finite number"),
        ({"activation": ["silu"]}, "activation: expected gelu"),
        ({"drop_order": {}}, "drop_order: expected one of"),
        ({"gated": 1}, "gated: expected True or False, got 1"),
    ],
    ids=str,
)
def test_bad_values_are_told_in_one_sentence(change, message):
    with pytest.raises(ValueError, match=message) as told:
        config_from_json({"hidden_size": 8, "ffn_hidden_size": 12, "num_experts": 4, **change})
    assert "\n" not in str(told.value)


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
FIELDS = sorted({field.name for field in dataclasses.fields(MoEConfig)})


@given(st.sampled_from(FIELDS), JUNK)
def test_whatever_a_file_holds_is_a_config_or_a_value_error(name, junk):
    values = {"hidden_size": 8, "ffn_hidden_size": 12, "num_experts": 4, name: junk}
    try:
        config = config_from_json(values)
    except ValueError:
        return
    assert isinstance(config, MoEConfig)


@pytest.mark.parametrize("values", [None, 3, [], "text", {3: 4}, {}], ids=str)
def test_no_object_is_a_value_error(values):
    with pytest.raises(ValueError, match="config_from_json"):
        config_from_json(values)


def test_what_a_file_could_not_name_is_refused():
    @dataclasses.dataclass(frozen=True)
    class Mine(RouterFamily):
        pass

    config = MoEConfig(**SIZES, router=Mine())
    with pytest.raises(ValueError, match=r"router: expected a family under dmoe\.routing\.register, got Mine"):
        config_to_json(config)
    with pytest.raises(TypeError, match="expected a MoEConfig, got dict"):
        config_to_json({})
