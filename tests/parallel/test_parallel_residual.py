"""ResidualMoE under expert and data parallelism against one process."""

from __future__ import annotations

import rank_jobs_compat
import torch
from parallel_layer_cases import close

import dmoe


def test_a_residual_layer_on_two_ranks_equals_one(ranks):
    torch.manual_seed(1)
    shares = [tuple(torch.randn(n, rank_jobs_compat.H, dtype=torch.float64) for _ in range(2)) for n in (7, 4)]
    results = ranks.run(rank_jobs_compat.residual, 3, shares, ranks=2)
    layer, counts = rank_jobs_compat.residual_here(3), 0
    for (x, grad_y), result in zip(shares, results, strict=True):
        y = layer(x)
        (((y * grad_y).sum() + dmoe.aux_loss(layer)) / 2).backward()
        close("y", result["y"], y.detach())
        counts = counts + layer.moe.last_metrics.tokens_per_expert
    for name, parameter in layer.named_parameters():
        of_ranks = [result["gradients"][name] for result in results]
        spread = name.startswith("moe.experts.")
        close(name, torch.cat(of_ranks) if spread else of_ranks[0], parameter.grad)
        if not spread:
            close(name, of_ranks[1], parameter.grad)
    for result in results:
        assert torch.equal(result["counts"][0], counts)
