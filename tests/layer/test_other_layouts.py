"""State dicts whose experts lie in another layout: never a layer whose experts stay as they were made."""

from __future__ import annotations

import copy

import pytest
import torch

import dmoe


def layer(**options):
    return dmoe.MoE(hidden_size=4, ffn_hidden_size=6, num_experts=2, top_k=1, **options)


OTHERS = {
    "a module for each expert": ["experts.0.w1.weight", "experts.0.w2.weight", "experts.1.w1.weight"],
    "MegaBlocks'": ["experts.mlp.w1", "experts.mlp.v1", "experts.mlp.w2", "router.layer.weight"],
    "Megatron's": ["experts.local_experts.0.linear_fc1.weight", "experts.linear_fc2.weight0"],
    "experts without a gate": ["experts.up_proj", "experts.down_proj"],
}


@pytest.mark.parametrize("names", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("prefix", ["", "block.ffn."])
@pytest.mark.parametrize("strict", [False, True])
def test_experts_of_another_layout_are_refused(names, prefix, strict):
    model = layer()
    for name in reversed(prefix.split(".")[:-1]):
        model = torch.nn.ModuleDict({name: model})
    with pytest.raises(RuntimeError, match="expected gate_up_proj, down_proj, got experts of another layout") as told:
        model.load_state_dict({prefix + name: torch.zeros(2) for name in names}, strict=strict)
    assert f"{prefix}experts: expected gate_up_proj, down_proj, got" in str(told.value)
    assert names[0].removeprefix("experts.") in str(told.value)


@pytest.mark.parametrize("options", [{}, {"bias": "expert"}, {"shared_ffn_hidden_size": 8}])
def test_what_may_be_left_out_still_may(options):
    """Nothing of the experts, or some of their own: what ``strict=False`` is for."""
    model = layer(**options)
    before = copy.deepcopy(model.state_dict())
    told = model.load_state_dict({"router.weight": torch.ones(2, 4), "other": torch.ones(1)}, strict=False)
    assert told.unexpected_keys == ["other"]
    assert torch.equal(model.router.weight, torch.ones(2, 4))
    told = model.load_state_dict({"experts.down_proj": torch.ones(2, 4, 6)}, strict=False)
    assert "experts.gate_up_proj" in told.missing_keys
    assert torch.equal(model.experts.gate_up_proj, before["experts.gate_up_proj"])
    assert torch.equal(model.experts.down_proj, torch.ones(2, 4, 6))


def test_a_parameter_that_somebody_added_loads_alone():
    """An adapter's file holds its own values and no others."""
    model = layer()
    model.experts.register_parameter("lora_a", torch.nn.Parameter(torch.zeros(3)))
    model.load_state_dict({"experts.lora_a": torch.ones(3)}, strict=False)
    assert torch.equal(model.experts.lora_a, torch.ones(3))
