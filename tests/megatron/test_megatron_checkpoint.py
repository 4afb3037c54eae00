"""Distributed checkpoints of Megatron: over other ranks, and between its own layer and dmoe's."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from megatron_cases import Case, Ranks, since
from rank_pool import RankError

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("megatron")]

EP2 = Case(Ranks(2, ep=2), steps=1)
EXTRAS = dataclasses.replace(
    EP2,
    config={
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": 0.05,
        "moe_shared_expert_intermediate_size": 64,
        "moe_shared_expert_gate": True,
    },
)
PLAIN = dataclasses.replace(
    EP2, config={"gated_linear_unit": False, "add_bias_linear": True, "activation_func": F.gelu}
)
QUANTILE = dataclasses.replace(
    EP2, config={"moe_router_load_balancing_type": "quantile_balancing", "moe_aux_loss_coeff": 0.0}, steps=2
)


def whole_experts(results):
    """Each expert's two projections from the ranks' parts; all ranks that hold a part hold the same."""
    parts = {}
    for result in results:
        for key, (shard, shards, up, down) in result["experts"].items():
            known = parts.setdefault(key, {})
            if (shard, shards) in known:
                assert all(a.equal(b) for a, b in zip(known[shard, shards], (up, down), strict=True))
            known[shard, shards] = (up, down)
    whole = {}
    for key, known in parts.items():
        shards = sorted(known)
        assert [index for index, _ in shards] == list(range(shards[0][1]))  # every slice, and once
        whole[key] = tuple(torch.cat([known[shard][side] for shard in shards], 1) for side in (0, 1))
    return whole


def assert_same_model(saved, loaded, layers=2, experts=8):
    """No expert lost or doubled, every value the same, and so the first step's loss."""
    before, after = whole_experts(saved), whole_experts(loaded)
    assert sorted(before) == sorted(after) == [(layer + 1, e) for layer in range(layers) for e in range(experts)]
    assert len({tuple(up.flatten()[:8].tolist()) for up, _ in after.values()}) == layers * experts  # none is another's
    for key, (up, down) in before.items():
        assert up.equal(after[key][0])
        assert down.equal(after[key][1])
    assert abs(saved[-1]["loss"] - loaded[-1]["loss"]) < 2e-6


@pytest.fixture
def saved(megatron):
    def save(case, impl, *options):
        folder = megatron.new_path("checkpoint")
        return folder, megatron.run("save", case, impl, folder, *options)

    return save


DIVISIONS = {
    "ep1": {"world": 1},
    "ep4": {"world": 4, "ep": 4},
    "pp2": {"world": 2, "pp": 2},
    "tp2, whole experts": {"world": 2, "tp": 2, "ep": 2, "etp": 1},
    "tp2, cut experts": {"world": 2, "tp": 2, "etp": 2},
    "ep2 x tp2, cut experts": {"world": 4, "tp": 2, "ep": 2, "etp": 2},
}


def test_saved_at_ep2_loads_on_any_ranks_and_into_megatrons_own_layer(megatron, saved):
    folder, before = saved(EP2, "dmoe")
    for division in DIVISIONS.values():
        assert_same_model(before, megatron.run("load", EP2.on(**division), "dmoe", folder))
    for impl, division in (("native", "ep1"), ("native", "tp2, cut experts"), ("experts", "ep4")):
        assert_same_model(before, megatron.run("load", EP2.on(**DIVISIONS[division]), impl, folder))


@pytest.mark.parametrize("single", [False, True], ids=["one tensor", "a tensor for every expert"])
def test_a_checkpoint_of_megatrons_own_layer_loads(megatron, saved, single):
    folder, before = saved(EP2, "native", False, single)
    for impl, division in (("dmoe", "ep1"), ("dmoe", "ep4"), ("dmoe", "tp2, cut experts"), ("experts", "ep1")):
        loaded = megatron.run("load", EP2.on(**DIVISIONS[division]), impl, folder, False, single)
        assert_same_model(before, loaded)


def test_single_shards_and_cut_experts_go_back_to_megatrons_own_layer(megatron, saved):
    folder, before = saved(EP2, "dmoe", False, True)
    assert_same_model(before, megatron.run("load", EP2, "native", folder, False, True))
    folder, before = saved(EP2.on(**DIVISIONS["tp2, cut experts"]), "dmoe")
    assert_same_model(before, megatron.run("load", EP2, "native", folder))


@pytest.mark.parametrize(
    "case",
    [EXTRAS, PLAIN, pytest.param(QUANTILE, marks=since(0, 19))],
    ids=["bias of the choice, shared expert", "biases, no gate", "quantile balancing"],
)
@pytest.mark.parametrize(("first", "second"), [("native", "dmoe"), ("dmoe", "native")])
def test_everything_else_of_a_layer_goes_both_ways(megatron, saved, case, first, second):
    folder, before = saved(case, first)
    there = case if second == "native" else case.on(world=1)  # on one rank Megatron's own biases fail in backward
    assert_same_model(before, megatron.run("load", there, second, folder))


@pytest.mark.parametrize(
    ("first", "second", "division"),
    [("dmoe", "dmoe", None), ("native", "dmoe", None), ("dmoe", "native", None), ("dmoe", "dmoe", "ep4")],
)
def test_the_optimizer_goes_on_where_it_was(megatron, saved, first, second, division):
    case = dataclasses.replace(EP2, steps=2)
    folder, before = saved(case, first, True)
    there = case if division is None else case.on(**DIVISIONS[division])
    after = megatron.run("load", there, second, folder, True)
    assert_same_model(before, after)
    if division is None:  # otherwise other ranks see other data
        for (loss, norm), (same_loss, same_norm) in zip(before[0]["next"], after[0]["next"], strict=True):
            assert abs(loss - same_loss) < 2e-6
            assert abs(norm - same_norm) < 2e-5


def test_without_sharded_state_dict_experts_are_lost(megatron, saved):
    folder, before = saved(EP2, "dmoe", False, False, "sharded_state_dict")

    def check():
        loaded = megatron.run("load", EP2.on(world=1), "dmoe", folder, False, False, "sharded_state_dict")
        assert_same_model(before, loaded)

    with pytest.raises((AssertionError, RankError)):
        check()
