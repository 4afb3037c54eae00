"""`eval_lm` on several ranks: no rank waits for another, figures are those of one rank; and its profile."""

from __future__ import annotations

import json

import pytest
import rank_jobs_fairseq as jobs
from fairseq_pool import needs_fairseq
from fairseq_ranks import alone, data, pool, train

pytestmark = needs_fairseq

EVAL = "--cpu --task language_modeling --tokens-per-sample 16 --sample-break-mode none --batch-size 4 --num-workers 0"


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """What two ranks wrote after 20 updates, by a capacity."""
    folder = tmp_path_factory.mktemp("trained")
    changes = {"moe_dropless": None, "moe_eval_capacity_token_fraction": 0.5, "lr": 0.01, "disable_validation": None}
    runs = train(2, save_dir=folder, no_epoch_checkpoints=True, **changes)
    assert "checkpoint_best-shared.pt" in runs[0]["files"]
    return folder


def evaluate(folder, ranks, name="checkpoint_last.pt", **changes):
    options = {"path": folder / name, "gen_subset": "valid", "is_moe": True, **changes}
    return pool().run(jobs.evaluate, [data(), *jobs.flags(EVAL, **options)], ranks=ranks)


@pytest.mark.parametrize("name", ["checkpoint_last.pt", "checkpoint_best.pt", "checkpoint_last-rank-0.pt"])
def test_ranks_add_up_to_one(saved, name):
    """151 blocks of 16 tokens in batches of 4, and in batches of 64: some ranks get fewer, or none at all."""
    ((one, calls),) = evaluate(saved, 1, name)
    assert 4 < one["perplexity"] < 200
    for ranks, batch_size in ((2, 4), (4, 4), (4, 64)):
        several = evaluate(saved, ranks, name, batch_size=batch_size, moe_dropless=True)
        ((whole, _),) = evaluate(saved, 1, name, batch_size=batch_size, moe_dropless=True)
        assert len({results["loss"] for results, _ in several}) == 1
        assert several[0][0]["loss"] == pytest.approx(whole["loss"], abs=1e-5)
        assert several[0][0]["perplexity"] == pytest.approx(whole["perplexity"], rel=1e-5)
        assert len({len(calls) for _, calls in several}) == 1


def test_a_rank_without_any_batch_takes_part(saved):
    calls = [calls for _, calls in evaluate(saved, 4, batch_size=64)]
    print(calls)
    assert (1, 1, 16) in {shape for each in calls for shape in each}
