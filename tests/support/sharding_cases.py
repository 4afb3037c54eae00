"""Ranks in a grid, experts cut along F, drawn routings; and the same in one process that holds the experts whole."""

from __future__ import annotations

from typing import NamedTuple

import oracle
import rank_jobs_sharding as jobs
import torch
from hypothesis import strategies as st

H, F = 5, 8
# The grid of ranks, as (expert-parallel, tensor-parallel), and the experts.
HIDDEN_SHARDING = [((2, 1), 1), ((4, 1), 1), ((4, 1), 2)]
TENSOR_PARALLEL = [((1, 2), 3), ((1, 4), 2), ((2, 2), 2), ((2, 2), 6), ((2, 2), 1)]  # the last with hidden sharding


class Case(NamedTuple):
    """A grid of ranks, E, each rank's (x, ids, gates, dy), all experts' weights, options."""

    grid: tuple[int, int]
    experts: int
    shares: list
    weights: list
    options: dict

    @property
    def world(self):
        return len(self.shares)

    def __repr__(self):
        tokens, options = [ids.tolist() for _, ids, _, _ in self.shares], self.options
        return f"Case({self.grid}, {self.experts} experts, {tokens}, {options})"

    def to(self, dtype):
        """The same numbers, rounded."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        shares = [(x.to(dtype), ids, gates.to(wide), dy.to(dtype)) for x, ids, gates, dy in self.shares]
        return self._replace(shares=shares, weights=[None if w is None else w.to(dtype) for w in self.weights])

    def run(self, ranks, *more):
        ranks.run(jobs.make_groups)  # again after a job that broke the ranks, and the groups with them
        job = (jobs.sharded, self.grid, self.shares, self.weights, self.options)
        return ranks.run(*job, *more, ranks=self.world)


OPTIONS = [
    {"gated": True, "bias": False, "run": {}},
    {"gated": False, "bias": True, "run": {}},
    {"gated": True, "bias": True, "run": {"gate_weight_on": "activation"}},
    {"gated": True, "bias": False, "run": {"gate_weight_on": "input", "backend": "reference"}},
]


@st.composite
def cases(draw, layouts):
    """Idle ranks, hot ranks, masked choices, an expert chosen twice, no token anywhere."""
    grid, experts = draw(st.sampled_from(layouts))
    world, top_k = grid[0] * grid[1], draw(st.integers(1, 4))
    kind = draw(st.sampled_from(["any", "any", "one expert", "no token"]))
    share = draw(st.sampled_from([0.0, 0.0, 0.4, 1.0]))
    tokens = [0 if kind == "no token" else draw(st.sampled_from([0, 1, 3, 9])) for _ in range(world)]
    options = draw(st.sampled_from(OPTIONS))
    return case_of(grid, experts, tokens, top_k, options, draw(st.integers(0, 2**20)), kind == "one expert", share)


def case_of(grid, experts, tokens, top_k=2, options=OPTIONS[0], seed=0, one_expert=False, masked=0.0):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    shares = []
    for n in tokens:
        ids = torch.randint(0, 1 if one_expert else experts, (n, top_k), generator=generator)
        ids[torch.rand(n, top_k, generator=generator) < masked] = experts
        shares.append((randn(n, H), ids, torch.rand(n, top_k, generator=generator).double(), randn(n, H)))
    halves = (2,) if options["gated"] else ()
    biases = [randn(experts, *halves, F), randn(experts, H)] if options["bias"] else [None, None]
    return Case(grid, experts, shares, [randn(experts, *halves, F, H), randn(experts, H, F), *biases], options)


def in_one_process(case, kept=None):
    """The oracle on all ranks' tokens in a row."""
    x, ids, gates, grad_y = (torch.cat(parts) for parts in zip(*case.shares, strict=True))
    x, gates = x.clone().requires_grad_(), gates.clone().requires_grad_()
    leaves = [None if w is None else w.clone().requires_grad_() for w in case.weights]
    kept = (ids != case.experts).tolist() if kept is None else kept
    gate_on = case.options["run"].get("gate_weight_on", "output")
    y = oracle.moe(x, ids.tolist(), gates, kept, leaves, gated=case.options["gated"], gate_on=gate_on)
    sizes = [len(share[0]) for share in case.shares]
    inputs = [x, gates, *(leaf for leaf in leaves if leaf is not None)]
    grads = torch.autograd.grad(((y + 0 * x) * grad_y).sum(), inputs, allow_unused=True, materialize_grads=True)
    return y.detach().split(sizes), grads[0].split(sizes), grads[1].split(sizes), grads[2:]


def assert_equal_to_one_process(case, results, tolerance=1e-12, kept=None):
    y, grad_x, grad_gates, grad_weights = in_one_process(case, kept)

    def close(name, actual, expected):
        torch.testing.assert_close(
            actual, expected, rtol=tolerance, atol=tolerance, msg=lambda m: f"{name} of rank {rank}: {m}"
        )

    for rank, result in enumerate(results):
        close("y", result["y"], y[rank])
        close("x", result["x"], grad_x[rank])
        close("gates", result["gates"], grad_gates[rank])
        experts, (index, count) = result["place"]
        columns = range(index * F // count, (index + 1) * F // count)
        for n, (mine, whole) in enumerate(
            zip((w for w in result["weights"] if w is not None), grad_weights, strict=True)
        ):
            part = whole[experts]
            if n == 3:  # down_bias is whole on each of its ranks, and counts on one
                part = part if index == 0 else torch.zeros_like(part)
            else:
                part = part.index_select(-2 if n == 0 else -1, torch.tensor(columns))
            close(f"weight {n}", mine, part)
