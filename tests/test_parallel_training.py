"""Training steps over ranks: gradients of experts and of the rest, their replicas, and clipping."""

from __future__ import annotations

import math

import pytest
import rank_jobs_training as jobs
import torch
from test_parallel_layer import BASE, close, part_of

H = BASE["hidden_size"]


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


@pytest.mark.parametrize("replicas", [1, 2, 4])
@pytest.mark.parametrize("micro", [1, 2])
def test_steps_with_replicas_equal_one_process(ranks, replicas, micro):
    """EP alone, EP x DP, DP alone; with gradient accumulation; clipped by the norm over everything."""
    fields = {**BASE, "bias": "expert", "load_balancing_coefficient": 0.1}
    batches = batches_for((6, 3, 0, 8), 3, micro)
    results = ranks.run(jobs.train, fields, replicas, batches, 0.5, micro > 1)
    model, norms = by_hand(fields, batches, 0.5)
    world = 4 // replicas
    largest = max(p.grad.abs().max() for p in model.parameters())
    for rank, (values, norms_there, largest_there, experts) in enumerate(results):
        assert len(experts) == 4 // world
        close("norms", norms_there, torch.stack(norms))
        close("largest", largest_there, largest)
        for name, value in model.state_dict().items():
            mine = value
            if ".experts." in name:
                mine = part_of(model.moe, name.removeprefix("moe."), value, rank % world, world)
            close(name, values[name], mine)
    assert (torch.stack(norms) > 0.5).all()  # clipping was at work


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
