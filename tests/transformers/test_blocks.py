"""Whole MoE blocks of Transformers as dmoe.MoE: each family equals its block, and comes back bit by bit."""

from __future__ import annotations

import re

import pytest
import torch
from hf_blocks import (
    GROUPED,
    MODELS,
    assert_near,
    assert_same_state,
    gradients,
    holding,
    home_of,
    results,
    saved,
    tiny,
    tiny_block,
)
from hf_families import run, token_ids
from torch import nn

from dmoe.integrations.transformers.block_module import MoEBlock
from dmoe.integrations.transformers.blocks import from_dmoe, to_dmoe
from dmoe.integrations.transformers.blocks_families import FAMILIES, REFUSED
from dmoe.integrations.transformers.blocks_table import config_of
from dmoe.integrations.transformers.versions import check_version

HERE = [name for name in FAMILIES if home_of(name) is not None]


@pytest.mark.parametrize("name", HERE)
def test_a_block_as_dmoe(name):
    block = tiny_block(name)
    model, x = holding(block), torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(3), requires_grad=True)
    before, objects = saved(model), dict(model.named_parameters())

    def call():
        x.grad = None
        return model["mlp"](x.clone())

    outputs, grads = results(model, call)
    grads["x"] = x.grad
    if check_version() < (5, 24):  # releases that build it otherwise are refused, and compute nothing wrong
        try:
            config_of(model["mlp"])
        except ValueError as error:
            pytest.skip(str(error))
    assert to_dmoe(model) == ["mlp"]
    assert isinstance(model["mlp"], MoEBlock)
    assert_same_state(dict(sorted(model.state_dict().items())), dict(sorted(before.items())))
    found, found_grads = results(model, call)
    found_grads["x"] = x.grad
    assert_near(found, outputs, 1e-6)
    assert_near(found_grads, grads, 3e-6)
    assert from_dmoe(model) == ["mlp"]
    assert_same_state(model.state_dict(), before)
    assert all(parameter is objects[own] for own, parameter in model.named_parameters())
    again, _ = results(model, call)
    assert all(torch.equal(again[key], outputs[key]) for key in outputs)


def test_every_grouped_family_was_tried_in_groups():
    for name in filter(home_of, GROUPED):
        config = config_of(tiny_block(name))
        assert (config.num_groups, config.top_k_groups, config.top_k, config.num_experts) == (4, 2, 3, 8)


SEVENTEEN = (
    "mixtral", "qwen2_moe", "qwen3_moe", "qwen3_next", "olmoe", "deepseek_v2", "deepseek_v3", "glm4_moe", "granitemoe",
    "granitemoeshared", "llama4", "gpt_oss", "ernie4_5_moe", "dots1", "hunyuan_v1_moe", "minimax", "jamba",
)  # fmt: skip


@pytest.mark.parametrize("family", SEVENTEEN)
def test_a_model_as_dmoe(family):
    model = tiny(family)
    ids = token_ids()
    before = saved(model)
    outputs, grads = results(model, lambda: run(model, ids))
    blocks = to_dmoe(model)
    found, found_grads = results(model, lambda: run(model, ids))
    assert_near(found, outputs, 1e-6)
    assert_near(found_grads, grads, 1e-5)
    assert from_dmoe(model) == blocks
    assert_same_state(model.state_dict(), before)


@pytest.mark.parametrize("name", [name for name in REFUSED if home_of(name) is not None])
def test_a_family_that_dmoe_is_not_is_refused_by_name(name):
    kind = type(name, (nn.Module,), {"__module__": f"transformers.models.{home_of(name)}.modeling_{home_of(name)}"})
    model = nn.ModuleDict({"other": nn.Linear(2, 2), "mlp": kind()})
    with pytest.raises(ValueError, match=rf"^to_dmoe: expected a block that dmoe.MoE can be, got {name}: (it|some)"):
        to_dmoe(model)


def test_somebody_decided_about_every_block_of_this_release():
    """A block is a class that makes itself experts; those of attention are JetMoE's."""
    of_a_class = re.compile(r"^class (\w+)|^        self\.experts = ", re.MULTILINE)
    undecided, name = [], None
    for file in MODELS.glob("*/modeling_*.py"):
        for match in of_a_class.finditer(file.read_text()):
            name = match[1] or name
            if match[1] is None and name not in {*FAMILIES, *REFUSED, "JetMoeAttention", "VitPoseBackboneMoeMLP"}:
                undecided.append(name)
    assert not undecided


def test_gradients_are_under_hugging_faces_names():
    """The helper would see it if a gradient were lost, or two were swapped."""
    model = holding(tiny_block("Qwen2MoeSparseMoeBlock"))
    to_dmoe(model)
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, number)
    found = gradients(model)
    assert len(found) == len(model.state_dict())
    assert (
        found["mlp.shared_expert.up_proj.weight"].shape == model.state_dict()["mlp.shared_expert.up_proj.weight"].shape
    )
