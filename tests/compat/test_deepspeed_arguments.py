"""DeepSpeed's MoE: what it refuses, with a sentence, and state dicts that do not fit."""

from __future__ import annotations

import copy

import pytest
import torch
from compat_cases import Ffn
from torch import nn

from dmoe.compat.deepspeed import MoE

H, WIDTH = 6, 10
STACK = "deepspeed_moe.experts.deepspeed_experts."


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(H, WIDTH), nn.Linear(H, WIDTH, bias=False), nn.Linear(WIDTH, H)

    def forward(self, x):
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


REFUSED = {
    "a linear": ((nn.Linear(H, H), {}), r"expert: Linear is not recognised.*: it is a single linear.*Recognised: down"),
    "no activation": (
        (nn.Sequential(nn.Linear(H, WIDTH), nn.Linear(WIDTH, H)), {}),
        r"expert: Sequential: expected the activation silu, gelu \(erf or tanh\), relu, its square or sigmoid, got",
    ),
    "a layer": (
        (nn.TransformerEncoderLayer(H, 2, WIDTH), {}),
        "expert: TransformerEncoderLayer is a whole transformer layer",
    ),
    "one bias of two": ((Tied(), {}), "expert: Tied: expected a bias in both of the projections"),
    "another size": ((Ffn(H + 2, WIDTH), {}), f"hidden_size: expected the expert's {H + 2}, got {H}"),
    "experts": ((Ffn(H, WIDTH), {"num_experts": 3, "ep_size": 2}), "num_experts: expected a multiple of ep_size = 2"),
    "no ranks": ((Ffn(H, WIDTH), {"ep_size": 0}), "num_experts: expected a multiple of ep_size = 0, got 4"),
    "policy": ((Ffn(H, WIDTH), {"noisy_gate_policy": "jitter"}), "noisy_gate_policy: expected one of .*, got 'jitter'"),
    "tensor parallelism": (
        (Ffn(H, WIDTH), {"enable_expert_tensor_parallelism": True}),
        "enable_expert_tensor_parallelism: expected False, got True: build dmoe.MoE.*expert_tp_group",
    ),
    "capacity": (
        (Ffn(H, WIDTH), {"capacity_factor": 0}),
        "capacity_factor: expected a positive number, got 0; drop_tokens=False is what",
    ),
    "eval capacity": (
        (Ffn(H, WIDTH), {"eval_capacity_factor": -1.0}),
        "eval_capacity_factor: expected a positive number, got -1.0",
    ),
    "k": ((Ffn(H, WIDTH), {"k": 5}), "top_k: expected at most num_experts = 4, got 5"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_sentence(name):
    (expert, options), message = REFUSED[name]
    with pytest.raises(ValueError, match=f"^MoE(Config)?: {message}"):
        MoE(H, expert, **{"num_experts": 4, **options})


def test_the_order_of_the_arguments_is_deepspeeds():
    layer = MoE(H, Ffn(H, WIDTH), 4, 1, 2, 1.5, 2.5, 3, True, "Jitter", True, False, True, False, False)
    config = layer.deepspeed_moe.config
    assert (config.num_experts, config.top_k, config.min_capacity, config.input_jitter) == (4, 2, 3, 0.01)
    assert (config.capacity_factor, config.eval_capacity_factor) == (1.5, 2.5)
    assert layer.use_residual
    assert not config.family.noise_in_eval
    assert (layer.ep_size, layer.num_local_experts, layer.expert_group_name) == (1, 4, "ep_size_1")
    layer.set_deepspeed_parallelism()  # nothing to do, and nothing to be asked


def test_a_wrong_input_is_named():
    layer = MoE(H, Ffn(H, WIDTH), num_experts=4)
    with pytest.raises(
        ValueError, match=r"^MoE: hidden_states: expected shape \(\.\.\., hidden_size = 6\), got \(3, 5\)"
    ):
        layer(torch.randn(3, 5))
    spread = MoE(H, Ffn(H, WIDTH), num_experts=4, ep_size=2)
    with pytest.raises(RuntimeError, match=r"^MoE: expected set_deepspeed_parallelism\(\) to be called before"):
        spread(torch.randn(3, H))
    with pytest.raises(RuntimeError, match=r"^set_deepspeed_parallelism: expected torch.distributed to be initialised"):
        spread.set_deepspeed_parallelism()


def test_state_that_does_not_fit():
    layer = MoE(H, Ffn(H, WIDTH), num_experts=2)
    state = layer.state_dict()
    before = {name: value.clone() for name, value in state.items()}
    del state[f"{STACK}1.fc2.weight"]
    state[f"{STACK}0.fc1.bias"] = torch.ones(WIDTH)
    state[f"{STACK}2.fc1.bias"] = torch.ones(WIDTH)
    told = layer.load_state_dict(state, strict=False)
    assert told.missing_keys == [f"{STACK}1.fc2.weight"]
    assert told.unexpected_keys == [f"{STACK}2.fc1.bias"]
    after = layer.state_dict()
    assert torch.equal(after.pop(f"{STACK}0.fc1.bias"), torch.ones(WIDTH))
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    with pytest.raises(RuntimeError, match=r"Missing key.*1\.fc2\.weight") as caught:
        layer.load_state_dict(state)
    assert "2.fc1.bias" in str(caught.value)
    assert "up_proj" not in str(caught.value)
    bad = {**before, f"{STACK}1.fc1.weight": torch.ones(H, WIDTH)}
    with pytest.raises(RuntimeError, match=r"size mismatch for .*1\.fc1\.weight: expected \(10, 6\), got \(6, 10\)"):
        layer.load_state_dict(bad)
    spread = MoE(H, Ffn(H, WIDTH), num_experts=4, ep_size=2)
    spread.load_state_dict({name: value for name, value in before.items() if "gate" not in name}, strict=False)
    whole = MoE(H, Ffn(H, WIDTH), num_experts=4).state_dict()
    with pytest.raises(
        RuntimeError, match=r"expected the 2 experts of this rank.*call set_deepspeed_parallelism before"
    ):
        spread.load_state_dict(whole)


def test_state_goes_onto_meta_and_keeps_its_dtype():
    expert = Ffn(H, WIDTH, bias=(True, False))
    state = MoE(H, expert, num_experts=2).double().state_dict()
    layer = MoE(H, copy.deepcopy(expert).to("meta"), num_experts=2)
    layer.load_state_dict(state, assign=True)
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())
    assert all(parameter.dtype == torch.float64 for parameter in layer.parameters())
    assert all(parameter.expert for parameter in layer.deepspeed_moe.experts.parameters())


def test_what_is_frozen_in_the_expert_is_in_its_copies():
    expert = Ffn(H, WIDTH)
    expert.fc1.requires_grad_(False)
    flags = {n: p.requires_grad for n, p in MoE(H, expert, num_experts=2).deepspeed_moe.experts.named_parameters()}
    assert flags == {"up_proj": False, "up_bias": False, "down_proj": True, "down_bias": True}
