"""Megatron's optimizers tell parameters apart by name and shape: dmoe's get what its own would, or a sentence."""

from __future__ import annotations

import pytest
import torch.nn.functional as F
from megatron_cases import Case, Ranks, assert_same_training

pytestmark = pytest.mark.xdist_group("megatron")

BIASES = {"add_bias_linear": True}
PLAIN = BIASES | {"gated_linear_unit": False, "activation_func": F.gelu}
EP2 = Ranks(2, ep=2)


@pytest.mark.parametrize("fields", [BIASES, PLAIN], ids=["gated", "plain"])
def test_biases_of_experts_are_biases_to_megatron(megatron, fields):
    """One dimension: what is looked at for weight decay, Muon and rates that grow with a matrix's width."""
    found = megatron.run("rules_met", Case(EP2, fields), ("native", "dmoe", "experts"), about="optimizers")[0]
    expected = {(part, "bias"): {(0.0, True)} for part in ("up", "down")}
    expected |= {(part, "weight"): {(1.0, False)} for part in ("up", "down")}
    assert found == dict.fromkeys(("native", "dmoe", "experts"), expected)


@pytest.mark.parametrize("impl", ["dmoe", "experts"])
def test_weight_decay_leaves_biases_alone(megatron, impl):
    case = Case(EP2, BIASES, weight_decay=30.0, steps=4)
    mild = Case(EP2, BIASES, steps=4)
    assert abs(megatron.native(case)[0]["steps"][3][0] - megatron.native(mild)[0]["steps"][3][0]) > 1e-2
    assert_same_training(megatron.native(case), megatron.run("train", case, impl))


@pytest.mark.parametrize("impl", ["dmoe", "experts"])
def test_an_optimizer_of_matrices_is_refused(megatron, impl):
    """It takes what has two dimensions, and would leave experts, which have more, to Adam."""
    (told,) = megatron.run("told_under_an_optimizer_of_matrices", Ranks(1), impl, about="optimizers")
    assert "--optimizer (optimizer='muon or another of matrices')" in told
    assert "choose adam or sgd, or --moe-impl megatron" in told


def test_an_optimizer_of_matrices_trains_megatrons_own_layer(megatron):
    """Setting it up as far as that goes here is what makes the difference, and nothing else in the way of it."""
    assert megatron.run("told_under_an_optimizer_of_matrices", Ranks(1), "native", about="optimizers") == [None]
