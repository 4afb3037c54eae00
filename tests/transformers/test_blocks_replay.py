"""Recording and replaying in Hugging Face models whose blocks are dmoe's; and a word where the router is not dmoe's."""

from __future__ import annotations

import pytest
import torch
from hf_families import tiny_model

import dmoe
from dmoe.integrations.transformers import to_dmoe, use


def test_blocks_of_dmoe_record_and_replay():
    model, other = tiny_model("mixtral"), tiny_model("mixtral")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    for each in (model, other):
        to_dmoe(each)
    ids = torch.randint(model.config.vocab_size, (2, 7))
    with dmoe.record_routing(model) as record, torch.no_grad():
        model(ids)
    assert record.num_tokens == 14
    assert all(name.startswith("model.layers.") and name.endswith(".moe") for name in record.layers)
    array = record.to_array().numpy()  # what an engine would have returned
    engine = dmoe.RoutingRecord.from_array(array, model.config.num_local_experts, dmoe.moe_layers(other))
    assert engine == record
    enable = getattr(other, "activation_checkpointing_enable", None)  # its name from 5.24 on
    (enable or other.gradient_checkpointing_enable)()
    other.train()
    with dmoe.record_routing(other) as again, dmoe.replay_routing(other, engine):
        other(ids, labels=ids).loss.backward()
    assert again == record
    router = next(layer for layer in dmoe.moe_layers(other).values()).router
    assert router.weight.grad.abs().max() > 0


def test_a_router_of_transformers_is_named():
    model = tiny_model("mixtral")
    use(model)
    with pytest.raises(ValueError, match=r"the router is Transformers' own.*to_dmoe"), dmoe.record_routing(model):
        pass
