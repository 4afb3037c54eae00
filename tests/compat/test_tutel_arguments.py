"""Tutel's moe_layer: every argument that is taken or refused, with a sentence, and state dicts of other versions."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from dmoe.compat import tutel as tutel_moe

F = nn.functional
H, WIDTH = 6, 10
TOP = {"type": "top", "k": 2}
FFN = {"type": "ffn", "num_experts_per_device": 4, "hidden_size_per_expert": WIDTH}


def build(gate=TOP, experts=FFN, **options):
    return tutel_moe.moe_layer(gate_type=gate, model_dim=H, experts=experts, **options)


REFUSED = {
    "a string": ({"gate": "Topmost"}, ValueError, "gate_type: expected a dictionary, got 'Topmost'"),
    "no dictionary": ({"gate": 2}, TypeError, "gate_type: expected a dictionary, or a list of them, got 2"),
    "no gates": ({"gate": []}, TypeError, r"gate_type: expected a dictionary, or a list of them, got \[\]"),
    "a gate of one's own": (
        {"gate": {"type": "custom", "module": nn.Linear}},
        ValueError,
        r"gate_type: type: expected 'top' or 'cosine_top', got 'custom' \(.*router_module=",
    ),
    "no gate": ({"gate": {"k": 2}}, ValueError, "gate_type: type: expected 'top' or 'cosine_top', got None$"),
    "an option of the other gate": (
        {"gate": {**TOP, "init_t": 0.1}},
        ValueError,
        "gate_type: expected options among .*, got init_t",
    ),
    "no experts": ({"experts": None}, TypeError, "experts: expected a dictionary, got NoneType"),
    "experts of one's own": (
        {"experts": {**FFN, "type": "custom", "module": nn.Linear}},
        ValueError,
        "experts: type: expected 'ffn' or 'llama_ffn', got 'custom': dmoe's experts are feed-forward blocks",
    ),
    "an option of the other experts": (
        {"experts": {**FFN, "type": "llama_ffn", "has_fc1_bias": False}},
        ValueError,
        "experts: expected options among .*, got has_fc1_bias",
    ),
    "with self": (
        {"experts": {**FFN, "activation_fn_with_self": lambda x, self: x}},
        ValueError,
        "experts: activation_fn_with_self: expected none, got .*: it is called with Tutel's module; give activation_fn",
    ),
    "given up": (
        {"experts": {**FFN, "implicit_dropout_p": 0.1}},
        ValueError,
        "experts: implicit_dropout_p: expected none, got 0.1: Tutel has given it up",
    ),
    "no width": (
        {"experts": {"type": "ffn"}},
        ValueError,
        "experts: hidden_size_per_expert: expected an integer, got None",
    ),
    "another width": (
        {"experts": {**FFN, "output_dim": 5}},
        ValueError,
        "experts: output_dim: expected None or model_dim = 6, got 5",
    ),
    "no count": (
        {"experts": {**FFN, "num_experts_per_device": 0}},
        ValueError,
        "experts: num_experts_per_device: expected experts of a rank.*, got 0",
    ),
    "shared by more ranks than there are": (
        {"experts": {**FFN, "num_experts_per_device": -2}},
        ValueError,
        "experts: num_experts_per_device: expected 2 ranks for each expert to divide the 1 ranks",
    ),
    "a dropout": (
        {"experts": {**FFN, "activation_fn": lambda x: F.dropout(F.relu(x), 0.1)}},
        ValueError,
        "experts: activation_fn: expected a function that computes relu.*or draws random numbers",
    ),
    "another activation": (
        {"experts": {**FFN, "activation_fn": lambda x: x * torch.sigmoid(1.702 * x)}},
        ValueError,
        "experts: activation_fn: expected a function that computes relu.*which computes another one",
    ),
    "no function": (
        {"experts": {**FFN, "activation_fn": "gelu"}},
        ValueError,
        "experts: activation_fn: expected a fun",
    ),
    "no noise": ({"is_gshard_loss": False}, ValueError, "is_gshard_loss: expected True without gate_noise"),
    "a way to spread": (
        {"parallel_type": "pipeline"},
        ValueError,
        r"parallel_type: expected 'data', 'model', 'auto' or 'adaptive:r' with r in \[0, 1\] for 1 ranks of an expert",
    ),
    "no overlap": (
        {"a2a_ffn_overlap_degree": 0},
        ValueError,
        "a2a_ffn_overlap_degree: expected an integer of at least 1, got 0",
    ),
    "others": ({"expert_type": "ffn"}, TypeError, "expected Tutel's arguments, got expert_type"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_sentence(name):
    options, error, message = REFUSED[name]
    with pytest.raises(error, match=f"^moe_layer: {message}"):
        build(**options)


def test_refused_in_a_forward():
    layer, x = build(), torch.randn(3, H)
    for options, message in (
        ({"reserve_dims": 2}, "reserve_dims: expected 1, got 2: more are for experts of your own"),
        ({"adaptive_r": "x"}, "parallel_type: expected .*, got 'adaptive:x'"),
        ({"a2a_ffn_overlap_degree": -1}, "a2a_ffn_overlap_degree: expected an integer of at least 1, got -1"),
    ):
        with pytest.raises(ValueError, match=f"^moe_layer: {message}"):
            layer(x, **options)
    for wrong in (torch.randn(H), torch.randn(3, H + 1)):
        with pytest.raises(ValueError, match=r"^moe_layer: input: expected shape \(\.\.\., model_dim = 6\) of two or"):
            layer(wrong)


def test_the_order_of_the_arguments_is_tutels():
    seen = []
    layer = tutel_moe.moe_layer(
        TOP, H, FFN, lambda name, p: seen.append(name), lambda y: (y, y.l_aux), None, (1, 2, 3), 2, False, True, False,
        True, "auto", True,
    )  # fmt: skip
    config = layer.gates[0].config
    assert (config.gate_weight_on, config.drop_order, config.gate_normalization) == ("input", "batch_prioritized", None)
    assert seen == ["batched_fc1_w", "batched_fc2_w", "batched_fc1_bias", "batched_fc2_bias"]
    y, l_aux = layer(torch.randn(3, H), 0, 1.5, 1, 1, 1, True, 0, 0)
    assert l_aux is layer.l_aux
    assert y.shape == (3, H)


def test_the_dictionaries_stay_as_they_are():
    gates, experts = [dict(TOP), {"type": "cosine_top"}], {**FFN, "activation_fn": F.gelu}
    before = copy.copy(gates), dict(experts)
    build(gates, experts)
    assert (gates, experts) == before


def test_other_ways_to_say_it():
    with pytest.warns(UserWarning, match="Tutel writes this as {'type': 'top', 'k': 3}"):
        layer = build("Top3Gate")
    assert layer.gates[0].top_k == 3
    assert build({"type": "top", "k": 9}).gates[0].top_k == 4  # of all there are
    assert build({"type": "top"}).gates[0].top_k == 1
    with pytest.warns(UserWarning, match="pad_samples"):
        build(pad_samples=True)
    for count, expected in ((-1, 1), (0.999, 1), (2, 2)):
        layer = build({"type": "top"}, {**FFN, "num_experts_per_device": 4, "count_per_node": count})
        assert layer.num_global_experts == layer.num_local_experts == expected
    assert tutel_moe.moe_layer.global_expert_count(3) == 3
    for way in ("data", "model", "auto", "adaptive:0", "adaptive:1", "adaptive:7"):
        build(parallel_type=way)


def test_a_dropout_in_the_activation_is_that_of_the_experts():
    """As Swin-MoE and GMoE write it: ``lambda x: self._dropout(F.gelu(x))``."""
    drop = nn.Dropout(0.1)
    config = build(experts={**FFN, "activation_fn": lambda x: drop(F.gelu(x))}).experts.config
    assert (config.activation, config.activation_dropout) == ("gelu", pytest.approx(0.1))


def test_parameters_by_what_they_are_of():
    layer = build([TOP, {"type": "cosine_top", "proj_dim": 8}])
    of_gates, of_experts = (dict(layer.get_parameter_iterator(kind)) for kind in ("gate", "local_experts"))
    assert {id(p) for p in layer.parameters()} == {id(p) for p in (*of_gates.values(), *of_experts.values())}
    assert next(iter(of_gates)) == "0.wg.weight"
    with pytest.raises(ValueError, match=r"^get_parameter_iterator: param_type: expected 'gate' or"):
        layer.get_parameter_iterator("expert")


def test_seeds_decide_gates_experts_and_what_comes_after():
    def values(seeds):
        torch.manual_seed(99)
        layer = build([TOP, TOP], seeds=seeds)
        one, two = (gate.wg.weight.detach() for gate in layer.gates)
        return one, two, layer.experts.batched_fc1_w.detach(), torch.rand(3)

    first, again, other = values((1, 2, 3)), values((1, 2, 3)), values((1, 7, 3))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert [torch.equal(a, b) for a, b in zip(first, other, strict=True)] == [True, True, False, True]
    assert not torch.equal(first[0], first[1])
    assert torch.equal(values((2, None))[0], first[1])  # one more for each gate


def test_initial_values_are_those_of_linears():
    torch.manual_seed(0)
    wide = {**FFN, "hidden_size_per_expert": 400}
    experts = tutel_moe.moe_layer(gate_type=TOP, model_dim=100, experts=wide).experts
    fans = {"batched_fc1_w": 100, "batched_fc2_w": 400, "batched_fc1_bias": 100, "batched_fc2_bias": 400}
    for name, fan_in in fans.items():
        values, bound = getattr(experts, name).detach(), fan_in**-0.5
        assert 0.97 * bound < values.abs().max() <= bound
        assert abs(float(values.std()) / (bound / 3**0.5) - 1) < 0.05
    flat = tutel_moe.moe_layer(gate_type=TOP, model_dim=100, experts={**wide, "type": "llama_ffn"}).experts
    assert [name for name, _ in flat.named_parameters()] == ["W_fc1", "W_fc2", "W_fc3"]
    assert all(abs(float(p.detach().std()) / 0.01 - 1) < 0.05 for p in flat.parameters())


def test_state_of_other_versions():
    layer = build()
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    old = dict(state)
    del old["_num_global_experts"], old["experts.batched_fc2_bias"]
    old["experts.batched_fc1_bias"] = old["experts.batched_fc1_bias"].view(4, 1, WIDTH)
    nn.init.ones_(layer.experts.batched_fc2_bias)
    with pytest.warns(UserWarning, match="experts.batched_fc2_bias: not in the state dict, zeros are loaded"):
        layer.load_state_dict(old)
    assert not layer.experts.batched_fc2_bias.any()
    assert torch.equal(layer.experts.batched_fc1_bias, state["experts.batched_fc1_bias"])
    with pytest.raises(RuntimeError, match="_num_global_experts: expected 4 experts on all ranks, got 8"):
        layer.load_state_dict({**state, "_num_global_experts": torch.tensor(8)})
    del state["experts.batched_fc1_w"]
    with pytest.raises(RuntimeError, match=r"Missing key.*experts\.batched_fc1_w"):
        layer.load_state_dict(state)
