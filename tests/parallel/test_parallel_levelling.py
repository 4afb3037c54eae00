"""Ranks made level by copies of experts: the plan on its own, and layers on gloo ranks against one process."""

from __future__ import annotations

import pytest
import rank_jobs_levelling as jobs
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parallel_layer_cases import BASE, H, close, part_of

from dmoe import MoE
from dmoe.parallel.levelling import Levelling, level, plan_levels, rows_that_pay

LEVEL = {"balance_ranks": "replicate", "balance_slack": 0.0, "min_rows_per_copy": 1}


# ---------------------------------------------------------------------------------------------------------- the plan


@st.composite
def loads(draw):
    """Rows of each source for each expert, and how many ranks own these."""
    owners, each = draw(st.integers(1, 8)), draw(st.integers(1, 5))
    sources = draw(st.integers(1, 4))
    row = st.lists(st.sampled_from([0, 0, 1, 2, 7, 30, 400]), min_size=owners * each, max_size=owners * each)
    return owners, torch.tensor(draw(st.lists(row, min_size=sources, max_size=sources)))


def most_rows(total, owners, slack):
    return max(-(-total // owners), int(total * (1 + slack) / owners))


def rows_of_owners(per_expert, owners, slots, rows):
    lent = torch.zeros(len(per_expert) + 1, dtype=torch.int64).index_add(0, slots.flatten(), rows.flatten())[:-1]
    assert (lent <= per_expert).all()
    return (per_expert - lent).view(owners, -1).sum(1) + rows.sum(1)


@settings(max_examples=200)
@given(case=loads(), copies=st.integers(1, 4), slack=st.sampled_from([0.0, 0.05, 0.5]), pays=st.sampled_from([1, 5]))
def test_a_plan_lends_no_more_than_there_is_and_makes_nothing_worse(case, copies, slack, pays):
    owners, by_source = case
    per_expert = by_source.sum(0)
    before = per_expert.view(owners, -1).sum(1)
    limit = most_rows(int(before.sum()), owners, slack)
    for static in (False, True):
        slots, rows = level(per_expert, owners, Levelling(slack, copies, pays), static=static)
        after = rows_of_owners(per_expert, owners, slots, rows)
        assert after.sum() == before.sum()
        assert (after <= before.clamp(min=limit)).all()
        assert ((rows == 0) | (rows >= pays)).all()
        home = slots // (len(per_expert) // owners)
        assert (rows[home == torch.arange(owners).unsqueeze(1)] == 0).all()  # nobody borrows what is its own
        if not static:
            assert ((slots < len(per_expert)) == (rows > 0)).all()
            assert (slots.sort(1).values == slots).all()
            assert slots.shape == (owners, copies)


@settings(max_examples=200)
@given(case=loads(), slack=st.sampled_from([0.0, 0.05]))
def test_enough_copies_make_ranks_level(case, slack):
    """As many as there are ranks beside an owner's: then nothing stands in the way."""
    owners, by_source = case
    per_expert = by_source.sum(0)
    limit, copies = most_rows(int(per_expert.sum()), owners, slack), len(per_expert)
    for static in (False, True):
        slots, rows = level(per_expert, owners, Levelling(slack, copies, 1), static=static)
        assert rows_of_owners(per_expert, owners, slots, rows).max() <= limit


@pytest.mark.parametrize(("owners", "experts", "zipf"), [(4, 16, 1.2), (8, 256, 1.2), (64, 256, 0.8), (256, 256, 1.2)])
def test_two_copies_on_each_rank_make_popular_experts_level(owners, experts, zipf):
    generator = torch.Generator().manual_seed(1)
    popular = torch.arange(1, experts + 1).double() ** -zipf
    for _ in range(5):
        order = torch.randperm(experts, generator=generator)
        drawn = torch.multinomial(popular[order], 2000 * owners, replacement=True, generator=generator)
        per_expert = drawn.bincount(minlength=experts)
        slots, rows = level(per_expert, owners, Levelling(0.05, 2, 1), static=False)
        after = rows_of_owners(per_expert, owners, slots, rows)
        assert after.max() <= 1.0505 * after.double().mean()


@settings(max_examples=100)
@given(case=loads(), copies=st.integers(1, 3), static=st.booleans(), seed=st.integers(0, 1000))
def test_every_row_has_one_place_and_places_are_as_full_as_planned(case, copies, static, seed):
    owners, by_source = case
    experts = by_source.shape[1]
    generator, total, of_plan = torch.Generator().manual_seed(seed), None, None
    for source, load in enumerate(by_source):
        choices = torch.arange(experts + 1).repeat_interleave(torch.cat([load, torch.tensor([seed % 4])]))
        choices = choices[torch.randperm(len(choices), generator=generator)].view(-1, 1).int()
        how = Levelling(0.0, copies, 1)
        plan = plan_levels(choices, experts, owners, by_source, source, how, static=static)
        expert_of = torch.cat([plan.expert_of, torch.tensor([experts])])
        assert torch.equal(expert_of[plan.choices.long()], choices.long())
        counts = plan.choices.flatten().bincount(minlength=len(expert_of))[:-1]
        total = counts if total is None else total + counts
        of_plan = plan
    by_place = total.view(owners, -1)
    assert torch.equal(by_place[:, experts // owners :], of_plan.slot_rows)
    assert torch.equal(by_place.sum(1), of_plan.rows)
    assert torch.equal(of_plan.rows_before, by_source.sum(0).view(owners, -1).sum(1))


def test_rows_that_pay_is_where_products_cost_what_the_weights_way_costs():
    hidden, ffn, flops, bandwidth, latency = 7168, 2048, 5e14, 4.5e10, 3e-5
    for projections in (2, 3):
        rows = rows_that_pay(hidden, ffn, 2, flops, bandwidth, latency, projections)
        numbers = projections * hidden * ffn
        saved = rows * (2 * numbers / flops + 2 * hidden * 2 / bandwidth)
        assert saved == pytest.approx(numbers * 2 / bandwidth + latency, rel=1e-3)
    assert rows_that_pay(4, 8, 1, 1.0, 1e9, 0.0) == 1


# ------------------------------------------------------------------------------------------------------------ layers


def choices(tokens, experts, top_k, kind, generator):
    """Distinct experts of each token: all tokens the same ones, or by Zipf's law."""
    if kind == "one expert":
        return torch.arange(top_k).expand(tokens, top_k).clone()
    weights = torch.arange(1, experts + 1).double() ** -1.2
    return torch.multinomial(weights.expand(max(tokens, 1), -1), top_k, generator=generator)[:tokens]


def shares_of(tokens, experts, top_k, kind, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(n, H, generator=generator, dtype=torch.float64).to(dtype),
            torch.randn(n, H, generator=generator, dtype=torch.float64).to(dtype),
            choices(n, experts, top_k, kind, generator),
        )
        for n in tokens
    ]


def one_process(fields, seed, shares, dtype=torch.float64, frozen=False):
    torch.manual_seed(seed)
    module = MoE(**fields, dtype=dtype)
    module.experts.requires_grad_(not frozen)
    results = []
    for x, grad_y, ids in shares:
        x = x.clone().requires_grad_()
        y = module(x, expert_indices=ids)
        (y * grad_y).sum().backward()
        results.append((y.detach(), x.grad))
    return module, results


def assert_equal_to_one_process(results, fields, seed, shares, tp=1, tolerance=1e-12, frozen=False):
    module, expected = one_process(fields, seed, shares, frozen=frozen)
    for rank, (result, (y, x)) in enumerate(zip(results, expected, strict=True)):
        close("y", result["y"], y, tolerance)
        close("x", result["x"], x, tolerance)
        for name, parameter in module.named_parameters():
            if name.startswith("experts.") and parameter.grad is not None:
                own = part_of(module, name, parameter.grad, rank, len(shares), tp)
                close(name, result["gradients"][name], own, tolerance)
        before, after = result["rank_rows"]
        assert torch.equal(after, results[0]["rank_rows"][1])
        assert before.sum() == after.sum() == sum(ids.numel() for *_, ids in shares)
    for name, parameter in module.named_parameters():
        if not name.startswith("experts."):
            close(name, sum(result["gradients"][name] for result in results), parameter.grad, tolerance)


ARRANGEMENTS = ["flat", ("levels", 2), ("tp", 2), "once_per_node"]


@pytest.mark.parametrize("kind", ["zipf", "one expert"])
@pytest.mark.parametrize("arrangement", ARRANGEMENTS, ids=str)
@pytest.mark.parametrize("experts", [2, 4, 8])
def test_level_ranks_compute_what_one_process_does(ranks, kind, arrangement, experts):
    """Flat, in two hops, with slices of each expert; with fewer experts than ranks two ranks share each."""
    top_k = 1 if experts == 2 or kind == "one expert" else 2
    fields = {**BASE, "num_experts": experts, "top_k": top_k, "bias": "expert", "expert_grad_scale": "sum"}
    shares = shares_of([90, 40, 0, 70], experts, top_k, kind)
    if arrangement == "once_per_node":
        fields["rows_between_nodes"], arrangement = arrangement, ("levels", 2)
    results = ranks.run(jobs.layer, {**fields, **LEVEL}, 7, torch.float64, shares, arrangement)
    assert_equal_to_one_process(results, fields, 7, shares, tp=2 if arrangement == ("tp", 2) else 1)
    for result in results:
        before, after = result["rank_rows"]
        assert before.max() > 1.3 * before.double().mean()
        assert after.max() - after.min() <= 1
        assert result["sent"][0] == result["sent"][1]


@pytest.mark.parametrize("how", ["recompute", "checkpoint", "frozen", "torch", "reference", "gate on input", "plain"])
def test_level_ranks_in_every_circumstance(ranks, how):
    options = {
        "recompute": {"recompute_pre_activation": True},
        "torch": {"backend": "torch"},
        "reference": {"backend": "reference"},
        "gate on input": {"gate_weight_on": "input", "gated": False, "activation": "relu"},
    }
    fields = {**BASE, "shared_ffn_hidden_size": 3, "expert_grad_scale": "sum", **options.get(how, {})}
    shares = shares_of([30, 11, 5, 0], 4, 2, "zipf")
    results = ranks.run(jobs.layer, {**fields, **LEVEL}, 7, torch.float64, shares, "flat", how)
    assert_equal_to_one_process(results, fields, 7, shares, frozen=how == "frozen")


def test_gradients_of_copies_go_into_main_grad(ranks):
    fields = {**BASE, "expert_grad_scale": "sum", "accumulate_main_grad": True}
    shares = shares_of([30, 11, 5, 9], 4, 2, "zipf", dtype=torch.float32)
    results = ranks.run(jobs.layer, {**fields, **LEVEL}, 7, torch.float32, shares, "flat", "main_grad")
    module, _ = one_process({**fields, "accumulate_main_grad": False}, 7, shares, torch.float32)
    for rank, result in enumerate(results):
        for name, parameter in module.named_parameters():
            if name.startswith("experts."):
                close(name, result["gradients"][name], part_of(module, name, parameter.grad, rank, 4), 3e-5)


def test_weights_travel_under_autocast_in_its_dtype(ranks):
    """As the products round them anyway: half the bytes, and results as near as those of ranks that are not level."""
    fields = {**BASE, "expert_grad_scale": "sum"}
    shares = shares_of([30, 11, 5, 9], 4, 2, "zipf", dtype=torch.float32)
    level_there = ranks.run(jobs.layer, {**fields, **LEVEL}, 7, torch.float32, shares, "flat", "autocast")
    without = ranks.run(jobs.layer, fields, 7, torch.float32, shares, "flat", "autocast")
    for level_one, plain in zip(level_there, without, strict=True):
        close("y", level_one["y"], plain["y"], 0.02)
        close("x", level_one["x"], plain["x"], 0.02)
        for name, gradient in plain["gradients"].items():
            close(name, level_one["gradients"][name], gradient, 0.05)
        assert level_one["sent"][0] == level_one["sent"][1]


def test_the_static_mode_needs_room_for_level_ranks_only(ranks):
    """One expert has all tokens. Its rank alone would receive them all; level ranks receive a quarter each."""
    fields = {**BASE, "top_k": 1, "expert_grad_scale": "sum", "max_expert_copies": 1, "balance_slack": 0.0}
    shares = shares_of([16, 16, 16, 16], 4, 1, "one expert")
    bound = {"max_rows_received": 64}
    level_there = ranks.run(jobs.layer, {**fields, **LEVEL, **bound}, 7, torch.float64, shares)
    assert_equal_to_one_process(level_there, fields, 7, shares)
    lost = ranks.run(jobs.layer, {**fields, **bound, "max_rows_received": 16}, 7, torch.float64, shares)
    assert all(result["kept"].sum() == 4 for result in lost)
    assert all(result["kept"].sum() == 16 for result in level_there)


@pytest.mark.parametrize(("wrapper", "replicas"), [("ddp", 1), ("ddp", 2), ("fsdp", 2)])
@pytest.mark.parametrize("kind", ["zipf", "one expert"])
def test_parameters_after_steps_equal_one_process(ranks, wrapper, replicas, kind):
    """Also of experts that FSDP2 gathers for their forward; a checkpoint knows of no copies."""
    fields = {**BASE, "bias": "expert", "top_k": 1 if kind == "one expert" else 2}
    batches = [[share[::2] for share in shares_of([30, 9, 0, 21], 4, fields["top_k"], kind, seed)] for seed in range(3)]
    results = ranks.run(jobs.train, {**fields, **LEVEL}, 5, batches, wrapper, replicas)
    torch.manual_seed(5)
    module = MoE(**fields, dtype=torch.float64)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.05)
    for batch in batches:
        optimizer.zero_grad()
        for x, ids in batch:
            (module(x, expert_indices=ids).square().sum() / 4).backward()
        optimizer.step()
    for values, levels in results:
        assert set(values) == set(module.state_dict())
        assert all(rows.max() - rows.min() <= 1 for rows in levels)
        for name, value in module.state_dict().items():
            close(name, values[name], value, 1e-12 if wrapper == "ddp" else 1e-11)


def test_nothing_is_copied_where_it_does_not_pay(ranks):
    shares = shares_of([30, 11, 5, 9], 4, 2, "zipf")
    fields = {**BASE, **LEVEL, "min_rows_per_copy": 10**6}
    for result in ranks.run(jobs.layer, fields, 7, torch.float64, shares):
        before, after = result["rank_rows"]
        assert torch.equal(before, after)


def test_by_default_a_few_rows_do_not_pay(ranks):
    shares = shares_of([30, 11, 5, 9], 4, 2, "zipf")
    fields = {**BASE, "balance_ranks": "replicate"}
    for result in ranks.run(jobs.layer, fields, 7, torch.float64, shares):
        assert torch.equal(*result["rank_rows"])


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"balance_ranks": "replicate", "ffn_hidden_size": [4, 8, 4, 4]}, "ffn_hidden_size: expected one width"),
        ({"balance_ranks": "replicate", "overlap_degree": 2}, "overlap_degree: expected 1"),
        ({"balance_slack": -0.1}, "balance_slack: expected at least 0"),
        ({"max_expert_copies": 0}, "max_expert_copies: expected at least 1"),
        ({"min_rows_per_copy": 0}, "min_rows_per_copy: expected at least 1, or None"),
        ({"balance_ranks": "move"}, "balance_ranks"),
    ],
)
def test_options_that_cannot_be(fields, told):
    with pytest.raises(ValueError, match=told):
        MoE(**{**BASE, **fields})
