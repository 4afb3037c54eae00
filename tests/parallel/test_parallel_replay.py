"""One record on 1, 2 and 4 expert-parallel ranks, with and without full recomputation; and whose bits are the same."""

from __future__ import annotations

import pytest
import rank_jobs_replay
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parallel_layer_cases import part_of
from rank_jobs_replay import run_replayed

from dmoe import MoE, RoutingRecord
from dmoe.ops._library import compiled

needs_kernels = pytest.mark.skipif(not compiled, reason="csrc/ was not built, and nothing else promises it")
H, E = 24, 8
BASE = {"hidden_size": H, "ffn_hidden_size": 20, "num_experts": E, "load_balancing_coefficient": 0.0}


@st.composite
def cases(draw):
    """A layer, tokens with gradients and choices that are not its own, a mask, a dtype, and a seed."""
    top_k = draw(st.integers(1, 4))
    shared = draw(st.sampled_from([None, 10]))
    fields = BASE | {
        "top_k": top_k,
        "bias": draw(st.sampled_from(["none", "expert", "output"])),
        "gate_weight_on": draw(st.sampled_from(["output", "activation", "input"])),
        "score_function": draw(st.sampled_from(["softmax", "sigmoid"])),
        "gate_normalization": draw(st.sampled_from([None, 1.0])),
        "shared_ffn_hidden_size": shared,
        "shared_expert_gate": shared is not None and draw(st.booleans()),
    }
    balance = draw(st.sampled_from([None, "replicate"]))  # a copy of an expert computes what the expert does
    fields |= {"balance_ranks": balance, "balance_slack": 0.0, "min_rows_per_copy": 1}
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
    seed, count = draw(st.integers(0, 2**20)), draw(st.sampled_from([4, 12, 64]))
    torch.manual_seed(seed)
    x, grad = (torch.randn(count, H, dtype=torch.float64).to(dtype) for _ in range(2))
    mask = torch.rand(count) < 0.8 if draw(st.booleans()) else None
    ids = torch.rand(count, E).topk(top_k, 1).indices
    ids = torch.where(torch.rand(count, top_k) < 0.1, E, ids)
    return fields, x, grad, mask, ids, dtype, seed


def shares_of(case, world):
    _, x, grad, mask, ids, _, _ = case
    shares = []
    for part in torch.arange(len(x)).tensor_split(world):
        there = None if mask is None else mask[part]
        own = ids[part] if there is None else ids[part][there]  # padding is no token of a record
        shares.append((RoutingRecord({"moe": own}, E), x[part], grad[part], there))
    return shares


def joined(results):
    return {name: torch.cat([each[name] for each in results]) for name in ("y", "x", "gates")}


@needs_kernels
@settings(max_examples=6)
@given(case=cases(), recompute=st.sampled_from(["reentrant", "other"]))
def test_batch_invariant_bits_on_any_number_of_ranks(ranks, case, recompute):
    """Choices, outputs, gate weights, gradients of tokens: of one process, of 1, 2 and 4 ranks, recomputed or not."""
    fields, _, _, _, _, dtype, seed = case
    fields |= {"batch_invariant": True}
    torch.manual_seed(seed)
    layer = MoE(**fields, dtype=dtype)
    whole = run_replayed(layer, *shares_of(case, 1)[0], None)
    for world in (1, 2, 4):
        shares = shares_of(case, world)
        without, again = (
            ranks.run(rank_jobs_replay.replayed, fields, seed, dtype, shares, how, ranks=world)
            for how in (None, recompute)
        )
        for results in (without, again):
            results = [result for result in results if result is not None]
            assert RoutingRecord.cat([each["record"] for each in results]) == shares_of(case, 1)[0][0]
            for name, tensor in joined(results).items():
                assert torch.equal(tensor, whole[name]), (world, name)
        for rank, (one, other) in enumerate(zip(without[:world], again[:world], strict=True)):
            for name, grad in one["parameters"].items():
                assert torch.equal(grad, other["parameters"][name]), name
                # Weights' gradients are sums over all tokens, of another order on other ranks.
                if name.startswith("experts.") and dtype == torch.float64:
                    mine = part_of(layer, name, whole["parameters"][name], rank, world)
                    torch.testing.assert_close(grad * world, mine, rtol=1e-10, atol=1e-10)


@settings(max_examples=6)
@given(case=cases(), recompute=st.sampled_from([None, "reentrant", "other"]))
def test_without_batch_invariance_choices_are_the_same_and_sums_near(ranks, case, recompute):
    fields, _, _, _, _, dtype, seed = case
    torch.manual_seed(seed)
    whole = run_replayed(MoE(**fields, dtype=dtype), *shares_of(case, 1)[0], None)
    tolerance = {torch.float64: 1e-12, torch.float32: 3e-5, torch.bfloat16: 6e-2}[dtype]
    for world in (2, 4):
        results = ranks.run(
            rank_jobs_replay.replayed, fields, seed, dtype, shares_of(case, world), recompute, ranks=world
        )
        results = [result for result in results if result is not None]
        assert RoutingRecord.cat([each["record"] for each in results]) == shares_of(case, 1)[0][0]
        for name, tensor in joined(results).items():
            torch.testing.assert_close(
                tensor, whole[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )


@needs_kernels
def test_without_it_ranks_change_bits(ranks):
    """What the option is for, and that these tests would see it."""
    torch.manual_seed(0)
    fields = BASE | {"top_k": 4}
    ids = torch.rand(64, E).topk(4, 1).indices
    case = (fields, *torch.randn(2, 64, H), None, ids, torch.float32, 0)
    one, four = (
        joined(
            ranks.run(rank_jobs_replay.replayed, fields, 0, torch.float32, shares_of(case, world), ranks=world)[:world]
        )
        for world in (1, 4)
    )
    assert not torch.equal(one["y"], four["y"])


@needs_kernels
def test_records_of_ranks_join_to_that_of_one(ranks):
    """Recorded on four ranks, by the choices of a batch-invariant router; the whole record is one process's."""
    torch.manual_seed(0)
    fields, x = BASE | {"top_k": 2, "batch_invariant": True}, torch.randn(13, H)
    single = ranks.run(rank_jobs_replay.recorded, fields, 3, torch.float32, [x], ranks=1)[0]
    parts = ranks.run(rank_jobs_replay.recorded, fields, 3, torch.float32, list(x.tensor_split(4)))
    assert RoutingRecord.cat(parts) == single


def test_ranks_that_share_an_expert_are_refused(ranks):
    fields = BASE | {"num_experts": 2, "top_k": 1, "batch_invariant": True}
    for text in ranks.run(rank_jobs_replay.constructed, fields):
        assert text.startswith(
            "MoE: batch_invariant: expected False where ranks share an expert, got True with 2 slices"
        )


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_wrapped_models_record_and_replay_under_their_own_names(ranks, how):
    torch.manual_seed(0)
    xs = torch.randn(2, 5, H)
    for names, record, again, moved in ranks.run(rank_jobs_replay.wrapped, how, BASE | {"top_k": 2}, xs, ranks=2):
        assert list(record.layers) == names == ["0", "1.moe"]
        assert again == record
        assert moved > 0
