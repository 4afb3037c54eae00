"""What tests of DeepSpeed's and Tutel's layers share: recorded cases, their random numbers, and small experts."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from torch import nn

from dmoe.routing import base, noise

GOLDENS = json.loads((Path(__file__).parent / "zoo_goldens.json").read_text())["cases"]


class Ffn(nn.Module):
    """``fc2(act(fc1(x)))``, as most DeepSpeed users write their expert."""

    def __init__(self, hidden, width, act=nn.functional.relu, bias=(True, True), out_drop=0.0):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(hidden, width, bias=bias[0]), nn.Linear(width, hidden, bias=bias[1])
        self.act, self.drop = act, nn.Dropout(out_drop)

    def forward(self, x):
        return self.drop(self.fc2(self.act(self.fc1(x))))


def golden(name):
    """Settings, inputs as tensors, and outputs of a recorded case."""
    case = next(case for case in GOLDENS if case["id"] == name)
    inputs = case["inputs"]
    if "same_as" in inputs:
        inputs = {**golden(inputs["same_as"])[1], **{k: v for k, v in inputs.items() if k != "same_as"}}
    return case["settings"], {name: _tensors(value) for name, value in inputs.items()}, case["outputs"]


def goldens(*prefixes):
    """Names of all cases that begin so."""
    return [case["id"] for case in GOLDENS if case["id"].startswith(prefixes)]


def _tensors(value):
    if isinstance(value, dict):
        return {name: _tensors(each) for name, each in value.items()}
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [_tensors(each) for each in value]
    numbers = isinstance(value, list) and not isinstance(value[0], str)
    return torch.tensor(value) if numbers else value


@contextmanager
def drawn(**numbers):
    """While open, ``uniform``, ``gumbel`` and ``gaussian`` numbers are these, ``jitter`` is what jitters; each once."""
    rest = {name: value for name, value in numbers.items() if isinstance(value, torch.Tensor)}

    def giving(name):
        def give(like):
            value = rest.pop(name)
            assert value.shape == like.shape
            return value.to(like)

        return give

    real = base.router_logits

    def jittered(x, weight, bias, *, jitter, seed, **how):
        if jitter:
            assert jitter == 0.01
            assert seed is not None
            x = x * rest.pop("jitter")
        return real(x, weight, bias, jitter=0.0, seed=None, **how)

    with (
        patch.multiple(noise, **{name: giving(name) for name in ("uniform", "gumbel", "gaussian")}),
        patch.object(base, "router_logits", jittered),
    ):
        yield
    assert not rest, f"not drawn: {sorted(rest)}"


def close(actual, expected, rtol=1e-5):
    """Recorded numbers have 8 digits; sums that cancel keep the roundings of their summands."""
    expected = torch.as_tensor(expected).detach()
    atol = rtol / 10 * max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(torch.as_tensor(actual).detach(), expected.to(actual.dtype), rtol=rtol, atol=atol)
