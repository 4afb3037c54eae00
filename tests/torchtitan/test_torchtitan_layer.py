"""One layer of torchtitan on dmoe: values, gradients, names, what a checkpointed block keeps, published models."""

from __future__ import annotations

import re

import pytest
import torch

pytestmark = pytest.mark.xdist_group("torchtitan")
MIXTURES = ["qwen3", "deepseek_v3", "gpt_oss"]


def error(run, plain):
    """The largest error of each tensor, as a share of its largest value."""
    return {name: float((run[name].double() - value).abs().max() / value.abs().max()) for name, value in plain.items()}


@pytest.mark.parametrize(("dtype", "limit"), [("float64", 1e-14), ("float32", 1e-6)])
@pytest.mark.parametrize("model", MIXTURES)
def test_output_and_gradients_equal_the_plain_loops(titan, model, dtype, limit):
    found = titan["layers"][model]
    assert max(error(found[dtype], found["plain"]).values()) < limit


@pytest.mark.parametrize("model", MIXTURES)
def test_in_bfloat16_it_is_as_near_to_the_truth_as_torchtitans_own(titan, model):
    found = titan["layers"][model]
    ours, theirs = (error(found[key], found["plain"]) for key in ("bfloat16", "bfloat16, theirs"))
    assert all(ours[name] < 2 * theirs[name] + 1e-3 for name in ours), (ours, theirs)


@pytest.mark.parametrize("model", ["qwen3", "deepseek_v3"])
def test_torchtitans_own_layer_is_the_same_but_for_its_bfloat16(titan, model):
    found = titan["layers"][model]
    theirs = error(found["float32, theirs"], found["plain"])
    assert 1e-3 < max(theirs.values()) < 2e-2
    assert theirs["counted"] == 0


def test_shares_of_a_bias_add_up_and_each_has_its_whole_gradient(titan):
    shares = titan["layers"]["shares"]
    torch.testing.assert_close(shares["total"], shares["expected"])
    for grad in shares["grads"]:
        torch.testing.assert_close(grad, shares["wanted"])


def test_the_checker_of_spmd_types_changes_nothing(titan):
    checked, unchecked = titan["layers"]["typechecked"]
    assert torch.equal(checked, unchecked)


@pytest.mark.parametrize("model", MIXTURES)
def test_dmoes_own_layer_computes_the_same_on_the_converted_state(titan, model):
    found = titan["states"][model]
    torch.testing.assert_close(found["ours"], found["theirs"], rtol=0, atol=1e-12)
    assert found["back"].keys() == found["state"].keys()
    assert all(torch.equal(found["back"][name], value) for name, value in found["state"].items())


def test_selective_checkpointing_does_not_compute_the_experts_again(titan):
    found = titan["selective"]
    assert (found["theirs"], found["ours"]) == (2, 1)
    for name, grad in found["theirs, grads"].items():
        assert torch.equal(found["ours, grads"][name], grad)


def test_every_mixture_of_the_published_models_is_claimed(titan):
    for name, (mixtures, claimed, left) in titan["published"].items():
        assert mixtures == claimed > 0, name
        assert not left, name


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("an unknown option", "ValueError: experts: expected options of exchange, .*wire_dtype, got wire"),
        ("fused experts", "ValueError: .*inner_experts: expected GroupedExperts or GptOssGroupedExperts, got Fused"),
        ("an unknown exchange", "ValueError: DmoeRoutedExperts: exchange: expected dmoe or torchtitan, got 'nccl'"),
        ("an unknown wire dtype", "ValueError: .*wire_dtype: expected .*got 'fp4'"),
        ("a wire of torchtitan's", "ValueError: DmoeRoutedExperts: wire_dtype: expected None where .*AllToAll"),
        ("a wire in a graph", "ValueError: DmoeRoutedExperts: wire_dtype: expected None under torch.compile"),
        ("no truth value", "TypeError: DmoeRoutedExperts: recompute_pre_activation: expected True or False, got 1"),
        ("six experts on four ranks", "ValueError: .*expert_parallel_degree: expected a divisor of the 6 .*, got 4"),
        ("no trainer's config", "TypeError: use: config: expected torchtitan's Trainer.Config, got Config"),
        ("no mixture", "ValueError: use: config: expected a model_spec with RoutedExperts, got one without"),
        ("not a layer's config", "TypeError: moe_config: config: expected torchtitan's MoE.Config, got that of Linear"),
        ("no config", "TypeError: moe_config: config: expected torchtitan's MoE.Config, got NoneType"),
        ("half a pair", "ValueError: to_dmoe: layers.0.moe.routed_experts.inner_experts.w3_EFD: expected it beside"),
        ("an unknown name", "ValueError: to_dmoe: layers.0.moe.routed_experts.w9: expected a name of torchtitan's"),
        ("a name of dmoe alone", "ValueError: from_dmoe: layers.0.moe.shared_expert.gate.weight: expected a name"),
        ("late", "RuntimeError: run_on_cpu: expected to be called before torchtitan.* is imported"),
    ],
)
def test_bad_input_gets_a_sentence(titan, what, said):
    text = titan["bad_input"][what]
    assert re.match(said, text), text
    assert "\n" not in text
