"""Plain checkpoints in another layout than a model's are refused, although Megatron ends up loading non-strictly."""

from __future__ import annotations

import argparse

import pytest
from megatron_cases import Case, Ranks

from dmoe.integrations.megatron import arguments

pytestmark = pytest.mark.xdist_group("megatron")

CONVERT = "python -m dmoe.integrations.megatron convert --to {} OUT IN..."


@pytest.mark.parametrize("fields", [{}, {"add_bias_linear": True}], ids=["plain", "biases"])
def test_no_layer_keeps_the_experts_it_was_made_with(megatron, fields):
    found = megatron.run("loads", Case(Ranks(1), fields), ("dmoe", "experts"), about="loading")[0]
    for impl, own in (("dmoe", "dmoe"), ("experts", "dmoe_experts")):
        told = found[impl]
        assert told.pop(own) is None, "its own layout loads"
        nothing = told.pop("nothing of the layer")
        assert (nothing is None) == (impl == "dmoe"), "experts alone do not see the layer that they are in"
        for what, sentence in told.items():
            assert sentence is not None, what
            assert CONVERT.format(own) in sentence, what
            assert "dmoe.integrations.megatron: decoder.layers.0.mlp: expected " in sentence
    for layout in ("sequential", "te", "megablocks"):
        assert f"expected experts in the layout dmoe, got {layout} (experts." in found["dmoe"][layout]
        assert f"expected experts in the layout dmoe_experts, got {layout} (experts." in found["experts"][layout]
    assert "got dmoe_experts (experts.experts." in found["dmoe"]["dmoe_experts"]
    assert "expected moe.router.weight, got none among" in found["dmoe"]["no router"]
    assert "expected moe.experts.down_proj, got none among" in found["dmoe"]["one projection"]


@pytest.mark.parametrize("fields", [{}, {"add_bias_linear": True}], ids=["plain", "biases"])
def test_megatrons_own_layer_refuses_dmoes_experts_after_moe_impl_megatron(megatron, fields):
    told = megatron.run("loads", Case(Ranks(1), fields), ("native",), about="loading")[0]["native"]
    others = {"dmoe", "dmoe_experts", "te", "grouped", "megablocks"} & set(told)
    for what in others:
        layers = 1 if what == "megablocks" else 2
        assert told[what].count(CONVERT.format("sequential")) == layers, "asked for twice, and said once for each"
        assert f"decoder.layers.0.mlp: expected experts in the layout sequential, got {what} (" in told[what]
    assert told["sequential"] is None, "its own layout loads"
    assert told["only a router"] is None, "what is missing is Megatron's to judge"


def test_moe_impl_megatron_is_what_asks_for_it(monkeypatch):
    asked = []
    monkeypatch.setattr(arguments, "guard_megatrons_own_layer", lambda: asked.append(True))
    for words, times in (([], 0), (["--moe-impl", "dmoe"], 0), (["--moe-impl", "megatron"], 1)):
        parser = argparse.ArgumentParser()
        parser.add_argument("--num-experts", type=int)
        arguments.add_moe_args(parser).parse_args(["--num-experts", "8", *words])
        assert len(asked) == times, words
