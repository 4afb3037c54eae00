"""Rows and routings of several ranks, and what the experts should make of them, for the tests of exchanges."""

from __future__ import annotations

import oracle
import torch
from hypothesis import strategies as st

H, F = 5, 3
DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int16,
    torch.int64,
    torch.bool,
    torch.float8_e4m3fn,
]


@st.composite
def exchanges(draw):
    """``counts[i][j]`` rows from rank i to rank j, and rows that each rank keeps behind them."""
    world = draw(st.sampled_from([2, 4]))
    idle = draw(st.lists(st.booleans(), min_size=world, max_size=world))
    counts = [[0 if idle[i] or idle[j] else draw(st.integers(0, 4)) for j in range(world)] for i in range(world)]
    extra = [draw(st.integers(0, 2)) for _ in range(world)]
    return world, counts, extra, draw(st.integers(1, 5))


def pieces(rows, counts, source, target):
    """The rows that one rank sends to another."""
    first = sum(counts[source][:target])
    return rows[source][first : first + counts[source][target]]


@st.composite
def routings(draw):
    """Choices of every rank's tokens: idle ranks, hot ranks, masked choices, an expert chosen twice."""
    world = draw(st.sampled_from([1, 2, 4]))
    experts = world * draw(st.integers(1, 3))
    top_k = draw(st.integers(1, 5))
    kind = draw(st.sampled_from(["any", "any", "hot rank", "no token"]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    share = draw(st.sampled_from([0.0, 0.0, 0.4, 1.0]))
    ids = []
    for _ in range(world):
        tokens = 0 if kind == "no token" else draw(st.sampled_from([0, 1, 3, 9]))
        first = torch.randint(
            0, experts // world if kind == "hot rank" else experts, (tokens, top_k), generator=generator
        )
        masked = torch.rand(tokens, top_k, generator=generator) < share
        ids.append(torch.where(masked, experts, first).to(draw(st.sampled_from([torch.int32, torch.int64]))))
    return world, experts, ids, generator


def case_of(routing, dtype=torch.float64, options=None):
    """Shares of the ranks, all experts' weights, and options."""
    _, experts, ids, generator = routing
    options = {"gated": True, "bias": False, "run": {}} | (options or {})

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    halves = (2,) if options["gated"] else ()
    biases = (randn(experts, *halves, F), randn(experts, H)) if options["bias"] else (None, None)
    weights = randn(experts, *halves, F, H), randn(experts, H, F), *biases
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    shares = [(randn(len(i), H), i, torch.rand(i.shape, generator=generator).to(wide), randn(len(i), H)) for i in ids]
    return shares, weights, options


def in_one_process(shares, weights, options, dtype=torch.float64, kept=None):
    """The oracle on all ranks' tokens in a row; results by rank where they are tokens'."""
    experts, wide = weights[1].shape[0], torch.float64 if dtype == torch.float64 else torch.float32
    x, ids, gates, grad_y = (torch.cat(parts) for parts in zip(*shares, strict=True))
    x = x.detach().to(dtype).requires_grad_()
    gates = gates.detach().to(wide).requires_grad_()
    leaves = [None if w is None else w.detach().to(dtype).requires_grad_() for w in weights]
    kept = (ids != experts).tolist() if kept is None else kept
    gate_on = options["run"].get("gate_weight_on", "output")
    y = oracle.moe(x, ids.tolist(), gates, kept, leaves, gated=options["gated"], gate_on=gate_on)
    ((y + 0 * x) * grad_y.to(dtype)).sum().backward()
    sizes = [len(share[0]) for share in shares]
    grads = [None if leaf is None else torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
    gate_grads = torch.zeros_like(gates) if gates.grad is None else gates.grad
    return {
        "y": y.detach().split(sizes),
        "x": x.grad.split(sizes),
        "gates": gate_grads.split(sizes),
        "weights": [[None if g is None else g.chunk(len(sizes))[rank] for g in grads] for rank in range(len(sizes))],
    }


def assert_equal_to(expected, results, check):
    for rank, result in enumerate(results):
        for name in ("y", "x", "gates"):
            check(f"{name} of rank {rank}", result[name], expected[name][rank])
        for n, (mine, theirs) in enumerate(zip(result["weights"], expected["weights"][rank], strict=True)):
            if theirs is not None:
                check(f"weight {n} of rank {rank}", mine, theirs)


def exactly(name, actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12, msg=lambda m: f"{name}: {m}")
