"""Tutel's moe_layer on gloo ranks against the layer in one process: results, gradients, state, chunks and hops."""

from __future__ import annotations

import pytest
import rank_jobs_compat
import torch
from parallel_layer_cases import close
from rank_jobs_compat import H, tutel_layer

from dmoe.compat.tutel.gates import Call

TWO = {"type": "top", "k": 2, "capacity_factor": 1.0}
COSINE = {"type": "cosine_top", "k": 1, "capacity_factor": 1.25, "proj_dim": 8}
# Gate; experts of a rank, and other options; ranks; of a forward; nodes; then chunks and hops that come of it.
CASES = [
    (TWO, {"per_device": 2}, 2, {}, None, 1, None),
    (COSINE, {"per_device": 1, "batch_prioritized_routing": True}, 4, {"adaptive_r": 0}, None, 1, None),
    (TWO, {"per_device": 2, "a2a_ffn_overlap_degree": 4}, 2, {}, None, 2, None),
    (TWO, {"per_device": 1, "kind": "llama_ffn", "use_2dh": True, "is_postscore": False}, 4, {}, 2, 1, (2, 2)),
    (TWO, {"per_device": 1, "use_2dh": True}, 4, {"capacity_factor": -0.5}, 1, 1, None),
    (TWO, {"per_device": -2, "parallel_type": "model"}, 4, {}, None, 1, None),  # two ranks share an expert
]


def part_of(name, whole, rank, world):
    """What a rank has of a parameter of all experts."""
    if not name.startswith("experts."):
        return whole
    if world > 2 and len(whole) == 2:  # a slice of one expert
        expert, slices = whole[rank // 2 : rank // 2 + 1], 2
        return expert if name.endswith("fc2_bias") else expert.chunk(slices, 1)[rank % 2]
    return whole.chunk(world)[rank]


@pytest.mark.parametrize(("gate", "options", "world", "forward", "nodes", "chunks", "hops"), CASES)
def test_a_layer_on_ranks_equals_the_layer_on_one(ranks, gate, options, world, forward, nodes, chunks, hops):
    torch.manual_seed(0)
    each = options["per_device"]
    experts = each * world if each > 0 else world // -each
    alone = {**options, "per_device": experts, "use_2dh": False, "parallel_type": "auto"}
    one = tutel_layer(gate, **alone)
    shared = max(world // experts, 1)
    for parameter in one.parameters():
        torch.nn.init.normal_(parameter)
    one.sharded_count = shared  # what capacities are rounded up to
    state = {name: value.clone() for name, value in one.state_dict().items()}
    shares = [tuple(torch.randn(n, H, dtype=torch.float64) for _ in range(2)) for n in (9, 4, 7, 6)[:world]]
    results = ranks.run(rank_jobs_compat.tutel, gate, options, state, shares, forward, nodes, ranks=world)
    by_rank = []
    forward = {key: value for key, value in forward.items() if key != "adaptive_r"}
    for x, grad_y in shares:
        one.zero_grad()
        x = x.clone().requires_grad_()
        y = one(x, **forward)
        ((y * grad_y).sum() + y.l_aux / 2).backward()
        by_rank.append((y, x.grad, one.dispatch_count, {name: p.grad for name, p in one.named_parameters()}))
    for rank, (got, (y, grad_x, count, gradients)) in enumerate(zip(results, by_rank, strict=True)):
        close("y", got["y"], y.detach())
        close("l_aux", got["l_aux"], y.l_aux.detach())
        close("x", got["x"], grad_x)
        assert torch.equal(got["count"], count)
        assert (got["experts"], got["chunks"], got["hops"]) == (experts, chunks, hops)
        assert got["marks"] == {(True, False, True)}
        for name, gradient in got["gradients"].items():
            if name.startswith("experts."):  # those of all ranks' tokens, as Tutel's layer leaves them
                total = sum(other[3][name] for other in by_rank)
                close(name, gradient, part_of(name, total, rank, world))
            else:
                close(name, gradient, gradients[name])
        for name, value in got["state"].items():
            assert torch.equal(value, part_of(name, state[name], rank, world))


def test_capacities_of_the_rank_with_most_tokens(ranks):
    torch.manual_seed(0)
    tight = {"type": "top", "k": 2, "capacity_factor": 0.7}
    one = tutel_layer(tight, per_device=4)
    shares = [tuple(torch.randn(n, H, dtype=torch.float64) for _ in range(2)) for n in (12, 5)]
    state = one.state_dict()
    options = {"per_device": 2}
    results = ranks.run(rank_jobs_compat.tutel, tight, options, state, shares, {"inequivalent_tokens": True}, ranks=2)
    capacity = 2 * int(0.7 * 3)
    (gate,) = one.gates
    for (x, _), got in zip(shares, results, strict=True):
        gate.configure(Call(2, 0.7, 1, capacity))
        y, _ = one.route_and_run(x, gate)
        close("y", got["y"], y.detach())
    own = ranks.run(rank_jobs_compat.tutel, tight, options, state, shares, {}, ranks=2)
    assert not torch.allclose(own[1]["y"], results[1]["y"])


def test_what_does_not_fit_is_said(ranks):
    for shared, flat, degree, nodes, odd in ranks.run(rank_jobs_compat.tutel_messages):
        assert "num_experts_per_device: expected 3 ranks for each expert to divide the 4 ranks" in shared
        assert "expected at least 1 with 'llama_ffn', got experts that 2 ranks share" in flat
        assert "adaptive:r' with r in [0, 1, 2, 4] for 4 ranks of an expert, got 'adaptive:3'" in degree
        assert "use_2dh: expected LOCAL_WORLD_SIZE, as torchrun sets it" in nodes
        assert nodes.endswith("got none of 4")
        assert odd.endswith("got 3 of 4")
