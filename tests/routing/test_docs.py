"""docs/routing.md: its code runs, its own family is short and works like those of the house, its table is whole."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from doc_blocks import python_blocks, run_page

import dmoe
from dmoe.router_family import _BY_NAME

PAGE = Path(__file__).resolve().parents[2] / "docs" / "routing.md"


@pytest.fixture
def page():
    before = dict(_BY_NAME)
    yield run_page("routing.md")
    _BY_NAME.clear()
    _BY_NAME.update(before)


def test_a_family_of_ones_own_is_under_80_lines_and_does_what_the_others_do(page):
    for block in python_blocks("routing.md"):
        assert len(block.strip().splitlines()) < 80
    sizes = {"hidden_size": 12, "ffn_hidden_size": 8, "num_experts": 4}
    config = dmoe.MoEConfig(**sizes, router="mlp", capacity_factor=0.5, drop_order="batch_prioritized")
    layer = dmoe.MoE(config)
    y = layer(torch.randn(3, 16, 12))
    (y.square().mean() + dmoe.aux_loss(layer)).backward()
    assert layer.last_metrics.dropped_share > 0
    assert all(parameter.grad is not None for parameter in layer.parameters())
    compiled = torch.compile(dmoe.MoE(config), fullgraph=True, backend="aot_eager")
    assert compiled(torch.randn(16, 12)).shape == (16, 12)
    with pytest.raises(ValueError, match="MLPFamily: width: expected at least 1, got 0"):
        page["MLPFamily"](width=0)
    with pytest.raises(ValueError, match="register: name: expected one that no family has, got 'mlp'"):
        dmoe.routing.register("mlp")(dmoe.routing.TopK)
    assert dmoe.routing.TopK.name == "top_k"
    broken = dmoe.MoE(**sizes, router="mlp", losses={"entropie": 0.1})
    with pytest.raises(ValueError, match=r"names of losses that this router has .*entropy.*, got 'entropie'"):
        broken(torch.randn(4, 12))


def test_every_family_has_a_row():
    rows = set(re.findall(r"^\| `(\w+)` \|", PAGE.read_text(), re.MULTILINE))
    assert rows >= {family.__name__ for family in _BY_NAME.values()}
