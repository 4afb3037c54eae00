"""What is no state of an adapter, and no option of one, is said in a sentence."""

from __future__ import annotations

import pytest
import torch

import dmoe


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"config": [], "tensors": {}}, r"config: expected a dict with names, got list"),
        ({"config": {}, "tensors": {}}, r"config: expected a dict with names, one at least, got an empty one"),
        (
            {"config": {"experts": {}}, "tensors": {1: torch.ones(1)}},
            r"tensors: expected a dict with names.* got other keys",
        ),
        ({"config": {"experts": {}}, "tensors": {"a": [1.0]}}, r"a: expected a tensor, got list"),
    ],
)
def test_what_is_no_state_is_said(state, message):
    layer = dmoe.MoE(hidden_size=8, ffn_hidden_size=8, num_experts=2, top_k=1)
    with pytest.raises(TypeError, match=rf"dmoe\.lora\.load_state_dict: {message}"):
        dmoe.lora.load_state_dict(layer, state)
    for fields, what in (({"targets": [1]}, "targets"), ({"layers": 3}, "layers"), ({"dtype": torch.int8}, "dtype")):
        with pytest.raises(TypeError, match=rf"(dmoe\.lora\.add|LoRA): {what}: expected a "):
            dmoe.lora.add(layer, **fields)
