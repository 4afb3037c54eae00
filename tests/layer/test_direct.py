"""The layer in inference as one operation (dmoe/direct.py): what the steps compute, and only where nobody looks."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import small_config
from hypothesis import given, settings
from hypothesis import strategies as st

import dmoe
from dmoe import MoE, direct
from dmoe.ops.moe_inference import moe_inference_ref, serves_cpu

pytestmark = pytest.mark.skipif(not serves_cpu, reason="csrc/ is not built")


@pytest.fixture
def calls(monkeypatch):
    """How often the operation ran."""
    seen, run = [], direct.moe_inference
    monkeypatch.setattr(direct, "moe_inference", lambda *arguments: seen.append(1) or run(*arguments))
    return seen


def evaluated(layer, x, **told):
    layer.eval()
    with torch.no_grad():
        return layer(x, **told)


def in_steps(layer, x):
    """What a forward hook sees, which is given no shortcut."""
    handle = layer.router.register_forward_hook(lambda *_: None)
    try:
        return evaluated(layer, x)
    finally:
        handle.remove()


@st.composite
def options(draw):
    groups = draw(st.sampled_from([1, 2, 3]))
    experts = groups * draw(st.integers(1, 4))
    kept = draw(st.integers(1, groups))
    return {
        "num_experts": experts,
        "top_k": draw(st.integers(1, experts // groups * kept)),
        "num_groups": groups,
        "top_k_groups": kept,
        "group_score": draw(st.sampled_from(["top2_sum", "max"])),
        "score_function": draw(st.sampled_from(["softmax", "sigmoid"])),
        "gate_normalization": draw(st.sampled_from([None, 1.0, 2.0])),
        "gate_scale": draw(st.sampled_from([1.0, 2.5])),
        "gate_weight_on": draw(st.sampled_from(["output", "activation", "input"])),
        "gated": draw(st.booleans()),
        "activation": draw(st.sampled_from(["silu", "gelu", "relu"])),
        "bias": draw(st.sampled_from(["none", "expert", "output"])),
        "router_bias": draw(st.booleans()),
        "selection_bias": draw(st.booleans()),
        "shared_ffn_hidden_size": draw(st.sampled_from([None, 6])),
        "hidden_size": draw(st.sampled_from([1, 8, 33])),
        "ffn_hidden_size": draw(st.sampled_from([1, 12, 20])),
    }


@settings(max_examples=60)
@given(
    options(), st.sampled_from([0, 1, 2, 7, 40]), st.sampled_from([torch.float32, torch.float64]), st.integers(0, 99)
)
def test_equals_the_steps(given_options, tokens, dtype, seed):
    torch.manual_seed(seed)
    layer = MoE(**given_options, dtype=dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.5)
        if layer.router.selection_bias is not None:
            layer.router.selection_bias.normal_()
    x = torch.randn(tokens, given_options["hidden_size"], dtype=dtype)
    expected = in_steps(layer, x)
    metrics = layer.last_metrics
    y = evaluated(layer, x)
    tolerance = {"rtol": 2e-4, "atol": 2e-5} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(y, expected, **tolerance)
    assert torch.equal(layer.last_metrics.tokens_per_expert, metrics.tokens_per_expert)
    torch.testing.assert_close(layer.last_metrics.entropy, metrics.entropy, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 256, 8), (16, 64, 8), (300, 8, 2)])
def test_sizes_of_real_layers(tokens, experts, top_k, dtype, calls):
    torch.manual_seed(0)
    layer = MoE(hidden_size=64, ffn_hidden_size=48, num_experts=experts, top_k=top_k, dtype=dtype)
    x = torch.randn(2, tokens, 64).to(dtype)
    expected = in_steps(layer, x)
    assert not calls
    y = evaluated(layer, x)
    assert len(calls) == 1
    assert y.shape == x.shape
    assert y.dtype == dtype
    assert (y.double() - expected.double()).norm() <= 4 * torch.finfo(dtype).eps * expected.double().norm()


def test_the_operation_is_registered_as_it_says():
    layer = MoE(small_config()).eval()
    experts, rule = layer.experts, layer.router.rule
    weights = (experts.gate_up_proj, experts.down_proj, None, None, "silu", True, "output", None)
    arguments = (torch.randn(3, 8), layer.router.weight, None, None, torch.float32, *rule, *weights)
    with torch.no_grad():
        torch.library.opcheck(
            torch.ops.dmoe.moe_inference.default, arguments, test_utils=("test_schema", "test_faketensor")
        )
        for mine, theirs in zip(torch.ops.dmoe.moe_inference(*arguments), moe_inference_ref(*arguments), strict=True):
            torch.testing.assert_close(mine, theirs)


def test_a_token_that_is_no_number_spoils_its_own_output_alone(calls):
    layer = MoE(small_config())
    x = torch.randn(4, 8)
    clean = evaluated(layer, x)
    x[1, 3] = float("nan")
    y = evaluated(layer, x)
    assert y[1].isnan().all()
    torch.testing.assert_close(y[[0, 2, 3]], clean[[0, 2, 3]])
    assert len(calls) == 2


def with_a_hook(layer):
    layer.experts.register_forward_hook(lambda *_: None)


def with_adapters(layer):
    dmoe.lora.add(layer, rank=2)


def with_a_wrapped_router(layer):
    class Wrapper(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, *arguments, **told):
            return self.inner(*arguments, **told)

    layer.router = Wrapper(layer.router)


def as_codes(layer):
    dmoe.quant.quantize(layer, "int8")


STEPS = {
    "a hook": ({}, with_a_hook),
    "adapters": ({}, with_adapters),
    "a wrapped router": ({}, with_a_wrapped_router),
    "codes": ({"hidden_size": 32, "ffn_hidden_size": 32}, as_codes),
    "a capacity": ({"capacity_factor": 1.0}, None),
    "a capacity in evaluation": ({"eval_capacity_fraction": 0.5}, None),
    "experts of two widths": ({"num_experts": 2, "ffn_hidden_size": [8, 4]}, None),
    "another family": ({"router": "uniform"}, None),
    "a softcap": ({"router_logit_softcap": 5.0}, None),
    "noise in evaluation": ({"router": dmoe.routing.TopK(logit_noise="gaussian", noise_in_eval=True)}, None),
    "the reference": ({"backend": "reference"}, None),
    "a bias on logits": ({"selection_bias": True, "selection_bias_on": "logits"}, None),
    "batch invariance": ({"batch_invariant": True}, None),
    "a function": ({"activation": torch.nn.functional.mish}, None),
}


@pytest.mark.parametrize("case", STEPS)
def test_what_needs_the_steps_gets_them(case, calls):
    fields, change = STEPS[case]
    layer = MoE(small_config(**fields))
    if change is not None:
        change(layer)
    y = evaluated(layer, torch.randn(5, layer.config.hidden_size))
    assert y.isfinite().all()
    assert not calls


def test_calls_that_need_the_steps_get_them(calls):
    layer, x = MoE(small_config()).eval(), torch.randn(5, 8)
    layer(x)  # with gradients
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        layer(x)
    evaluated(layer, x, token_mask=torch.ones(5, dtype=torch.bool))
    evaluated(layer, x, expert_indices=torch.zeros(5, layer.config.top_k, dtype=torch.int64))
    _, routing = evaluated(layer, x, return_routing=True)
    assert routing.router_probs is not None
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        evaluated(layer, x)
    assert counter.get_total_flops() > 0
    layer.train()
    with torch.no_grad():
        layer(x)
    assert not calls


def test_other_dtypes_and_devices_are_refused_as_before(calls):
    layer = MoE(small_config())
    with pytest.raises((ValueError, TypeError, RuntimeError), match="dtype"):
        evaluated(layer, torch.randn(3, 8, dtype=torch.float64))
    with pytest.raises(ValueError, match="expected x on the weights' device cpu, got meta"):
        evaluated(layer, torch.randn(3, 8, device="meta"))
    assert not calls


def test_recording_sees_every_choice(calls):
    layer, x = MoE(small_config()).eval(), torch.randn(6, 8)
    with torch.inference_mode(), dmoe.record_routing(layer) as record:
        layer(x)
    assert record.num_tokens == 6
    assert not calls
    evaluated(layer, x)
    assert len(calls) == 1


def test_copies_and_compiled_layers(calls):
    layer, x = MoE(small_config()).eval(), torch.randn(6, 8)
    expected = evaluated(layer, x)
    torch.testing.assert_close(evaluated(copy.deepcopy(layer), x), expected)
    assert len(calls) == 2
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), expected)
    assert len(calls) == 2
