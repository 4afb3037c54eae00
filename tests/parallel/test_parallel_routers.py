"""Families of routers over ranks: each as on one rank, and what is counted over the group where that is asked for."""

from __future__ import annotations

import pytest
import rank_jobs_routers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rank_pool import RankError
from router_cases import FAMILIES, config_of, inputs

import dmoe
from dmoe import MoE


def one_process(name, fields, shares):
    torch.manual_seed(0)
    layer = MoE(config_of(name, **fields), dtype=torch.float64)
    results = []
    for rank, (x, ids) in enumerate(shares):
        x = x.clone().requires_grad_()
        torch.manual_seed(100 + rank)
        y = layer(x, token_ids=ids)
        loss = dmoe.aux_loss(layer)
        layer.router.zero_grad()
        (y.square().sum() + loss).backward()
        gradients = {key: p.grad.clone() for key, p in layer.router.named_parameters()}
        results.append({"y": y.detach(), "x": x.grad, "loss": loss.detach(), "router": gradients,
                        "kept_per_expert": layer.last_metrics.kept_per_expert})  # fmt: skip
    layer.update_selection_bias()
    return layer, results


@pytest.mark.parametrize("name", [*FAMILIES])
def test_each_family_on_ranks_is_what_it_is_on_one(ranks, name):
    world = 2
    shares = [inputs(seed=seed, dtype=torch.float64) for seed in range(world)]
    layer, expected = one_process(name, {}, shares)
    found = ranks.run(rank_jobs_routers.family, name, {}, shares, ranks=world)
    for result, single in zip(found, expected, strict=True):
        for key in ("y", "x", "loss"):
            torch.testing.assert_close(result[key], single[key], rtol=1e-11, atol=1e-12)
        for key, gradient in single["router"].items():
            torch.testing.assert_close(result["router"][key], gradient, rtol=1e-11, atol=1e-12)
        assert torch.equal(result["kept_per_expert"], single["kept_per_expert"])
        if result["bias"] is not None:
            torch.testing.assert_close(result["bias"], layer.router.selection_bias)


@settings(max_examples=15)
@given(
    world=st.sampled_from([2, 4]),
    order=st.sampled_from(["token_major", "choice_major"]),
    factor=st.sampled_from([0.25, 0.5, 1.0]),
    seed=st.integers(0, 99),
)
def test_a_capacity_over_the_group_is_of_its_tokens_in_order(ranks, world, order, factor, seed):
    torch.manual_seed(seed)
    shares = [torch.randn(5, 6, dtype=torch.float64) for _ in range(world)]
    fields = {"capacity_over": "group", "capacity_factor": factor, "drop_order": order}
    found = ranks.run(rank_jobs_routers.chosen, "top_k", fields, shares, ranks=world)
    tokens = 5 * world
    capacity = config_of("top_k", capacity_factor=factor).capacity_for(tokens)
    chosen = torch.cat([indices for indices, _, _ in found]).tolist()
    visits = [(t, k) for t in range(tokens) for k in range(2)]
    if order == "choice_major":
        visits = [(t, k) for k in range(2) for t in range(tokens)]
    room, kept = [0] * 4, {}
    for t, k in visits:
        expert = chosen[t][k]
        room[expert] += 1
        kept[t, k] = room[expert] <= capacity
    for rank, (_, rows, counts) in enumerate(found):
        mine = [[kept[rank * 5 + t, k] for k in range(2)] for t in range(5)]
        assert rows.tolist() == mine
        assert counts.sum() == sum(map(sum, mine))


def test_a_capacity_over_a_group_of_one_is_that_of_its_tokens():
    x, _ = inputs(dtype=torch.float64)
    results = []
    for over in ("group", "local"):
        torch.manual_seed(0)
        layer = MoE(config_of("top_k", capacity_over=over, capacity_factor=0.5), dtype=torch.float64)
        results.append(layer(x))
        assert layer.last_metrics.dropped_share > 0
    assert torch.equal(*results)


@pytest.mark.parametrize("world", [2, 4])
def test_base_over_the_group_assigns_all_ranks_tokens_together(ranks, world):
    torch.manual_seed(0)
    shares = [torch.randn(6, 6, dtype=torch.float64) for _ in range(world)]  # 6 tokens, 4 experts: only together
    fields = {"router": dmoe.routing.Base(over="group")}
    found = ranks.run(rank_jobs_routers.chosen, "base", fields, shares, ranks=world)
    torch.manual_seed(0)
    layer = MoE(config_of("base"), dtype=torch.float64)
    everyone = torch.cat(shares)
    if 6 * world % 4:
        everyone = everyone[: 6 * world // 4 * 4]
    expected = layer.router(everyone).expert_indices
    together = torch.cat([indices for indices, _, _ in found])
    assert torch.equal(together, expected)
    assert torch.bincount(together[:, 0], minlength=4).tolist() == [6 * world // 4] * 4


def test_base_over_the_group_wants_equally_many_tokens_of_all_ranks(ranks):
    """Which gloo would end the process for."""
    shares = [torch.randn(4, 6, dtype=torch.float64), torch.randn(8, 6, dtype=torch.float64)]
    fields = {"router": dmoe.routing.Base(over="group")}
    with pytest.raises(RankError, match=r"MoE: x: expected equally many tokens on all ranks .*got \[4, 8\]") as told:
        ranks.run(rank_jobs_routers.chosen, "base", fields, shares, ranks=2)
    assert set(told.value.by_rank) == {0, 1}


def test_ranks_with_different_numbers_of_tokens_share_no_capacity(ranks):
    shares = [torch.randn(4, 6, dtype=torch.float64), torch.randn(6, 6, dtype=torch.float64)]
    fields = {"capacity_over": "group", "capacity_factor": 1.0}
    with pytest.raises(
        RankError, match=r"rank 0: MoE: capacity_over: 'group' expected equally many.*got \[4, 6\]"
    ) as told:
        ranks.run(rank_jobs_routers.chosen, "top_k", fields, shares, ranks=2)
    assert set(told.value.by_rank) == {0, 1}
