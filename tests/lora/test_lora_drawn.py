"""A layer with adapters, in every form, equals the layer whose weights have the products added: drawn by hypothesis."""

from __future__ import annotations

import copy

import hypothesis.strategies as st
import torch
from helpers import without_generated_products
from hypothesis import given, settings
from lora_cases import dense_parameters, randomise, run_dense

import dmoe

pytestmark = without_generated_products
H = 6


@st.composite
def layers(draw):
    """Fields of a layer."""
    experts = draw(st.integers(1, 5))
    width = draw(st.integers(1, 5))
    if experts > 1 and draw(st.booleans()):
        width = [draw(st.integers(1, 5)) for _ in range(experts)]
    gated = draw(st.booleans())
    fields = {
        "hidden_size": H,
        "ffn_hidden_size": width,
        "num_experts": experts,
        "top_k": draw(st.integers(1, min(experts, 3))),
        "gated": gated,
        "activation": draw(st.sampled_from(["silu", "gelu_tanh", "relu_squared"])),
        "bias": draw(st.sampled_from(["none", "expert", "output"])),
        "gate_weight_on": draw(st.sampled_from(["output", "activation", "input"])),
        "capacity_factor": draw(st.sampled_from([None, None, 0.5, 1.0])),
        "router_bias": draw(st.booleans()),
        "backend": draw(st.sampled_from([None, "grouped", "torch", "reference"])),
        "load_balancing_coefficient": 0.1,
    }
    if draw(st.booleans()):
        fields |= {"shared_ffn_hidden_size": draw(st.integers(1, 4)), "shared_expert_gate": draw(st.booleans())}
    if fields["backend"] in (None, "grouped"):
        fields["recompute_pre_activation"] = draw(st.booleans())
    return fields


@st.composite
def adapters(draw, fields):
    """Fields of an adapter that suits such a layer."""
    packed = not isinstance(fields["ffn_hidden_size"], int)
    targets = draw(st.sampled_from([("experts",), ("experts.up",), ("experts.down", "router"), ("*",), ("e*", "r*")]))
    return {
        "rank": draw(st.integers(1, 4)),
        "alpha": draw(st.sampled_from([None, 3.0, -1.0])),
        "rank_stabilized": draw(st.booleans()),
        "targets": targets,
        "share_a": draw(st.booleans()) and not packed,
        "share_b": draw(st.booleans()) and not packed,
        "init": draw(st.sampled_from(["default", "gaussian"])),
    }


def scale_of(options):
    rank = options["rank"]
    if options["alpha"] is None:
        return 1.0
    return options["alpha"] / (rank**0.5 if options["rank_stabilized"] else rank)


@settings(max_examples=60)
@given(st.data())
def test_a_layer_equals_its_dense_twin(data):
    fields = data.draw(layers())
    options = data.draw(adapters(fields))
    tokens, frozen = data.draw(st.integers(0, 9)), data.draw(st.booleans())
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    layer = dmoe.MoE(**fields, dtype=torch.float64)
    twin = copy.deepcopy(layer)
    trained = dmoe.lora.add(layer, freeze=frozen, **options)
    randomise(trained.values())
    x = torch.randn(tokens, H, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(tokens, H, dtype=torch.float64)
    results = []
    leaves = {"x": x, **{name: value for name, value in layer.named_parameters() if value.requires_grad}}
    assert set(trained) <= set(leaves)
    assert frozen == (len(leaves) == len(trained) + 1)
    for run in (layer, lambda x: run_dense(twin, dense_parameters(layer, trained, scale_of(options)), x)):
        y = run(x)
        loss = (y * weight).sum() + dmoe.aux_loss(layer if run is layer else twin)
        grads = torch.autograd.grad(loss, leaves.values(), allow_unused=True)
        results.append((y, *grads))
    for name, ours, theirs in zip(("y", *leaves), *results, strict=True):
        if ours is None or theirs is None:  # experts nobody chose, in one of the two ways
            assert all(grad is None or not grad.any() for grad in (ours, theirs)), name
            continue
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")
