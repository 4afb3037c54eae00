"""`eval_lm` on several ranks: no rank waits for another, figures are those of one rank; and its profile."""

from __future__ import annotations

import json

import pytest
import rank_jobs_fairseq as jobs
from fairseq_pool import needs_fairseq
from fairseq_ranks import data, pool, train

pytestmark = needs_fairseq

EVAL = "--cpu --task language_modeling --tokens-per-sample 16 --sample-break-mode none --batch-size 4 --num-workers 0"


BY_CAPACITY = {"moe_dropless": None, "moe_eval_capacity_token_fraction": 1.0, "moe_second_expert_policy": "all"}


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """What two ranks wrote after 20 updates, and their loss on held-out text in the end, in bits without the gate's."""
    folder = tmp_path_factory.mktemp("trained")
    changes = {"disable_validation": None, "best_checkpoint_metric": "inner_loss", "batch_size_valid": 4, "lr": 0.01}
    runs = train(2, save_dir=folder, no_epoch_checkpoints=True, **BY_CAPACITY, **changes)
    assert "checkpoint_best-shared.pt" in runs[0]["files"]
    assert runs[0]["valid"] == runs[1]["valid"]
    return folder, runs[0]["valid"][0]


def evaluate(folder, ranks, name="checkpoint_last.pt", **changes):
    """Each rank's results, and the shapes with which each called its one MoE layer."""
    options = {"path": folder / name, "gen_subset": "valid", "is_moe": True, **changes}
    return pool().run(jobs.evaluate, [data(), *jobs.flags(EVAL, **options)], ranks=ranks)


@pytest.mark.parametrize("name", ["checkpoint_last.pt", "checkpoint_best.pt", "checkpoint_last-rank-0.pt"])
def test_one_rank_reads_what_two_wrote(saved, name):
    """The loss is that of the validation in training."""
    folder, loss = saved
    ((one, _),) = evaluate(folder, 1, name)
    assert one["loss"] == pytest.approx(loss, abs=1e-3)
    assert one["perplexity"] == pytest.approx(2 ** one["loss"], rel=1e-5)


def test_the_capacity_of_evaluation(saved):
    """By one fraction, another one, or the checkpoint's, on two ranks as on one."""
    folder, _ = saved
    seen = []
    for changes in ({"moe_eval_capacity_token_fraction": 0.2}, {"moe_eval_capacity_token_fraction": 0.05}, {}):
        (one, _), *_ = evaluate(folder, 1, **changes)
        two = evaluate(folder, 2, **changes)
        assert [results["loss"] for results, _ in two] == pytest.approx([one["loss"]] * 2, abs=5e-6)
        seen.append(one["loss"])
    assert min(abs(a - b) for n, a in enumerate(seen) for b in seen[:n]) > 2e-5


@pytest.mark.parametrize(("ranks", "batch_size"), [(2, 4), (2, 64), (4, 64)])
def test_ranks_with_fewer_batches_or_none_take_part(saved, ranks, batch_size):
    """Nobody waits for ever, and figures are of all tokens, each once."""
    folder, _ = saved
    changes = {"batch_size": batch_size, "moe_dropless": True}
    ((one, calls),) = evaluate(folder, 1, **changes)
    several = evaluate(folder, ranks, **changes)
    for results, _ in several:
        assert results["loss"] == pytest.approx(one["loss"], abs=5e-6)
        assert results["perplexity"] == pytest.approx(one["perplexity"], rel=1e-6)
    assert len(calls) % ranks  # in the last round somebody had none
    assert {len(calls_there) for _, calls_there in several} == {-(-len(calls) // ranks)}
    if ranks == 4:
        assert several[-1][1] == [(1, 1, 16)]


def test_windows_of_context_on_ranks(saved):
    """A rank's context is what it saw before, so figures are those of these ranks; nobody waits or fails."""
    results = [results for results, _ in evaluate(saved[0], 2, batch_size=64, context_window=4)]
    assert results[0] == results[1]
    assert 4 < results[0]["perplexity"] < 200


def test_tokens_joined_to_words_are_counted_as_fairseq_does(saved):
    """`--post-process "@@ "` and a first token that is left out change what the sum is divided by."""
    folder, _ = saved
    for options in ({"post_process": "@@ "}, {"add_bos_token": True}):
        ((one, _),) = evaluate(folder, 1, moe_dropless=True, **options)
        for results, _ in evaluate(folder, 2, moe_dropless=True, **options):
            assert results["loss"] == pytest.approx(one["loss"], abs=5e-6)


def test_part_of_the_batches_of_each_rank(saved, tmp_path):
    """`--max-valid-steps 1` is two batches of every rank; the first rank writes the figures of all."""
    done = evaluate(saved[0], 2, max_valid_steps=1, stats_path=tmp_path / "figures")
    assert [len(calls) for _, calls in done] == [2, 2]
    assert done[0][0] == done[1][0]
    figures = json.loads((tmp_path / "figures.json").read_text())["valid"]
    assert {name: figures[name] for name in done[0][0]} == done[0][0]
    assert 3 * 4 * 16 < figures["ntok_total"] <= 4 * 4 * 16


PARTS = ("gate", "dispatch", "experts", "combine")
WAITS = {"aten::item", "aten::_local_scalar_dense", "aten::nonzero"}


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_profile_has_labels_and_few_waits(saved, tmp_path, ranks):
    """Every layer and part by name, on each rank; at most one wait of the host in a forward of a MoE layer."""
    folder, _ = saved
    done = evaluate(folder, ranks, profile=True, results_path=tmp_path, **{"moe_dropless": True} if ranks == 2 else {})
    for rank, (_, calls) in enumerate(done):
        events = json.loads((tmp_path / f"profile-rank-{rank}.json").read_text())["traceEvents"]
        labels = [event for event in events if event.get("cat") == "user_annotation"]
        layers = [event for event in labels if event["name"] == "decoder.layers.1.moe_layer"]
        assert len(layers) == len(calls) > 10
        parts = {name: [e for e in labels if e["name"] == f"decoder.layers.1.moe_layer/{name}"] for name in PARTS}
        assert {name: len(found) for name, found in parts.items()} == {
            name: len(calls) * (2 if name == "dispatch" else 1) for name in PARTS
        }
        assert sum(event["name"] == "decoder.layers.0.self_attn" for event in labels) == len(calls)
        operations = [event for event in events if event.get("cat") == "cpu_op"]
        assert sum(op["name"] == "dmoe::router_logits" for op in operations) >= len(calls)  # operations are recorded
        waits = [op for op in operations if op["name"] in WAITS]
        for layer in sorted(layers, key=lambda event: event["ts"])[1:]:  # the first asks whether all ranks agree
            start, end = layer["ts"], layer["ts"] + layer["dur"]
            assert sum(start <= op["ts"] < end and op["name"] != "aten::item" for op in waits) <= 1
