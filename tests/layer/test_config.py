"""The config: every bad value is named, with what was expected."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from helpers import small_config
from hypothesis import given
from hypothesis import strategies as st

from dmoe import ClampedSwiGLU, MoE, MoEConfig

BAD = [
    ({"hidden_size": 0}, "hidden_size: expected at least 1, got 0"),
    ({"hidden_size": 8.0}, "hidden_size: expected an integer, got 8.0"),
    ({"num_experts": True}, "num_experts: expected an integer, got True"),
    ({"num_experts": 0}, "num_experts: expected at least 1, got 0"),
    ({"ffn_hidden_size": 0}, "ffn_hidden_size: expected an integer of at least 1, or a list, got 0"),
    ({"ffn_hidden_size": [4, 4]}, "ffn_hidden_size: expected num_experts = 4 widths of at least 1"),
    ({"ffn_hidden_size": [4, 4, 0, 4]}, "ffn_hidden_size: expected num_experts = 4 widths of at least 1"),
    ({"top_k": 5}, "top_k: expected at most num_experts = 4, got 5"),
    ({"top_k": 0}, "top_k: expected at least 1, got 0"),
    ({"activation": "swish"}, "activation: expected gelu, .*, sigmoid or silu, .*ClampedSw.*'swish'"),
    ({"activation": None}, "activation: expected gelu, .*, relu_squared, sigmoid or silu, a dmoe.Cl.*got None"),
    ({"activation": "clamped_swiglu(7,1.0,0.0)"}, "activation: expected gelu, .*got 'clamped_swiglu(7,1.0,0.0"),
    ({"activation": {"limit": 7.0}}, "activation: expected gelu, .* got {'limit': 7.0}"),
    (
        {"activation": ClampedSwiGLU(), "gated": False},
        "activation: expected one of gelu, .*, silu with gated=False, got ClampedSwiGLU(limit=7.0, ",
    ),
    ({"gated": 1}, "gated: expected True or False, got 1"),
    ({"expert_dropout": 1.0}, "expert_dropout: expected 0 <= p < 1, got 1.0"),
    ({"activation_dropout": "x"}, "activation_dropout: expected a number, got 'x'"),
    ({"return_bias": True}, "return_bias: expected False unless bias='output', got True"),
    ({"shared_expert_gate": True}, "shared_expert_gate: expected False without shared_ffn_hidden_size, got True"),
    ({"gate_normalization": 0.5}, "gate_normalization: expected a finite p >= 1, or None, got 0.5"),
    ({"score_function": "sigmoid", "softmax_order": "after_topk"}, "softmax_order: expected 'before_topk' with"),
    ({"num_groups": 3}, "num_groups: expected a divisor of num_experts = 4, got 3"),
    ({"num_groups": 2, "top_k_groups": 3}, "top_k_groups: expected 1 to num_groups = 2, or None, got 3"),
    ({"num_groups": 4, "top_k_groups": 1}, "top_k: expected at most 1, the experts in top_k_groups groups, got 2"),
    ({"capacity": -1}, "capacity: expected at least 0 rows, or None, got -1"),
    ({"capacity": 2, "capacity_factor": 1.0}, "capacity_factor: expected None when capacity = 2 is given, got 1.0"),
    ({"capacity_factor": math.inf}, "capacity_factor: expected a finite number, or None, got inf"),
    ({"eval_capacity_factor": math.nan}, "eval_capacity_factor: expected a finite number, or None, got nan"),
    ({"eval_capacity_fraction": 0.0}, "eval_capacity_fraction: expected 0 < share <= 1, or None, got 0.0"),
    ({"capacity_multiple_of": 0}, "capacity_multiple_of: expected at least 1, got 0"),
    ({"token_groups": 0}, "token_groups: expected an integer of at least 1, or 'sequence', got 0"),
    ({"token_groups": "row"}, "token_groups: expected an integer of at least 1, or 'sequence', got 'row'"),
    ({"capacity_over": "group", "drop_order": "random"}, "drop_order: expected 'token_major' or 'choice_major' with"),
    ({"capacity_over": "group", "token_groups": 2}, "token_groups: expected 1 with capacity_over='group', got 2"),
    ({"losses": {"z": -1.0}}, "losses: expected a mapping of names to coefficients of at least 0"),
    ({"losses": "z"}, "losses: expected a mapping of names to coefficients of at least 0"),
    ({"init": "swich"}, "init: expected one of 'linear', 'switch', 'vmoe'"),
    ({"init": "switch", "init_std": 0.02}, "init: expected 'linear' when init_std = 0.02 is given, got 'switch'"),
    ({"frozen_down_bias": True}, "frozen_down_bias: expected False without bias='expert', got True"),
    ({"router": "topk"}, "router: expected one of 'base', 'cosine', 'expert_choice'.*got 'topk'"),
    ({"router": 3}, "router: expected one of 'base', 'cosine', 'expert_choice'.*got 3"),
    ({"selection_bias_decay": 1.0}, "selection_bias_decay: expected 0 <= share < 1, got 1.0"),
    ({"selection_bias": True, "selection_bias_rule": "quantile", "top_k": 4}, "top_k: expected less than num_experts"),
    ({"selection_bias_on": "logits"}, "selection_bias_on: expected 'scores' without selection_bias=True and its rule"),
    ({"selection_bias": True, "selection_bias_on": "logits", "num_groups": 2}, "num_groups: expected 1 with selection"),
    ({"router_logit_softcap": 0.0}, "router_logit_softcap: expected a positive number, or None, got 0.0"),
    ({"input_jitter_on": "experts"}, "input_jitter_on: expected one of 'router', 'layer', got 'experts'"),
    ({"drop_order": None}, "drop_order: expected one of 'token_major'"),
    ({"load_balancing_coefficient": -1.0}, "load_balancing_coefficient: expected at least 0, got -1.0"),
    ({"num_moe_layers": 0}, "num_moe_layers: expected at least 1, got 0"),
    ({"backend": "cuda"}, "backend: expected one of 'grouped', 'block_sparse', 'torch', 'reference', None, got 'cuda'"),
    ({"router": "expert_choice"}, "router: expected 'top_k' in a causal model.*causal=False.*allow_future_leak=True"),
    ({"router": "expert_choice", "causal": False, "capacity": 3}, "capacity: expected no value with router="),
    ({"router": "expert_choice", "causal": False, "capacity_factor": 0.0}, "capacity_factor: expected a positive"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "message"), BAD, ids=lambda value: str(value)[:40])
def test_bad_values_are_named(fields, message):
    with pytest.raises(ValueError, match=f"MoEConfig: {message}".replace("(", r"\(")):
        small_config(**fields)


def test_expert_choice_in_a_causal_model_only_by_name():
    small_config(router="expert_choice", causal=False)
    small_config(router="expert_choice", allow_future_leak=True)


def test_config_is_frozen_hashable_and_lists_become_tuples():
    config = small_config(ffn_hidden_size=[1, 2, 3, 4])
    assert config.ffn_sizes == (1, 2, 3, 4)
    assert hash(config) == hash(dataclasses.replace(config))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.top_k = 3


def test_every_field_is_documented():
    for field in dataclasses.fields(MoEConfig):
        assert field.name in MoEConfig.__doc__


@given(st.integers(0, 300), st.integers(1, 9), st.integers(1, 3), st.sampled_from([0.3, 1.0, 1.25, 2.0]))
def test_capacity_formulas(tokens, experts, top_k, factor):
    top_k = min(top_k, experts)

    def capacity(formula, minimum=0):
        config = small_config(
            num_experts=experts, top_k=top_k, capacity_factor=factor, capacity_formula=formula, min_capacity=minimum
        )
        return config.capacity_for(tokens)

    share = factor * tokens / experts
    of_all = factor * (tokens * top_k / experts)  # floor's order of operations: another may round across an integer
    most = tokens * top_k
    assert capacity("ceil") == min(-int(-(factor * (tokens * top_k) / experts) // 1), most)
    assert capacity("floor") == min(int(of_all // 1), most)
    assert capacity("ceil_per_choice") == min(top_k * -int(-share // 1), most)
    assert capacity("floor", 7) == min(max(int(of_all // 1), 7), most)
    assert small_config(capacity=5).capacity_for(tokens) == 5
    assert small_config().capacity_for(tokens) is None


@given(tokens=st.integers(0, 2**20), experts=st.integers(1, 512), factor=st.floats(0.01, 30))
def test_capacity_in_float32(tokens, experts, factor):
    config = small_config(
        num_experts=experts, top_k=1, capacity_factor=factor, capacity_formula="ceil_float32", min_capacity=0
    )
    rows = (torch.tensor(tokens / experts) * torch.tensor(factor)).ceil()  # DeepSpeed's arithmetic
    assert config.capacity_for(tokens) == min(int(rows), tokens)


def test_a_compiler_follows_the_capacity_in_float32():
    layer = MoE(small_config(capacity_factor=1.2, capacity_formula="ceil_float32", load_balancing_coefficient=0.0))
    x = torch.randn(9, 8)
    assert torch.equal(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))


def test_fields_or_config_but_not_both():
    config = small_config()
    assert MoE(config).config is config
    with pytest.raises(TypeError, match=r"MoE: expected a config or its fields.*top_k"):
        MoE(config, top_k=1)
    with pytest.raises(TypeError, match="hidden_sizes"):
        MoE(hidden_sizes=8)
