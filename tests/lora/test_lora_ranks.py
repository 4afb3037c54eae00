"""Adapters on ranks: those of one rank, in parts; their gradients, files, copies; under FSDP2; what is refused."""

from __future__ import annotations

import re

import pytest
import rank_jobs_lora as jobs
import torch
from lora_cases import randomise
from rank_pool import RankError

import dmoe

FIELDS = {
    "hidden_size": 6,
    "ffn_hidden_size": 8,
    "num_experts": 4,
    "top_k": 2,
    "bias": "expert",
    "shared_ffn_hidden_size": 4,
    "load_balancing_coefficient": 0.0,
    "dtype": torch.float64,
}


def on_one_rank(fields=FIELDS, world=2, options=jobs.OPTIONS):
    """The layer on one rank, its initial factors, others for all to load, tokens of all ranks."""
    layer, trained = jobs.adapted(fields, options)
    initial = {name: p.detach().clone() for name, p in trained.items()}
    randomise(trained.values())
    values = {name: p.detach().clone() for name, p in trained.items()}
    torch.manual_seed(1)
    share = [torch.randn(n, 6, dtype=fields["dtype"]) for n in (5, 3, 0, 4)[:world]]
    return layer, initial, values, share


def part(name, value, rank, world=2):
    """What one rank has of a parameter."""
    return value.chunk(world)[rank] if name.startswith("experts.") else value


@pytest.mark.parametrize("dtensor", [True, False])
@pytest.mark.parametrize("widths", [8, [2, 8, 5, 3]])
def test_experts_in_parts_equal_one_rank(ranks, dtensor, widths):
    fields = {**FIELDS, "ffn_hidden_size": widths}
    packed = isinstance(widths, list)
    layer, initial, values, share = on_one_rank(fields)
    if packed:
        values = {}  # a state dict of experts of different widths is of one rank's
        layer, _ = jobs.adapted(fields)
    x = torch.cat(share).requires_grad_()
    y = layer(x)
    y.square().sum().backward()
    results = ranks.run(jobs.parallel, fields, values, share, dtensor, ranks=2)
    x_parts, y_parts = x.grad.split([5, 3]), y.detach().split([5, 3])
    gradients = {name: p.grad / 2 for name, p in layer.named_parameters() if p.grad is not None}
    norm = torch.stack([g.norm() for g in gradients.values()]).norm()
    starts = [0, 10, 18]
    for rank, result in enumerate(results):

        def mine(name, value, rank=rank):
            if packed and name in ("experts.lora.default.gate_up_proj.b", "experts.lora.default.down_proj.a"):
                return value.narrow(1, starts[rank], starts[rank + 1] - starts[rank])
            return part(name, value, rank)

        for name, value in initial.items():
            assert torch.equal(result["initial"][name], mine(name, value)), name
        torch.testing.assert_close(result["y"], y_parts[rank])
        torch.testing.assert_close(result["x"], x_parts[rank])
        assert set(result["gradients"]) == set(gradients)
        for name, value in gradients.items():
            torch.testing.assert_close(result["gradients"][name], mine(name, value), msg=name)
        torch.testing.assert_close(result["norm"], norm)
        of_experts = {mark for name, mark in result["marks"].items() if name.startswith("experts.")}
        assert of_experts == {(True, False)}
        assert {mark for name, mark in result["marks"].items() if name.startswith("router")} == {(None, None)}
        assert ("DTensor" in result["kinds"]) == (dtensor and not packed)


@pytest.mark.parametrize("recompute", [False, True])
def test_fsdp2_over_replicas_of_halves(ranks, recompute):
    layer, _, values, share = on_one_rank(world=4)
    y = layer(torch.cat(share))
    y.square().sum().backward()
    gradients = {name: p.grad / 4 for name, p in layer.named_parameters() if p.grad is not None}
    norm = torch.stack([g.norm() for g in gradients.values()]).norm()
    results = ranks.run(jobs.replicated, FIELDS, values, share, recompute)
    for rank, (there, grads, marks, norm_there) in enumerate(results):
        torch.testing.assert_close(there, y.detach().split([5, 3, 0, 4])[rank])
        assert set(grads) == set(gradients)
        for name, value in gradients.items():
            torch.testing.assert_close(grads[name], value, msg=name)
        assert marks == {(True, False)}
        torch.testing.assert_close(norm_there, norm)


def test_plain_fsdp2_and_what_it_is_too_late_for(ranks):
    layer, _, values, share = on_one_rank()
    layer(share[0]).square().sum().backward()
    for grads, told in ranks.run(jobs.sharded, FIELDS, values, share[0]):
        for name, p in layer.named_parameters():
            if p.requires_grad:
                torch.testing.assert_close(grads[name], p.grad, msg=name)
        merging, adding = told
        assert "expected a weight that FSDP does not shard, got a DTensor" in merging
        assert "merge before fully_shard" in merging
        assert "add adapters before fully_shard" in adding


def test_an_adapters_checkpoint_moves_to_another_number_of_ranks(ranks, tmp_path):
    layer, _, values, _ = on_one_rank(world=4)
    weights = ranks.run(jobs.written, FIELDS, values, str(tmp_path))
    state = dmoe.lora.state_dict(layer)
    dmoe.lora.merge(layer)
    for rank, there in enumerate(weights):
        for name, p in layer.named_parameters():
            torch.testing.assert_close(there[name], part(name, p.detach(), rank, 4), msg=name)
    for world in (2, 1):
        results = ranks.run(jobs.read, FIELDS, str(tmp_path), state["config"], ranks=world)
        for rank, there in enumerate(results):
            for name, value in state["tensors"].items():
                assert torch.equal(there[name], part(name, value, rank, world)), name


def test_an_adapter_of_all_experts_is_loaded_in_parts(ranks):
    layer, _, _, _ = on_one_rank()
    state = dmoe.lora.state_dict(layer)
    for rank, there in enumerate(ranks.run(jobs.whole_loaded, FIELDS, state, ranks=2)):
        for name, value in state["tensors"].items():
            assert torch.equal(there[name], part(name, value, rank)), name


@pytest.mark.parametrize("dtensor", [True, False])
def test_a_scaler_sees_an_adapters_overflow_on_all_ranks(ranks, dtensor):
    """All tokens are of one rank's experts; by itself the other would go on, and change its optimizer's state."""
    fields = {**FIELDS, "dtype": torch.float32, "top_k": 1, "shared_ffn_hidden_size": None}
    of_first, of_victim = ranks.run(jobs.half_steps, fields, dtensor, 1, ranks=2)
    assert not of_victim[0][0]
    assert of_victim[1][0]
    assert of_first[0][0] == dtensor  # plain tensors are made infinite, of DTensor the scaler knows
    assert [scale for _, scale in of_first] == [scale for _, scale in of_victim] == [4.0, 4.0]


def test_copies(ranks):
    for y, again, marks in ranks.run(jobs.copied, FIELDS, ranks=2):
        assert torch.equal(y, again)
        assert marks == {(True, False)}


@pytest.mark.parametrize(
    ("options", "groups", "then", "told"),
    [
        (
            {"share_a": True},
            "ep",
            None,
            "dmoe.lora.add: share_a: expected False where ranks hold 1 of 4 experts, got True",
        ),
        (
            {"share_b": True},
            "ep",
            None,
            "dmoe.lora.add: share_b: expected False where ranks hold 1 of 4 experts, got True",
        ),
        ({}, "grid", None, "experts: expected whole experts on each rank, got 1 of 2 parts of their F"),
        ({}, "ep", "use", "dmoe.lora.use: MoE: expected experts that are all on this rank, got 4 ranks"),
        ({}, "ep", "on one rank", "the ranks of the expert-parallel group disagree: .*adapters: {'experts': "),
        ({}, "ep", "other seeds", r"disagree: adapters: .*call torch\.manual_seed .* before dmoe\.lora\.add"),
    ],
)
def test_what_ranks_cannot_have_is_said_on_each(ranks, options, groups, then, told):
    for said in ranks.run(jobs.said, FIELDS, options, groups, then):
        assert re.search(told, said), said


def test_overlapped_layers_are_told_when_an_adapter_is_added(ranks):
    with pytest.raises(RankError, match="overlap_degree: expected 1 for experts that have adapters, got 2"):
        ranks.run(jobs.copied, {**FIELDS, "num_experts": 8, "overlap_degree": 2})
