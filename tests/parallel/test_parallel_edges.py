"""What users do to layers on ranks: move, compile, freeze and load them."""

from __future__ import annotations

import pytest
import rank_jobs_edges as jobs
import torch
from parallel_layer_cases import BASE
from rank_pool import RankError

from dmoe import MoE

H = BASE["hidden_size"]


@pytest.mark.parametrize("dtensor", [True, False])
def test_marks_survive_moving(ranks, dtensor):
    results = ranks.run(jobs.moved, BASE, dtensor)
    for told in results:
        for position, (marks, counts, norm) in enumerate(told):
            assert marks == {(True, False)}
            assert counts == [1, 2]
            torch.testing.assert_close(norm, results[0][position][2])  # which adds up over ranks only by the marks


def test_plain_experts_are_saved_whole(ranks):
    assert ranks.run(jobs.filed, BASE, ranks=2) == [True, True]


@pytest.mark.parametrize(
    "options", [{}, {"overlap_degree": 2}, {"wire_dtype": "fp8"}, {"shared_ffn_hidden_size": 3}], ids=str
)
def test_compiling_changes_nothing(ranks, options):
    for differences in ranks.run(jobs.compiled, {**BASE, "num_experts": 4, **options}, ranks=2):
        assert max(differences) == 0


def test_selection_biases_follow_the_load_of_all_replicas(ranks):
    torch.manual_seed(1)
    fields = {**BASE, "num_experts": 8, "selection_bias": True, "selection_bias_update_rate": 0.1}
    tokens = [[torch.randn(n, H), torch.randn(2 * n + 1, H)] for n in (3, 1, 9, 6)]
    results = ranks.run(jobs.biases, fields, tokens)
    total = sum(load for load, _, _ in results).double()
    for load, counted, bias in results:
        assert torch.equal(counted.long(), load)
        assert torch.equal(bias, results[0][2])
        assert torch.equal(bias.sign().double(), (total.mean() - total).sign())


def test_experts_frozen_on_every_rank_or_on_one(ranks):
    assert ranks.run(jobs.frozen, BASE, "everywhere") == [True] * 4
    with pytest.raises(RankError) as caught:
        ranks.run(jobs.frozen, BASE, "on one")
    for kind, text in caught.value.by_rank.values():
        assert kind == "ValueError"
        assert "frozen parameters: [] on ranks 0, 2, 3, ['experts.gate_up_proj', 'experts.down_proj'] on rank 1" in text


def test_a_norm_waits_for_nobody_who_has_no_gradients(ranks):
    norms = ranks.run(jobs.norms_without_gradients, BASE)
    assert len({float(norm) for norm in norms}) == 1


@pytest.mark.parametrize("dtensor", [True, False])
@pytest.mark.parametrize("experts", [4, 2])
@pytest.mark.parametrize("bias", ["none", "expert"])
def test_the_values_of_one_process_load_on_ranks(ranks, dtensor, experts, bias):
    torch.manual_seed(9)
    fields = {**BASE, "num_experts": experts, "bias": bias}
    whole, x = MoE(**fields), torch.randn(5, H)
    for y in ranks.run(jobs.loaded, fields, dtensor, whole.state_dict(), x):
        torch.testing.assert_close(y, whole(x).detach())


def test_a_loss_group_missing_on_one_rank_is_told_on_all(ranks):
    with pytest.raises(RankError) as caught:
        ranks.run(jobs.without_loss_group, BASE, 2)
    assert set(caught.value.by_rank) == {0, 1, 2, 3}
    for kind, text in caught.value.by_rank.values():
        assert kind == "ValueError"
        assert "ranks of loss_group: 2 on ranks 0, 1, 3, 4 on rank 2" in text


def test_chunks_of_experts_that_fsdp_shards_are_refused(ranks):
    with pytest.raises(RankError) as caught:
        ranks.run(jobs.chunks_under_fsdp, BASE)
    for kind, text in caught.value.by_rank.values():
        assert kind == "ValueError"
        assert "overlap_degree: expected 1 for experts that FSDP shards, got 2" in text
