"""dmoe's specs: Megatron's own in all but the MoE layers, whatever else a model has, wherever those layers stand."""

from __future__ import annotations

import pytest
from megatron_cases import Case, Ranks, assert_same_training

pytestmark = pytest.mark.xdist_group("megatron")

ONE = Ranks(1)
L2 = {"qk_l2_norm": True}
MANY = L2 | {"normalization": "RMSNorm", "num_layers": 3, "moe_layer_freq": [1, 0, 1], "rotary_interleaved": True}
VARIANT = {
    "num_layers": 3,
    "moe_layer_freq": [0, 1, 1],
    "experimental_attention_variant": "gated_delta_net",
    "linear_attention_freq": [1, 0, 1],
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 4,
}


def test_the_options_tried_here_change_a_model(megatron):
    """Otherwise what follows would compare nothing."""
    plain, with_norm = (megatron.native(Case(ONE, fields, steps=2)) for fields in ({}, L2))
    assert abs(plain[0]["steps"][0][0] - with_norm[0]["steps"][0][0]) > 1e-3


@pytest.mark.parametrize("impl", ["dmoe", "experts", "layer", "constant", "constant experts"])
@pytest.mark.parametrize("fields", [L2, MANY], ids=["norm of queries and keys", "many"])
def test_a_model_has_all_that_its_config_asks_for_beside_experts(megatron, fields, impl):
    if impl == "layer" and "moe_layer_freq" in fields:
        pytest.skip("one layer's spec serves models of equal layers")
    case = Case(ONE, fields, steps=2)
    assert_same_training(megatron.native(case), megatron.run("train", case, impl))


def test_a_variant_of_attention_stays(megatron):
    found = megatron.run("parts_with_a_variant_of_attention", ONE, VARIANT, about="specs")[0]
    attention = ["GatedDeltaNet", "SelfAttention", "GatedDeltaNet"]
    assert found["native"] == list(zip(attention, ["MLP", "MoELayer", "MoELayer"], strict=True))
    for name in ("dmoe", "dmoe_gpt_spec"):
        assert found[name] == list(zip(attention, ["MLP", "DmoeLayer", "DmoeLayer"], strict=True))
    assert found["dmoe_experts_spec"] == found["native"]


def test_a_variant_that_megatron_itself_cannot_build_here(megatron):
    (told,) = megatron.run("told_without_transformer_engine", ONE, VARIANT, about="specs")
    assert "--experimental-attention-variant" in told
    assert "Transformer Engine, which is not installed" in told


def test_moe_layers_of_a_stack_of_mamba_are_exchanged(megatron):
    found = megatron.run("exchanged_in_a_stack", ONE, None, about="specs")[0]
    assert (found.pop("whole"), found.pop("experts")) == ("DmoeLayer", "DmoeExperts")
    assert all(found.values()), found


def test_layers_that_predict_further_tokens_train_as_megatrons_own(megatron):
    found = megatron.run("further_tokens", ONE, ("native", "dmoe", "experts", "constant"), about="specs")[0]
    loss, norm, _ = found["native"]
    for impl, layers in (("dmoe", 3), ("experts", 0), ("constant", 3)):
        assert abs(found[impl][0] - loss) < 5e-5
        assert abs(found[impl][1] - norm) < 1e-4 * norm
        assert found[impl][2] == layers
