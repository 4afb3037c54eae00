"""Training steps over ranks: gradients of experts and of the rest, their replicas, and clipping."""

from __future__ import annotations

import math

import pytest
import rank_jobs_training as jobs
import torch
from parallel_layer_cases import BASE, close, part_of

from dmoe.parallel import GradScaler, clip_grad_norm, clip_grad_value, grad_norm

H = BASE["hidden_size"]
FIELDS = {**BASE, "bias": "expert", "load_balancing_coefficient": 0.1}


def batches_for(tokens_by_rank, steps, micro, seed=1):
    torch.manual_seed(seed)
    return [
        [[torch.randn(n, H, dtype=torch.float64) for _ in range(micro)] for n in tokens_by_rank] for _ in range(steps)
    ]


def by_hand(fields, batches, max_norm):
    """One process: the mean over ranks of their summed micro batches' gradients."""
    model = jobs.Net(fields)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    norms = []
    for step in batches:
        optimizer.zero_grad()
        for micro_batches in step:
            for x in micro_batches:
                (jobs.loss_of(model, model, x) / len(step)).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm))
        optimizer.step()
    return model, norms


@pytest.mark.parametrize(
    ("replicas", "tp", "experts"),
    [(1, 1, 4), (2, 1, 4), (4, 1, 4), (1, 1, 2), (2, 1, 1), (1, 2, 4), (2, 2, 4), (1, 2, 1)],
)
@pytest.mark.parametrize("micro", [1, 2])
def test_steps_with_replicas_equal_one_process(ranks, replicas, tp, experts, micro):
    """EP alone, x DP, DP alone, experts cut in two, EP x TP; gradient accumulation; clipped by the norm of all."""
    fields = {**FIELDS, "num_experts": experts, "top_k": min(experts, 2)}
    batches = batches_for((6, 3, 0, 8), 3, micro)
    results = ranks.run(jobs.train, fields, replicas, tp, batches, 0.5, micro > 1)
    model, norms = by_hand(fields, batches, 0.5)
    world = 4 // replicas
    largest = max(p.grad.abs().max() for p in model.parameters())
    for rank, (values, norms_there, largest_there, owned) in enumerate(results):
        assert len(owned) == max(1, experts // (world // tp))
        close("norms", norms_there, torch.stack(norms))
        close("largest", largest_there, largest)
        for name, value in model.state_dict().items():
            close(name, values[name], share(model, name, value, rank % world, world, tp))
    assert (torch.stack(norms) > 0.5).all()  # clipping was at work


@pytest.mark.parametrize("micro", [1, 2])
def test_steps_without_a_wrapper_equal_one_process(ranks, micro):
    """Backwards that add up are averaged each, which changes nothing; what nobody uses gets no gradient."""
    batches = batches_for((6, 3, 0, 8), 2, micro)
    model, norms = by_hand(FIELDS, batches, 0.5)
    for rank, (values, norms_there, unused) in enumerate(ranks.run(jobs.train_unwrapped, FIELDS, batches, 0.5)):
        close("norms", norms_there, torch.stack(norms))
        assert unused is None
        for name, value in model.state_dict().items():
            close(name, values[name], share(model, name, value, rank, 4, 1))


def test_without_a_wrapper_experts_that_are_held_twice_are_refused(ranks):
    for told in ranks.run(jobs.held_twice, BASE):
        assert "expected experts that are shared by all 4 ranks, got 2 that share them" in told


@pytest.mark.parametrize(
    ("replicas", "message"),
    [
        ("none", "data_parallel: expert_replicas: expected a group of 4 / 2 ranks, those that hold the same experts"),
        ("the other way", "of which this rank is the only one in its expert-parallel group, got a group that shares"),
    ],
)
def test_replicas_that_do_not_fit_are_named(ranks, replicas, message):
    for told in ranks.run(jobs.wrongly_wrapped, BASE, replicas):
        assert len(told) == 1
        assert message in told[0]


def test_norms_of_a_model_on_one_rank():
    from dmoe.parallel import clip_grad_norm, grad_norm

    model = jobs.Net(BASE)
    assert grad_norm(model) == 0
    jobs.loss_of(model, model, torch.randn(5, H, dtype=torch.float64)).backward()
    for order in (1.0, 2.0, 3.5, math.inf):
        close(
            str(order),
            grad_norm(model, order),
            torch.nn.utils.get_total_norm([p.grad for p in model.parameters()], order),
        )
    with pytest.raises(ValueError, match="grad_norm: norm_type: expected a number above 0, or inf, got 0"):
        grad_norm(model, 0)
    model.first.weight.grad[0, 0] = math.nan
    before = model.last.weight.grad.clone()
    with pytest.raises(
        RuntimeError, match=r"clip_grad_norm: expected a finite norm of order 2\.0 of the gradients, got"
    ):
        clip_grad_norm(model, 1.0, error_if_nonfinite=True)
    assert torch.equal(model.last.weight.grad, before)


def share(model, name, value, rank, world, tp=1):
    """What a rank holds of a value of the whole model."""
    return part_of(model.moe, name.removeprefix("moe."), value, rank, world, tp) if ".experts." in name else value


def whole(model, results, name, tp=1):
    """A value put together from the ranks' parts, when each part is held once."""
    together = torch.empty_like(model.state_dict()[name])
    for rank, values in enumerate(results):
        share(model, name, together, rank, len(results), tp).copy_(values[name])
    return together


@pytest.mark.parametrize(("tp", "experts"), [(1, 4), (1, 2), (2, 4)])
def test_a_checkpoint_of_four_ranks_loads_on_one_two_and_four(ranks, tmp_path, tp, experts):
    """With two experts each of them is cut in two on four ranks, and whole on two; so by tensor parallelism."""
    fields = {**FIELDS, "num_experts": experts}
    batches = batches_for((6, 3, 1, 8), 3, 1)
    folder = str(tmp_path / "checkpoint")
    saved = ranks.run(jobs.save, fields, 1, tp, batches, folder)
    model = jobs.Net(fields)
    for replicas, other_tp in ((4, 1), (2, 1), (1, 1), (1, 2), (2, 2)):
        world = 4 // replicas
        loaded = ranks.run(jobs.load, fields, replicas, other_tp, batches, folder)
        for rank, (before, losses, after) in enumerate(loaded):
            close("losses", losses, saved[rank][1])
            for name in model.state_dict():
                there = rank % world, world, other_tp
                mine = share(model, name, whole(model, [s[0] for s in saved], name, tp), *there)
                assert torch.equal(before[name], mine), name
                close(
                    name,
                    after[name],
                    share(model, name, whole(model, [s[2] for s in saved], name, tp), *there),
                )


def test_a_checkpoint_of_ranks_loads_in_one_process_and_the_other_way(ranks, tmp_path):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    batches = batches_for((6, 3, 1, 8), 2, 1)
    there, here = str(tmp_path / "ranks"), str(tmp_path / "one")
    saved = ranks.run(jobs.save, FIELDS, 1, 1, batches, there)
    model = jobs.Net(FIELDS)
    state = {"model": {name: torch.full_like(value, torch.nan) for name, value in model.state_dict().items()}}
    dcp.load(state, checkpoint_id=there, no_dist=True)
    for name, value in state["model"].items():
        assert torch.equal(value, whole(model, [s[0] for s in saved], name)), name

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    jobs.loss_of(model, model, batches[0][0][0]).backward()
    optimizer.step()
    model_state, moments = get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optimizer": moments}, checkpoint_id=here, no_dist=True)
    for rank, (before, _, _) in enumerate(ranks.run(jobs.load, FIELDS, 1, 1, batches, here)):
        for name, value in model.state_dict().items():
            assert torch.equal(before[name], share(model, name, value, rank, 4)), name


def test_plain_tensors_would_bring_back_the_wrong_experts(ranks, tmp_path):
    """Why parameters are DTensors: with plain ones every rank writes, and reads, tensors of one name."""
    batches = batches_for((6, 3, 1, 8), 2, 1)
    folder = str(tmp_path / "checkpoint")
    saved = ranks.run(jobs.save, FIELDS, 1, 1, batches, folder, False)
    loaded = ranks.run(jobs.load, FIELDS, 1, 1, batches, folder, False)
    right = [
        torch.equal(a[0]["moe.experts.down_proj"], b[0]["moe.experts.down_proj"])
        for a, b in zip(saved, loaded, strict=True)
    ]
    assert not all(right)


@pytest.mark.parametrize(("replicas", "experts"), [(2, 4), (4, 4), (4, 2), (2, 2)])
def test_steps_under_fsdp_equal_one_process(ranks, replicas, experts):
    fields = {**FIELDS, "num_experts": experts, "ffn_hidden_size": 8, "hidden_size": 8, "top_k": 1}
    torch.manual_seed(0)
    batches = [[[torch.randn(n, 8, dtype=torch.float64)] for n in (6, 3, 2, 8)] for _ in range(3)]
    model, norms = by_hand(fields, batches, 0.5)
    for values, norms_there, cuts, marks in ranks.run(jobs.train_with_fsdp, fields, replicas, batches, 0.5):
        close("norms", norms_there, torch.stack(norms))
        for name, value in model.state_dict().items():
            close(name, values[name], value)
        assert marks == {(True, False)}
        inner = replicas > experts // (4 // replicas)
        assert ("dim=1" in cuts["down_proj"]) == inner, cuts


@pytest.mark.parametrize(
    ("replicas", "options"),
    [
        (1, {"overlap_degree": 2}),
        (1, {"max_rows_received": 32}),
        ("nodes", {}),
        ("nodes", {"overlap_degree": 2, "max_rows_received": 32, "shared_ffn_hidden_size": 3}),
        (1, {"router": "expert_choice", "causal": False}),
        (2, {"router": "uniform"}),
    ],
    ids=str,
)
def test_steps_in_other_modes_equal_one_process(ranks, replicas, options):
    """Overlap, the static mode with room enough, two hops, and routers that do not choose top-k."""
    fields = {**FIELDS, "num_experts": 8, **options}
    batches = batches_for((6, 3, 1, 8), 3, 1)
    results = ranks.run(jobs.train, fields, replicas, 1, batches, 0.5)
    model, norms = by_hand({**fields, "overlap_degree": 1}, batches, 0.5)
    world = 2 if replicas == 2 else 4
    for rank, (values, norms_there, _, _) in enumerate(results):
        close("norms", norms_there, torch.stack(norms))
        for name, value in model.state_dict().items():
            close(name, values[name], share(model, name, value, rank % world, world))


def test_steps_with_zero_equal_one_process(ranks):
    batches = batches_for((6, 3, 0, 8), 3, 1)
    model, _ = by_hand(FIELDS, batches, 0.5)
    for rank, values in enumerate(ranks.run(jobs.train_with_zero, FIELDS, batches, 0.5)):
        for name, value in model.state_dict().items():
            close(name, values[name], share(model, name, value, rank, 4))


@pytest.mark.parametrize(("capacity", "bound"), [(None, None), (1, None), (None, 4)])
def test_metrics_over_ranks(ranks, capacity, bound):
    torch.manual_seed(0)
    shares = [torch.randn(n, H, dtype=torch.float64) for n in (6, 3, 0, 8)]
    fields = {**BASE, "capacity": capacity, "max_rows_received": bound}
    results = ranks.run(jobs.metrics, fields, shares)
    for _, reduced, calls in results:
        assert calls == 1
        assert torch.equal(reduced.tokens_per_expert, sum(own.tokens_per_expert for own, _, _ in results))
        assert torch.equal(reduced.kept_per_expert, sum(own.kept_per_expert for own, _, _ in results))
        assert reduced.tokens_per_expert.sum() == 17 * 2
        entropy = sum(own.entropy * n for (own, _, _), n in zip(results, (6, 3, 0, 8), strict=True)) / 17
        close("entropy", reduced.entropy, entropy)
        assert reduced.bytes_sent == sum(own.bytes_sent for own, _, _ in results)
        if bound is None:
            assert reduced.naive_bytes_sent == sum(own.naive_bytes_sent for own, _, _ in results)
            assert reduced.rows_dropped is None
        else:
            assert reduced.rows_dropped == sum(own.rows_dropped for own, _, _ in results) > 0
        assert (reduced.dropped_share > 0) == (capacity is not None or bound is not None)


def test_some_of_a_models_parameters_are_clipped_by_their_own_norm():
    """As those of one of several optimizers; by norm and by value, without touching the others."""
    model = jobs.Net(FIELDS)
    jobs.loss_of(model, model, batches_for((6,), 1, 1)[0][0][0]).backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    some = [p for name, p in model.named_parameters() if "experts" in name]
    expected = torch.stack([p.grad.norm() for p in some]).norm()
    close("norm", clip_grad_norm(model, 0.5, parameters=iter(some)), expected)
    close("clipped", grad_norm(model, parameters=some), torch.tensor(0.5, dtype=torch.float64), 1e-5)
    clip_grad_value(some, 1e-3)
    for name, parameter in model.named_parameters():
        if "experts" in name:
            close(name, parameter.grad, (before[name] * 0.5 / (expected + 1e-6)).clamp(-1e-3, 1e-3))
        else:
            assert torch.equal(parameter.grad, before[name])


def test_a_grad_scaler_like_another():
    other = torch.amp.GradScaler("cpu", init_scale=8.0, growth_factor=3.0, backoff_factor=0.25, growth_interval=7)
    other.scale(torch.ones(()))
    made = GradScaler.like(other)
    assert made.state_dict() == other.state_dict()
    assert not GradScaler.like(torch.amp.GradScaler("cpu", enabled=False)).is_enabled()
