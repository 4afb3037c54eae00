"""An activation is known by what it computes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dmoe.known_activations import read_activation

F = nn.functional


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (F.relu, "relu"),
        (torch.relu_, "relu"),
        (lambda x: x.clamp(min=0), "relu"),
        (lambda x: F.relu(x.float()), "relu"),
        (F.gelu, "gelu"),
        (nn.GELU(), "gelu"),
        (lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)), "gelu"),
        (lambda x: F.gelu(x.bfloat16()), "gelu"),
        (nn.GELU(approximate="tanh"), "gelu_tanh"),
        (lambda x: F.gelu(x, approximate="tanh"), "gelu_tanh"),
        (F.silu, "silu"),
        (lambda x: x * torch.sigmoid(x), "silu"),
        (lambda x: F.dropout(F.relu(x), 0.001), None),
        (lambda x: x * torch.sigmoid(1.702 * x), None),
        (nn.ReLU6(), None),
        (lambda x: F.relu(x).clamp(max=100), None),
        (lambda x: F.relu(x) ** 2, "relu_squared"),
        (lambda x: F.relu(x) ** 3, None),
        (nn.Sigmoid(), "sigmoid"),
        (lambda x: 0.5 + 0.5 * torch.tanh(x / 2), "sigmoid"),
        (nn.Hardsigmoid(), None),
        (lambda x: x.square(), None),
        (lambda x: F.leaky_relu(x, 1e-3), None),
        (lambda x: x, None),
        (lambda x: F.relu(x)[..., :3], None),
        (lambda x: None, None),
        (lambda x: x.nothing, None),
    ],
)
def test_by_what_it_computes(function, name):
    state = torch.get_rng_state()
    assert read_activation(function) == (name, 0.0)
    assert torch.equal(torch.get_rng_state(), state)


def test_dropouts_of_the_result_are_read_and_left_as_they_were():
    drop, off = nn.Dropout(0.25), nn.Dropout(0.5).eval()
    for function, expected in (
        (lambda x: drop(F.gelu(x)), ("gelu", 0.25)),
        (nn.Sequential(nn.ReLU(), drop, drop), ("relu", 1 - 0.75**2)),
        (lambda x: off(F.silu(x)), ("silu", 0.5)),
        (lambda x: F.gelu(drop(x)), (None, 0.0)),
        (nn.Sequential(nn.SiLU(), nn.Dropout(0.0)), ("silu", 0.0)),
        (nn.Sequential(nn.Dropout(0.0), nn.SiLU()), ("silu", 0.0)),
        (lambda x: drop(F.gelu(x))[:, None], (None, 0.0)),
        (lambda x: drop(x).nothing, (None, 0.0)),
    ):
        assert read_activation(function) == expected
        assert (drop.training, off.training) == (True, False)
    assert (drop(torch.ones(64)) == 0).any()  # at work again
