"""Plain checkpoints in another layout than a model's are refused, although Megatron ends up loading non-strictly."""

from __future__ import annotations

import pytest
from megatron_cases import Case, Ranks

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
