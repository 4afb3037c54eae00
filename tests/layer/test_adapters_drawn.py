"""Adapters in every form that they may have, drawn by hypothesis, against a loop over tokens with dense matrices."""

from __future__ import annotations

import dataclasses

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from helpers import saved_bytes
from hypothesis import given

import dmoe
from dmoe.functional import moe_mlp
from dmoe.plan import plan_token_choice, sort_by_group

H = 6
ACTS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": torch.relu,
    "relu_squared": lambda x: torch.relu(x) ** 2,
}


@dataclasses.dataclass
class Case:
    """Experts one by one as dense matrices, and what dmoe takes."""

    x: torch.Tensor
    indices: torch.Tensor
    gates: torch.Tensor
    widths: list[int]
    gated: bool
    up: list[torch.Tensor]  # (rows, H) an expert: gate rows, then up rows
    down: list[torch.Tensor]  # (H, F)
    biases: list[tuple[torch.Tensor, torch.Tensor]] | None
    factors: list[dict]  # of each adapter: ranks, per expert (a_up, b_up, a_down, b_down), scales
    ids: torch.Tensor | None
    options: dict


@st.composite
def cases(draw, several=False):
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    experts, tokens, top_k = draw(st.integers(1, 5)), draw(st.integers(0, 9)), draw(st.integers(1, 3))
    lists = draw(st.booleans()) and experts > 1
    widths = [draw(st.integers(1, 5)) for _ in range(experts)] if lists else [draw(st.integers(1, 6))] * experts
    gated = draw(st.booleans())

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    halves = 2 if gated else 1
    up = [normal(halves * f, H).requires_grad_(False) for f in widths]
    down = [normal(H, f) for f in widths]
    biases = [(normal(halves * f), normal(H)) for f in widths] if draw(st.booleans()) else None
    factors = []
    for _ in range(draw(st.integers(1, 3)) if several else 1):
        rank = draw(st.integers(1, 4))
        share_a, share_b = draw(st.booleans()), draw(st.booleans()) and not lists
        a_up = normal(1 if share_a else experts, rank, H)
        a_down = [normal(rank, f) for f in widths]
        if draw(st.booleans()) and not lists:
            a_down = [a_down[0]] * experts
        b_up = [normal(halves * f, rank) for f in widths]
        b_up = [b_up[0]] * experts if share_b else b_up
        b_down = normal(1 if draw(st.booleans()) else experts, H, rank)
        which = draw(st.sampled_from(["both", "up", "down"]))
        factors.append(
            {
                "a_up": a_up,
                "b_up": b_up,
                "a_down": a_down,
                "b_down": b_down,
                "shared_b": share_b,
                "shared_a_down": len({id(a) for a in a_down}) == 1 and experts > 1,
                "scale": draw(st.sampled_from([1.0, 0.5, -2.0])),
                "which": which,
            }
        )
    indices = torch.randint(0, experts + 1, (tokens, top_k), generator=g)
    ids = torch.randint(-1, len(factors), (tokens,), generator=g) if several else None
    options = {
        "activation": draw(st.sampled_from(sorted(ACTS))),
        "gate_weight_on": draw(st.sampled_from(["output", "activation", "input"])),
        "backend": draw(st.sampled_from([None, "grouped", "torch", "reference"])),
        "capacity": draw(st.sampled_from([None, 1, 3])),
    }
    if options["backend"] != "reference":
        options["recompute"] = draw(st.booleans())
    x, gates = normal(tokens, H), torch.rand(tokens, top_k, generator=g, dtype=torch.float64)
    return Case(x, indices, gates, widths, gated, up, down, biases, factors, ids, options)


def by_loop(case: Case, kept: torch.Tensor) -> torch.Tensor:
    """Token after token, choice after choice, with W + s B A made for it."""
    rows = []
    act, on = ACTS[case.options["activation"]], case.options["gate_weight_on"]
    for t in range(case.x.shape[0]):
        y = torch.zeros(H, dtype=torch.float64)
        for k in range(case.indices.shape[1]):
            e = int(case.indices[t, k])
            if e >= len(case.widths) or not kept[t, k]:
                continue
            n = 0 if case.ids is None else int(case.ids[t])
            up, down = case.up[e], case.down[e]
            if n >= 0:
                own = case.factors[n]
                if own["which"] != "down":
                    up = up + own["scale"] * own["b_up"][e] @ own["a_up"][e if own["a_up"].shape[0] > 1 else 0]
                if own["which"] != "up":
                    b = own["b_down"][e if own["b_down"].shape[0] > 1 else 0]
                    down = down + own["scale"] * b @ own["a_down"][e]
            w = case.gates[t, k]
            pre = up @ (case.x[t] * w if on == "input" else case.x[t])
            if case.biases is not None:
                pre = pre + case.biases[e][0]
            f = case.widths[e]
            hidden = act(pre[:f]) * pre[f:] if case.gated else act(pre)
            out = down @ (hidden * w if on == "activation" else hidden)
            if case.biases is not None:
                out = out + case.biases[e][1]
            y = y + (out * w if on == "output" else out)
        rows.append(y)
    return torch.stack(rows) if rows else case.x.new_zeros(0, H)


def given_to_dmoe(case: Case):
    """ExpertWeights and Adapters of the same numbers, still attached to them."""
    lists = len(set(case.widths)) > 1
    experts = len(case.widths)

    def halves(matrices, columns):
        """(2, F, columns) of each, or (F, columns)."""
        return [m.view(2, -1, columns) if case.gated else m for m in matrices]

    def joined(parts, dim):
        return torch.cat(parts, dim) if lists else torch.stack(parts)

    up_dim = 1 if case.gated else 0
    biases = {}
    if case.biases is not None:
        of_up = [b[0].view(2, -1) if case.gated else b[0] for b in case.biases]
        biases = {"up_bias": joined(of_up, up_dim), "down_bias": torch.stack([b[1] for b in case.biases])}
    sizes = tuple(case.widths) if lists else ()
    weights = dmoe.ExpertWeights(
        joined(halves(case.up, H), up_dim), joined(case.down, 1), **biases, gated=case.gated, ffn_sizes=sizes
    )
    adapters = []
    for own in case.factors:
        rank = own["a_up"].shape[1]
        b_up = halves(own["b_up"], rank)
        b_up = b_up[0].unsqueeze(0) if own["shared_b"] and experts > 1 and not lists else joined(b_up, up_dim)
        a_down = own["a_down"][0].unsqueeze(0) if own["shared_a_down"] and not lists else joined(own["a_down"], 1)
        up = dmoe.LowRank(own["a_up"], b_up, own["scale"])
        down = dmoe.LowRank(a_down, own["b_down"], own["scale"])
        adapters.append(dmoe.Adapters(up if own["which"] != "down" else None, down if own["which"] != "up" else None))
    return weights, adapters


def leaves(case: Case):
    tensors = [case.x, case.gates]
    for own in case.factors:
        if own["which"] != "down":
            tensors += [own["a_up"], *{id(b): b for b in own["b_up"]}.values()]
        if own["which"] != "up":
            tensors += [own["b_down"], *{id(a): a for a in own["a_down"]}.values()]
    return [t.requires_grad_() for t in tensors]


def check(case: Case):
    """Outputs and all gradients."""
    tensors = leaves(case)
    weights, adapters = given_to_dmoe(case)
    chosen = {"adapters": adapters[0]} if case.ids is None else {"adapters": adapters, "adapter_ids": case.ids}
    plan = plan_token_choice(case.indices, len(case.widths), capacity=case.options["capacity"])
    kept = plan.token_to_rows >= 0
    y = moe_mlp(case.x, case.indices, case.gates, weights, **case.options, **chosen)
    expected = by_loop(case, kept)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    weigh = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view_as(y)
    if not expected.requires_grad:
        return
    ours = torch.autograd.grad((y * weigh).sum(), tensors, allow_unused=True)
    theirs = torch.autograd.grad((expected * weigh).sum(), tensors, allow_unused=True)
    for tensor, one, other in zip(tensors, ours, theirs, strict=True):
        one, other = (torch.zeros_like(tensor) if grad is None else grad for grad in (one, other))
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


@given(cases())
def test_one_adapter_equals_dense_matrices(case):
    check(case)


@given(cases(several=True))
def test_each_token_takes_its_own(case):
    check(case)


@given(st.integers(0, 12), st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**31))
def test_rows_are_sorted_by_group_inside_experts(tokens, experts, groups, seed):
    g = torch.Generator().manual_seed(seed)
    indices = torch.randint(0, experts + 1, (tokens, 2), generator=g)
    of_token = torch.randint(-1, groups + 1, (tokens,), generator=g)
    plan = plan_token_choice(indices, experts, capacity=3)
    moved, offsets = sort_by_group(plan, of_token, groups)
    assert offsets.dtype == torch.int32
    assert torch.equal(offsets[:: groups + 1], plan.expert_offsets)
    for e in range(experts):
        for group in range(groups + 1):
            for row in range(*offsets[e * (groups + 1) + group :][:2].tolist()):
                token = int(moved.row_to_token[row])
                found = int(of_token[token]) if token >= 0 else groups
                assert (found if 0 <= found < groups else groups) == group
                if token >= 0:
                    slot = int(moved.row_to_slot[row])
                    assert int(indices[token, slot]) == e
                    assert int(moved.token_rows[int(moved.token_offsets[token]) + slot]) == row
    assert torch.equal((moved.token_rows < 0), (plan.token_rows < 0))


def plain_case(dtype=torch.float64, tokens=40, experts=4, width=16, rank=3):
    g = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    weights = dmoe.ExpertWeights(normal(experts, 2, width, H), normal(experts, H, width))
    shapes = (experts, rank, H), (experts, 2, width, rank), (experts, rank, width), (experts, H, rank)
    factors = tuple(normal(*shape).requires_grad_() for shape in shapes)
    x = normal(tokens, H).requires_grad_()
    indices = torch.randint(0, experts, (tokens, 2), generator=g)
    gates = torch.rand(tokens, 2, generator=g, dtype=torch.float64).to(dtype)
    return x, indices, gates, weights, factors


@pytest.mark.parametrize("backend", [None, "torch"])
def test_dropout_is_of_the_adapters_input_alone_and_the_same_in_backward(backend):
    x, indices, gates, weights, (a_up, b_up, a_down, b_down) = plain_case()

    def run(x, *factors, p=0.4):
        torch.manual_seed(5)
        up, down = dmoe.LowRank(*factors[:2], 0.7, p), dmoe.LowRank(*factors[2:], 0.3, p)
        return moe_mlp(x, indices, gates, weights, adapters=dmoe.Adapters(up, down), backend=backend)

    few = (x[:5].detach().requires_grad_(), a_up, b_up, a_down, b_down)
    indices, gates = indices[:5], gates[:5]
    assert torch.autograd.gradcheck(run, few)
    zeros = [torch.zeros_like(f) for f in few[1:]]
    torch.testing.assert_close(run(few[0], *zeros), moe_mlp(few[0], indices, gates, weights))
    assert not torch.allclose(run(*few), run(*few, p=0.0))


def test_dropout_keeps_its_share_and_its_mean():
    x, indices, gates, weights, _ = plain_case(tokens=4000)
    with torch.no_grad():
        # One number goes in, r = 1 and b picks it out: what the adapter adds is the dropped input itself.
        a, b = torch.zeros(4, 1, H, dtype=x.dtype), torch.zeros(4, H, 1, dtype=x.dtype)
        a_down = torch.zeros(4, 1, 16, dtype=x.dtype)
        a[:, 0, 0], b[:, 0, 0], a_down[:, 0, 0] = 1, 1, 1
        plain = moe_mlp(x, indices[:, :1], torch.ones_like(gates[:, :1]), weights)
        added = dmoe.Adapters(down=dmoe.LowRank(a_down, b, dropout=0.25))
        once = dmoe.Adapters(down=dmoe.LowRank(a_down, b))
        dropped = moe_mlp(x, indices[:, :1], torch.ones_like(gates[:, :1]), weights, adapters=added) - plain
        full = moe_mlp(x, indices[:, :1], torch.ones_like(gates[:, :1]), weights, adapters=once) - plain
        ratio = dropped[:, 0] / full[:, 0]
    kept = ratio.abs() > 1e-6
    torch.testing.assert_close(ratio[kept], torch.full_like(ratio[kept], 4 / 3), rtol=1e-6, atol=1e-6)
    assert abs(float(kept.double().mean()) - 0.75) < 0.03


def test_recomputing_saves_x_alone_and_gives_the_same_gradients():
    x, indices, gates, weights, factors = plain_case()
    sizes, grads = [], []
    for recompute in (False, True):
        adapters = dmoe.Adapters(dmoe.LowRank(*factors[:2]), dmoe.LowRank(*factors[2:]))
        with saved_bytes() as saved:
            y = moe_mlp(x, indices, gates, weights, adapters=adapters, recompute=recompute)
        sizes.append(saved.total)
        grads.append(torch.autograd.grad(y.square().sum(), [x, *factors]))
    rows = indices.numel()
    assert sizes[0] - sizes[1] == rows * (2 * 16 + 3) * 8  # the pre-activation, and A x
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)
