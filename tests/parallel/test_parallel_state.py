"""State of layers that has to be alike on all ranks, or right on each: biases, scales, FSDP2's ways of loading."""

from __future__ import annotations

import pytest
import rank_jobs_state as jobs
import torch
from parallel_layer_cases import BASE
from rank_pool import RankError

import dmoe

H = BASE["hidden_size"]
BIASED = {**BASE, "selection_bias": True, "selection_bias_update_rate": 0.25}


@pytest.mark.parametrize("how", ["ddp", "fsdp2", "experts"])
def test_selection_biases_are_alike_and_follow_all_tokens(ranks, how):
    """More assignments than bfloat16 can count, in micro batches that DDP sends rank 0's buffers between."""
    torch.manual_seed(1)
    counts = [[(3, 301), (150, 7)], [(9, 300), (1, 1)], [(160, 180), (40, 3)], [(1, 200), (90, 90)]]
    tokens = [[[torch.randn(n, H) for n in micro] for micro in mine] for mine in counts]
    results = ranks.run(jobs.biases, BIASED, how, tokens)
    expected = torch.zeros(4)
    for step in range(2):
        total = sum(loads[step] for loads, _ in results).double()
        expected = expected + 0.25 * torch.sign(total.mean() - total).float()
        for _, biases in results:
            assert torch.equal(biases[step], expected)


@pytest.mark.parametrize("how", ["alone", "experts"])
def test_biases_of_ranks_that_nobody_named_are_refused(ranks, how):
    for told in ranks.run(jobs.untold, BIASED, how):
        assert told.startswith("update_selection_bias: expected to know which of the 4 ranks train this layer")
        assert "dmoe.update_selection_bias(model, group)" in told


def test_a_global_batch_of_ranks_that_nobody_named_is_refused(ranks):
    fields = {**BASE, "load_balancing_coefficient": 0.1, "load_balancing_over": "global"}
    for told in ranks.run(jobs.untold, fields, "alone"):
        assert told.startswith("MoE: load_balancing_over: 'global' expected loss_group, or ep_group, with 4 ranks")


def test_fsdp2_loads_a_layer_from_meta(ranks):
    torch.manual_seed(0)
    fields = {**BIASED, "load_balancing_coefficient": 0.3, "aux_loss": "attached"}
    model, x = jobs.Net(fields), torch.randn(5, H)
    model(x).square().sum().backward()
    for gradients, scale, load in ranks.run(jobs.loaded_under_fsdp, fields, model.state_dict(), x):
        assert scale == 1
        assert torch.equal(load, model.moe.router.load_since_update)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad)


def test_fsdp2_around_a_checkpointed_layer_with_the_explicit_loss(ranks):
    fields = {**BASE, "load_balancing_coefficient": 0.3, "router_z_loss_coefficient": 0.1}
    torch.manual_seed(0)
    model, x = jobs.Net(fields), torch.randn(5, H)
    (model(x).square().sum() + dmoe.aux_loss(model)).backward()
    for gradients in ranks.run(jobs.checkpointed_under_fsdp, fields, x):
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad)


@pytest.mark.parametrize("fields", [BASE, {**BASE, "num_experts": 8}], ids=["1", "2"])
def test_an_adapter_around_experts_on_ranks(ranks, fields):
    torch.manual_seed(2)
    results = ranks.run(jobs.adapted, fields, True, torch.randn(40, H))
    for ((y, grad), (adapted, adapted_grad)), norm, own in results:
        assert torch.equal(adapted, y)
        torch.testing.assert_close(adapted_grad, grad)
        assert own.abs().max() > 0
        torch.testing.assert_close(norm, results[0][1])
    assert not torch.equal(results[0][2], results[1][2])  # nobody averaged them


def test_an_adapter_whose_parameters_ddp_would_average_is_refused(ranks):
    with pytest.raises(RankError) as caught:
        ranks.run(jobs.adapted, BASE, False, torch.randn(5, H))
    assert set(caught.value.by_rank) == {0, 1, 2, 3}
    for kind, text in caught.value.by_rank.values():
        assert kind == "ValueError"
        assert "got ['own'] without: mark them with expert = True and allreduce = False" in text


WAYS = [
    ("dmoe", {}, True),
    ("dmoe", {}, False),
    ("dmoe", {"dtensor": False}, True),
    ("dmoe", {"dtensor": False}, False),
    ("torch", {"dtensor": False}, True),
]


@pytest.mark.parametrize(("kind", "options", "wrapped"), WAYS, ids=str)
def test_an_overflow_on_one_rank_is_one_on_all(ranks, kind, options, wrapped):
    """The second step is skipped everywhere, the scale halves everywhere, the third is taken everywhere."""
    results = ranks.run(jobs.scaled_steps, BASE, options, kind, wrapped, 2)
    for steps in results:
        assert [scale for *_, scale in steps] == [64, 32, 32]
        (first, own, _), (skipped, own_skipped, _), (third, own_third, _) = steps
        assert torch.equal(skipped, first)
        assert torch.equal(own_skipped, own)
        assert not torch.equal(third, first)
        assert not torch.equal(own_third, own)
        for (router, *_), (other, *_) in zip(steps, results[0], strict=True):
            assert torch.equal(router, other)


PLAIN = [
    ({}, {"dtensor": False}, False),
    ({}, {"dtensor": False}, True),
    ({"num_experts": 8, "overlap_degree": 2, "expert_grad_scale": "sum"}, {"dtensor": False}, False),
    ({"ffn_hidden_size": [8, 4, 12, 8], "bias": "expert"}, {}, False),
]


@pytest.mark.parametrize(("fields", "options", "compiled"), PLAIN, ids=str)
def test_torchs_scaler_is_told_of_an_overflow_of_plain_experts(ranks, fields, options, compiled):
    """The first step is skipped and the scale cut on all ranks, not only where the expert is; the second is taken."""
    victim = 2
    results = ranks.run(jobs.half_steps, {**BASE, "top_k": 1, **fields}, options, victim, compiled)
    for rank, ((finite, skipped, scale), (finite_then, taken, scale_then)) in enumerate(results):
        assert finite == [True, False], rank
        assert finite_then == [True, True], rank
        assert scale == scale_then == 2**10
        assert torch.equal(skipped, torch.zeros_like(skipped))
        assert not torch.equal(taken, skipped)
        assert torch.equal(taken, results[0][1][1])


def test_torchs_scaler_takes_no_dtensor_beside_plain_parameters(ranks):
    """What README says about it: it refuses by itself, so that nothing drifts."""
    with pytest.raises(RankError) as caught:
        ranks.run(jobs.scaled_steps, BASE, {}, "torch", True, 2)
    for _, text in caught.value.by_rank.values():
        assert "got mixed torch.Tensor and DTensor" in text
