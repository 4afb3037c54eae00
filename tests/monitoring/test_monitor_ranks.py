"""The monitor on ranks: one all-reduce for a record, whose numbers are those of reduce_metrics and of all tokens."""

from __future__ import annotations

import json

import pytest
import rank_jobs_monitoring as jobs
import torch
from monitoring_cases import VOCABULARY, compare


def batches_for(tokens_by_rank, steps, micro=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        [[torch.randint(VOCABULARY, (n,), generator=generator) for _ in range(micro)] for n in tokens_by_rank]
        for _ in range(steps)
    ]


def looked_at(results, every=1, expert_parallel=True):
    """Every step of every rank: records alike, equal to the loops of all ranks, after one all-reduce."""
    for step, by_rank in enumerate(zip(*results, strict=True)):
        first = by_rank[0][0]
        calls = [each[3] for each in by_rank]
        if step % every:
            assert first is None
            assert calls == [0] * len(by_rank)
            continue
        assert calls == [1] * len(by_rank)
        for record, _, reduced, _, _ in by_rank:
            assert record.layers == first.layers
            assert record.tokens == first.tokens
            for name, metrics in (reduced or {}).items():
                layer = record.layers[name]
                assert layer.tokens_per_expert == tuple(metrics.tokens_per_expert.tolist())
                assert layer.kept_per_expert == tuple(metrics.kept_per_expert.tolist())
                assert layer.load == tuple(metrics.load.tolist())
                assert layer.entropy == float(metrics.entropy)
                assert layer.dropped_share == float(metrics.dropped_share)
                assert layer.dead_experts == int(metrics.dead_experts)
                assert layer.bytes_sent == (None if metrics.bytes_sent is None else int(metrics.bytes_sent))
        for name, layer in first.layers.items():
            compare(layer, [each[1][name.removeprefix("module.")] for each in by_rank])
            assert (layer.bytes_sent is not None) == expert_parallel
            assert set(layer.seconds) == {"router", "dispatch", "experts", "combine"}
        if expert_parallel and by_rank[0][2]:
            assert sum(layer.bytes_sent for layer in first.layers.values()) == sum(each[4] for each in by_rank) > 0


@pytest.mark.parametrize("tokens", [(9, 4), (7, 0)])
@pytest.mark.parametrize(("micro", "checkpointed"), [(1, None), (1, False), (3, None), (2, False)])
def test_expert_parallel_ranks(ranks, tokens, micro, checkpointed):
    results = ranks.run(jobs.steps, batches_for(tokens, 3, micro), True, 1, checkpointed, ranks=2)
    looked_at(results)
    assert results[0][0][0].tokens == sum(tokens) * micro


@pytest.mark.parametrize("wrap", [None, jobs.ddp, jobs.fsdp], ids=["bare", "DDP", "FSDP2"])
def test_replicas(ranks, wrap):
    looked_at(ranks.run(jobs.steps, batches_for((9, 4), 3), False, 1, None, wrap, ranks=2), expert_parallel=False)


def test_a_rank_that_runs_no_forward(ranks):
    """Layers that ran on some rank are in everybody's record."""
    batches = batches_for((5, 6), 2)
    looked_at(ranks.run(jobs.steps, batches, False, 1, None, None, (1,), ranks=2), expert_parallel=False)
    (record, *_), *_ = ranks.run(jobs.steps, batches, False, 1, None, None, (0, 1), ranks=2)[0]
    assert record.layers == {}


def test_steps_between_records_talk_to_nobody(ranks):
    looked_at(ranks.run(jobs.steps, batches_for((5, 6), 7), True, 3, ranks=2), every=3)
    assert ranks.run(jobs.unrecorded, batches_for((6,), 1)[0][0][0], ranks=2) == [0, 0]


@pytest.mark.parametrize("named", [False, True])
def test_rank_0_writes_and_warns(ranks, tmp_path, named):
    results = ranks.run(jobs.folders, batches_for((30, 30), 4), str(tmp_path), named, ranks=2)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["run"] + ["step"] * 4
    assert lines[0]["ranks"] == 2
    assert [line["step"] for line in lines[1:]] == [0, 1, 2, 3]
    assert results[0][1] == results[1][1] != []
    assert len(results[0][2]) == len(results[0][1])
    assert not results[1][2]
    assert results[0][0] == results[1][0]
    if not named:
        assert results[0][0] is None
        return
    table = results[0][0]
    assert json.loads((tmp_path / "tokens.json").read_text())["ids"] == list(table.ids)
    ids = [token for step in batches_for((30, 30), 4)[1:] for share in step for token in share[0].tolist()]
    for rows in table.layers.values():
        counted = [sum(column) for column in zip(*rows, strict=True)]
        assert counted == [2 * ids.count(token) for token in table.ids]  # each takes two experts
