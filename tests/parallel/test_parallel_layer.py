"""``MoE(ep_group=...)`` on gloo ranks against the layer on one rank, and what it tells when something is wrong."""

from __future__ import annotations

import pytest
import rank_jobs
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parallel_layer_cases import BASE, H, close, part_of
from rank_pool import RankError, RankPool

from dmoe import MoE, MoEConfig, aux_loss

# Ranks, and how they are arranged: experts over all of them, (EP, TP), or (nodes, ranks of a node), by the columns.
ARRANGEMENTS = [
    (2, "flat"),
    (4, "flat"),
    (4, ("tp", 2)),
    (4, ("tp", 4)),
    (4, ("levels", 2)),
]


@st.composite
def layers(draw):
    """A config whose capacity and losses are counted over each rank's own tokens, tokens of each rank, and a seed."""
    world, arrangement = draw(st.sampled_from(ARRANGEMENTS))
    tp = arrangement[1] if arrangement[0] == "tp" else 1
    experts = draw(st.sampled_from([max(1, world // tp // 2), world // tp, 2 * world // tp]))
    shards = max(1, world // tp // experts) * tp  # ranks that share an expert, each with a part of its F
    gated = draw(st.booleans())
    widths = st.lists(st.integers(1, 5).map(lambda n: n * shards), min_size=experts, max_size=experts)
    fields = {
        "hidden_size": H,
        "ffn_hidden_size": draw(st.just(4) | widths),
        "num_experts": experts,
        "top_k": draw(st.integers(1, min(experts, 3))),
        "gated": gated,
        "bias": draw(st.sampled_from(["none", "expert", "output"])),
        "router": draw(st.sampled_from(["top_k", "top_k", "uniform", "expert_choice"])),
        "causal": False,
        "gate_normalization": draw(st.sampled_from([None, 1.0])),
        "capacity": draw(st.none() | st.integers(0, 3)),
        "drop_order": draw(st.sampled_from(["token_major", "choice_major", "gate_weight"])),
        "shared_ffn_hidden_size": draw(st.none() | st.just(3)),
        "load_balancing_coefficient": draw(st.sampled_from([0.0, 0.3])),
        "router_z_loss_coefficient": draw(st.sampled_from([0.0, 0.1])),
        "expert_grad_scale": draw(st.sampled_from(["mean", "sum", "sqrt_world_size"])),
    }
    if fields["router"] == "expert_choice":
        fields |= {"capacity": None, "gate_normalization": None, "drop_order": "token_major"}
    each = max(1, experts // (world // tp))
    fields["overlap_degree"] = draw(st.sampled_from([degree for degree in (1, 2) if each % degree == 0]))
    fields["join_choices"] = draw(st.booleans())
    if arrangement == ("levels", 2) and experts % 2 == 0:
        fields["rows_between_nodes"] = draw(st.sampled_from(["once_per_rank", "once_per_node"]))
    if fields["overlap_degree"] == 1 and fields["ffn_hidden_size"] == 4:
        fields["balance_ranks"] = draw(st.sampled_from([None, "replicate"]))
        fields |= {"min_rows_per_copy": 1, "balance_slack": 0.0, "max_expert_copies": draw(st.integers(1, 2))}
    tokens = draw(st.lists(st.sampled_from([0, 1, 5, 8]), min_size=world, max_size=world))
    return fields, arrangement, tokens, draw(st.booleans()), draw(st.integers(0, 2**20))


def shares_of(tokens, seed, dtype, masked=False):
    torch.manual_seed(seed)
    return [
        (torch.randn(n, H).to(dtype), torch.randn(n, H).to(dtype), torch.rand(n) < 0.7 if masked else None)
        for n in tokens
    ]


def one_rank(fields, seed, shares, dtype=torch.float64):
    """The layer in this process, which runs each share by itself; gradients add up."""
    torch.manual_seed(seed)
    module = MoE(**fields, dtype=dtype)
    by_share = []
    for x, grad_y, mask in shares:
        x = x.clone().requires_grad_()
        y = module(x, token_mask=mask)
        loss = aux_loss(module)
        ((y * grad_y).sum() + loss).backward()
        metrics = module.last_metrics
        by_share.append({"y": y.detach(), "x": x.grad, "loss": loss.detach(), "metrics": metrics})
    return module, by_share


@pytest.mark.parametrize("how", [{"overlap_degree": 2}, {"recompute_pre_activation": True, "bias": "expert"}, {}])
def test_experts_in_fp8_on_two_ranks_equal_those_on_one(ranks, how):
    """Each row has its scale, and each expert its blocks: who computes them changes no code."""
    shares = shares_of([9, 4], 3, torch.float64)
    fields = {**BASE, "expert_compute": "fp8", "saved_activations": "fp8", "expert_grad_scale": "sum", **how}
    results = ranks.run(rank_jobs.layer, fields, 7, torch.float64, shares, ranks=2)
    module, expected = one_rank(fields, 7, shares)
    plain = one_rank({**BASE, **how}, 7, shares)[1]
    for rank, (result, single, exact) in enumerate(zip(results, expected, plain, strict=True)):
        close("y", result["y"], single["y"])
        close("x", result["x"], single["x"])
        assert 0 < (single["y"] - exact["y"]).norm() < 0.15 * exact["y"].norm()
        for name, parameter in module.named_parameters():
            if name.startswith("experts."):
                close(name, result["gradients"][name], part_of(module, name, parameter.grad, rank, 2))


def test_experts_in_fp8_with_slices_of_f(ranks):
    """The rows of a slice have scales of their own: near what one rank computes, as that is near the exact result."""
    shares = shares_of([9, 4, 7, 2], 3, torch.float64)
    fields = {**BASE, "expert_compute": "fp8", "saved_activations": "fp8", "expert_grad_scale": "sum"}
    results = ranks.run(rank_jobs.layer, fields, 7, torch.float64, shares, None, ("tp", 2))
    for result, exact in zip(results, one_rank({**BASE, "expert_grad_scale": "sum"}, 7, shares)[1], strict=True):
        for name in ("y", "x"):
            assert 0 < (result[name] - exact[name]).norm() < 0.15 * exact[name].norm()


@settings(max_examples=50)
@given(case=layers(), dtype=st.sampled_from([torch.float64, torch.float64, torch.float32]))
def test_a_layer_on_many_ranks_equals_the_layer_on_one(ranks, case, dtype):
    fields, arrangement, tokens, masked, seed = case
    world, tolerance = len(tokens), 1e-12 if dtype == torch.float64 else 3e-5
    shares = shares_of(tokens, seed + 1, dtype, masked)
    tp = arrangement[1] if arrangement[0] == "tp" else 1
    results = ranks.run(rank_jobs.layer, fields, seed, dtype, shares, None, arrangement, ranks=world)
    module, expected = one_rank(fields, seed, shares, dtype)
    scale = {"mean": 1 / world, "sum": 1, "sqrt_world_size": world**-0.5}[fields["expert_grad_scale"]]
    for rank, (result, single) in enumerate(zip(results, expected, strict=True)):
        close("y", result["y"], single["y"], tolerance)
        close("x", result["x"], single["x"], tolerance)
        close("loss", result["loss"], single["loss"], tolerance)
        assert torch.equal(result["tokens_per_expert"], single["metrics"].tokens_per_expert)
        assert torch.equal(result["kept_per_expert"], single["metrics"].kept_per_expert)
        assert result["bytes_sent"] == result["wire"]
        if fields.get("rows_between_nodes") != "once_per_node":  # where nobody counts
            assert result["naive_bytes_sent"] >= 0
        for name, parameter in module.named_parameters():
            assert torch.equal(
                result["parameters"][name], part_of(module, name, parameter.detach(), rank, world, tp)
            ), name
            if name.startswith("experts."):
                gradient = part_of(module, name, parameter.grad, rank, world, tp) * scale
                close(name, result["gradients"][name], gradient, tolerance)
        assert set(result["marks"].values()) == {(True, False)}
    for name, parameter in module.named_parameters():
        if not name.startswith("experts."):  # every rank has the part of its own tokens
            close(name, sum(result["gradients"][name] for result in results), parameter.grad, tolerance)
    assert single["metrics"].bytes_sent is None


def test_ranks_together_equal_one_rank_on_all_tokens(ranks):
    shares = shares_of([5, 0, 9, 2], 3, torch.float64)
    fields = {**BASE, "expert_grad_scale": "sum"}
    results = ranks.run(rank_jobs.layer, fields, 7, torch.float64, shares)
    everything = tuple(torch.cat([share[n] for share in shares]) for n in (0, 1))
    module, (single,) = one_rank(fields, 7, [(*everything, None)])
    close("y", torch.cat([r["y"] for r in results]), single["y"])
    close("x", torch.cat([r["x"] for r in results]), single["x"])
    for name, parameter in module.named_parameters():
        of_ranks = [result["gradients"][name] for result in results]
        close(name, torch.cat(of_ranks) if name.startswith("experts.") else sum(of_ranks), parameter.grad)


@pytest.mark.parametrize("options", [{}, {"selection_bias": True, "selection_bias_update_rate": 0.1}], ids=["", "bias"])
def test_parameters_after_optimizer_steps_equal_one_rank(ranks, options):
    world, steps, fields = 4, 3, {**BASE, **options, "load_balancing_coefficient": 0.1}
    torch.manual_seed(1)
    batches = [[torch.randn(n, H, dtype=torch.float64) for n in (6, 3, 0, 8)] for _ in range(steps)]
    results = ranks.run(rank_jobs.train, fields, 5, batches, steps)
    torch.manual_seed(5)
    module = MoE(**fields, dtype=torch.float64)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.05)
    for batch in batches:
        optimizer.zero_grad()
        for x in batch:
            ((module(x).square().sum() + aux_loss(module)) / world).backward()
        optimizer.step()
        module.update_selection_bias()
    for name, value in module.state_dict().items():
        for rank, result in enumerate(results):
            close(name, result[name], part_of(module, name, value, rank, world), 1e-11)


@pytest.mark.parametrize("choices", ["all", "first"])
@pytest.mark.parametrize("masked", [False, True])
def test_the_global_balance_loss_is_that_of_all_tokens_together(ranks, choices, masked):
    """The mean of the ranks' losses, and of their gradients, as DDP takes it."""
    shares = shares_of([5, 0, 9, 2], 3, torch.float64, masked)
    fields = {**BASE, "load_balancing_coefficient": 0.3, "load_balancing_choices": choices}
    over_ranks = {**fields, "load_balancing_over": "global"}
    results = ranks.run(rank_jobs.layer, over_ranks, 7, torch.float64, shares)
    x, grad_y, mask = (torch.cat([share[n] for share in shares]) if masked or n < 2 else None for n in range(3))
    torch.manual_seed(7)
    module = MoE(**fields, dtype=torch.float64)
    y = module(x, token_mask=mask)
    loss = aux_loss(module)
    ((y * grad_y).sum() + 4 * loss).backward()
    close("loss", sum(result["loss"] for result in results) / 4, loss.detach())
    router = sum(result["gradients"]["router.weight"] for result in results)
    close("router", router, module.router.weight.grad)
    assert module.router.weight.grad.abs().max() > 0.01


def test_static_mode_in_a_layer(ranks):
    shares = shares_of([5, 4, 0, 6], 3, torch.float64)
    dynamic = ranks.run(rank_jobs.layer, BASE, 7, torch.float64, shares)
    static = ranks.run(rank_jobs.layer, {**BASE, "max_rows_received": 24}, 7, torch.float64, shares)
    tight = ranks.run(rank_jobs.layer, {**BASE, "max_rows_received": 4}, 7, torch.float64, shares)
    for one, other, little in zip(dynamic, static, tight, strict=True):
        for name in ("y", "x", "kept_per_expert"):
            close(name, other[name], one[name])
        for name, gradient in one["gradients"].items():
            close(name, other["gradients"][name], gradient)
        assert other["bytes_sent"] == other["wire"] == 3 * 6 * (H + 4 + H) * 8
        assert little["bytes_sent"] == 3 * 1 * (H + 4 + H) * 8
        assert (little["kept_per_expert"] <= one["kept_per_expert"]).all()
        assert one["rows_dropped"] is None
        assert other["rows_dropped"] == 0
        assert (little["rows_dropped"] > 0) == (little["kept_per_expert"].sum() < one["kept_per_expert"].sum())
    assert sum(r["kept_per_expert"].sum() for r in tight) < sum(r["kept_per_expert"].sum() for r in dynamic)


def test_autocast_halves_the_bytes_of_rows(ranks):
    shares = shares_of([5, 4], 3, torch.float32)
    results = ranks.run(rank_jobs.layer, BASE, 7, torch.float32, shares, torch.bfloat16, ranks=2)
    torch.manual_seed(7)
    module = MoE(**BASE)
    full = ranks.run(rank_jobs.layer, BASE, 7, torch.float32, shares, ranks=2)
    for (x, _, _), result, wide in zip(shares, results, full, strict=True):
        with torch.autocast("cpu", torch.bfloat16):
            y = module(x)
        assert result["y"].dtype == y.dtype == torch.bfloat16
        torch.testing.assert_close(result["y"], y, rtol=2e-2, atol=2e-2)
        assert result["naive_bytes_sent"] * 2 == wide["naive_bytes_sent"]
        assert result["wire"] == result["bytes_sent"] < wide["wire"]


@pytest.mark.parametrize(("wire_dtype", "worst"), [("fp8", 0.06), ("int8", 0.03)])
@pytest.mark.parametrize("back", [False, True])
def test_a_narrow_wire_in_a_layer(ranks, wire_dtype, worst, back):
    """Relative error of outputs and gradients in the norm; bytes as measured: H + 4 instead of 8 H there."""
    shares = shares_of([40, 9, 0, 30], 3, torch.float64)
    exact = ranks.run(rank_jobs.layer, BASE, 7, torch.float64, shares)
    narrow = ranks.run(
        rank_jobs.layer, {**BASE, "wire_dtype": wire_dtype, "wire_backward": back}, 7, torch.float64, shares
    )
    for name in ("y", "x"):
        one, other = (torch.cat([result[name] for result in results]) for results in (exact, narrow))
        assert 0 < (one - other).norm() / one.norm() < (2 if name == "x" and back else 1) * worst, name
    for one, other in zip(exact, narrow, strict=True):
        assert other["wire"] == other["bytes_sent"]
        saved = one["bytes_sent"] - other["bytes_sent"]
        assert saved % (8 * H - (H + 4)) == 0
        assert (saved > 0) == (one["x"].shape[0] > 0)


def test_meshes_copies_and_files(ranks):
    torch.manual_seed(0)
    shares = [torch.randn(3, H, dtype=torch.float64) for _ in range(4)]
    torch.manual_seed(2)
    module = MoE(**BASE, dtype=torch.float64)
    for x, (y, of_twin, of_pair, experts, on_pickle, on_square) in zip(
        shares, ranks.run(rank_jobs.by_mesh, BASE, 2, shares), strict=True
    ):
        for result in (y, of_twin, of_pair):
            close("y", result.detach(), module(x).detach())
        assert experts == 2
        assert "a process group cannot be written to a file" in on_pickle
        assert "expected a DeviceMesh of one dimension, got 2 ('dp', 'ep')" in on_square


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_experts": 6}, "ValueError: ep_group: expected num_experts to be a multiple of the ranks, got E = 6"),
        ({"num_experts": 3}, "ValueError: ep_group: expected at most num_experts = 3 ranks, or a multiple of them"),
        ({"overlap_degree": 2}, "ValueError: overlap_degree: expected a divisor of the 1 experts of each rank, got 2"),
        ({"accumulate_main_grad": True}, "ValueError: MoE: accumulate_main_grad: expected False with ep_group, or"),
        ({"accumulate_main_grad": True, "expert_grad_scale": "sum"}, "built"),
    ],
)
def test_what_cannot_be_spread_is_refused_by_the_constructor(ranks, fields, message):
    for told in ranks.run(rank_jobs.constructor_error, {**BASE, **fields}):
        assert told.startswith(message)


def test_a_group_has_to_be_one():
    for wrong in (3, "gloo", object()):
        with pytest.raises(TypeError, match=r"ep_group: expected a torch\.distributed ProcessGroup that this rank"):
            MoE(**BASE, ep_group=wrong)


def test_options_of_the_config():
    assert MoEConfig(**BASE).expert_grad_scale == "mean"
    with pytest.raises(ValueError, match="expert_grad_scale: expected one of 'mean', 'sum', 'sqrt_world_size', got"):
        MoEConfig(**BASE, expert_grad_scale="max")
    with pytest.raises(ValueError, match="max_rows_received: expected at least 0, or None, got -1"):
        MoEConfig(**BASE, max_rows_received=-1)


ODD_ONE = {
    "num_experts": ({"num_experts": 8}, 0, torch.float32, "num_experts: 4 on ranks 0, 1, 3, 8 on rank 2"),
    "top_k": ({"top_k": 1}, 0, torch.float32, "top_k: 2 on ranks 0, 1, 3, 1 on rank 2"),
    "hidden_size": ({"hidden_size": 3}, 0, torch.float32, "hidden_size: 6 on ranks 0, 1, 3, 3 on rank 2"),
    "ffn_hidden_size": ({"ffn_hidden_size": 5}, 0, torch.float32, "ffn_hidden_size: 4 on ranks 0, 1, 3, 5 on rank 2"),
    "dtype": ({}, 0, torch.bfloat16, "dtype of the experts: torch.float32 on ranks 0, 1, 3, torch.bfloat16 on rank 2"),
    "option": ({"max_rows_received": 9}, 0, torch.float32, "max_rows_received: None on ranks 0, 1, 3, 9 on rank 2"),
    "fp8": ({"expert_compute": "fp8"}, 0, torch.float32, "expert_compute: None on ranks 0, 1, 3, 'fp8' on rank 2"),
    "seed": ({}, 1, torch.float32, "on rank 2 (call torch.manual_seed with one value on all ranks"),
}


@pytest.mark.parametrize("field", ODD_ONE)
def test_ranks_that_disagree_are_told_on_every_rank(ranks, field):
    odd, seed, dtype, message = ODD_ONE[field]
    by_rank = [BASE, BASE, {**BASE, **odd}, BASE]
    dtypes = [torch.float32, torch.float32, dtype, torch.float32]
    with pytest.raises(RankError) as caught:
        ranks.run(rank_jobs.disagree, by_rank, [0, 0, seed, 0], dtypes)
    assert set(caught.value.by_rank) == {0, 1, 2, 3}
    for kind, text in caught.value.by_rank.values():
        assert kind == "ValueError"
        assert text.startswith("MoE: the ranks of the expert-parallel group disagree: ")
        assert message in text.splitlines()[0]


def test_loaded_values_need_no_common_seed(ranks):
    assert ranks.run(rank_jobs.loaded_alike, BASE) == [(2, H)] * 4


@pytest.mark.parametrize("where", ["before", "experts", "backward", "absent"])
def test_a_rank_that_dies_or_does_not_come_fails_the_others_with_a_reason(where):
    pool = RankPool(3)
    try:
        with pytest.raises(RankError) as caught:
            pool.run(rank_jobs.die, {**BASE, "num_experts": 3}, where, 1)
    finally:
        pool.close()
    by_rank = caught.value.by_rank
    assert by_rank[1][0] == ("RuntimeError" if where == "absent" else "died")
    for rank in (0, 2):
        kind, text = by_rank[rank]
        assert kind == "RuntimeError"
        assert text.startswith("dmoe: the ")
        assert f"failed on rank {rank} of 3 of its group. Most likely another rank died" in text
