"""MoEGPTConfig in files, and what configs and models refuse."""

from __future__ import annotations

import json

import pytest
import torch
from gpt_cases import GATED, ROTARY, small_config, small_model

from dmoe import MoEConfig
from dmoe.models import KeyValueCache, MoEGPT, MoEGPTConfig


def test_the_config_comes_back_from_json():
    for changes in ({}, {**ROTARY, **GATED}, {"moe": {}, "residual": {}}):
        config = small_config(**changes)
        back = MoEGPTConfig.from_json(json.loads(json.dumps(config.to_json())))
        assert back == config
        assert list(back.moe) == sorted(config.moe)
        assert hash(back) == hash(config)


MOE = {"hidden_size": 16, "ffn_hidden_size": 12, "num_experts": 4}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, "vocab_size: expected an integer of at least 1, got 0"),
        ({"num_layers": 2.0}, "num_layers: expected an integer of at least 1, got 2.0"),
        ({"num_heads": 3}, "num_heads: expected a divisor of H = 16, got 3"),
        ({"num_heads": 16, "positions": "rotary"}, "num_heads: expected heads of an even number of channels"),
        ({"norm": "batch"}, "norm: expected one of layer, rms, got 'batch'"),
        ({"norm_eps": None}, "norm_eps: expected a number"),
        ({"activation": "mish"}, "activation: expected one of gelu"),
        ({"bias": 1}, "bias: expected True or False, got 1"),
        ({"moe": {3: MoEConfig(**MOE)}}, r"moe: expected a mapping of layer numbers in \[0, 3\)"),
        ({"moe": {1: MOE}, "residual": {}}, "moe: layer 1: expected a MoEConfig, got dict"),
        ({"moe": {1: MoEConfig(**{**MOE, "hidden_size": 8})}, "residual": {}}, "expected hidden_size = 16, got 8"),
        ({"moe": {1: MoEConfig(**MOE, bias="output", return_bias=True)}, "residual": {}}, "return_bias=False"),
        ({"residual": {0: 4}}, "residual: expected widths of at least 1 for layers in moe"),
        ({"residual": {2: 0}}, "residual: expected widths of at least 1 for layers in moe"),
    ],
    ids=str,
)
def test_bad_configs_are_told(changes, message):
    with pytest.raises(ValueError, match=message):
        small_config(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"color": 1}, "expected its own fields, got color"),
        ({"moe": {"one": {}}}, "moe: expected an object by layer number"),
        ({"moe": {"1": {"hidden_size": 16}}}, "config_from_json: expected .* got none of"),
        ({"residual": [1]}, "residual: expected an object by layer number"),
        ({"positions": []}, "positions: expected one of learned, rotary"),
    ],
    ids=str,
)
def test_bad_json_is_told(changes, message):
    with pytest.raises(ValueError, match=message):
        MoEGPTConfig.from_json({**small_config().to_json(), **changes})
    with pytest.raises(ValueError, match="got none of vocab_size"):
        MoEGPTConfig.from_json({})


def test_bad_inputs_are_told():
    model = small_model()
    with pytest.raises(ValueError, match=r"tokens: expected \(B, S\) of int64, got \(3,\)"):
        model(torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match="tokens: expected at most max_positions = 20 of them, got 21"):
        model(torch.zeros(1, 21, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"token_mask: expected \(1, 3\) of torch.bool, got \(1, 2\)"):
        model(torch.zeros(1, 3, dtype=torch.int64), token_mask=torch.ones(1, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="capacity: expected at most max_positions = 20, got 21"):
        model.new_cache(1, 21)
    with pytest.raises(ValueError, match="cache: expected one of 1 sequences, got 2"):
        model(torch.zeros(1, 3, dtype=torch.int64), cache=model.new_cache(2, 4))
    cache = KeyValueCache(model.config, 1, 4, dtype=torch.float64)
    model(torch.zeros(1, 3, dtype=torch.int64), cache=cache)
    with pytest.raises(ValueError, match="expected at most 4 tokens of a sequence, its capacity, got 3 and 2 more"):
        model(torch.zeros(1, 2, dtype=torch.int64), cache=cache)
    with pytest.raises(TypeError, match="config: expected a MoEGPTConfig, got dict"):
        MoEGPT({})
