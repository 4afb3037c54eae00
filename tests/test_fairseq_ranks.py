"""Experts spread over two ranks, under fairseq's own data parallelism: the same training as one process."""

from __future__ import annotations

import math
import os
import re

import fairseq_jobs as jobs
import pytest
import torch
from fairseq_pool import in_fairseq, needs_fairseq
from rank_pool import RankPool

pytestmark = needs_fairseq


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("text"))
    assert in_fairseq(jobs.prepare_text, folder).status == 0
    return folder


@pytest.fixture(scope="module")
def one(text):
    """One process, two micro-batches per update."""
    done = in_fairseq(jobs.train_text, text, "one", 2)
    assert done.status == 0, done.err
    return done, load(f"{text}/one/checkpoint_last.pt")


@pytest.fixture(scope="module")
def pair():
    pool = RankPool(2)
    yield pool
    pool.close()


def load(path):
    state = torch.load(path, map_location="cpu", weights_only=False)["model"]
    return {name: value for name, value in state.items() if not name.endswith("_float_tensor")}  # which nobody fills


def whole(folder):
    """The model of two ranks' files: expert i of rank r is expert r * local + i."""
    files = [load(os.path.join(folder, f"checkpoint_last-rank-{rank}.pt")) for rank in range(2)]
    merged = {}
    for rank, state in enumerate(files):
        local = 1 + max(int(number) for name in state for number in re.findall(r"experts\.(\d+)\.", name))
        for name, value in state.items():
            before, of_expert, rest = name.partition(".experts.")
            if of_expert:
                number, _, part = rest.partition(".")
                name = f"{before}.experts.{rank * local + int(number)}.{part}"
            merged[name] = value
    return merged, files


@pytest.mark.parametrize("backend", ["legacy_ddp", "pytorch_ddp"])
def test_two_ranks_equal_one_with_twice_the_micro_batches(text, one, pair, backend):
    changes = {"ddp_backend": backend, "record_a2a_perf_stats": True}
    ranks = pair.run(jobs.train_text_on_ranks, text, backend, changes, limit=300)
    assert [done.status for done in ranks] == [0, 0], ranks[0].err
    done, reference = one
    there, here = jobs.stats_of(ranks[0], "train_inner"), jobs.stats_of(done, "train_inner")
    assert len(there) == len(here) == 20
    for line, expected in zip(there, here, strict=True):
        for name in ("loss", "moe_gate_loss", "entropy_gating", "expert1_balance_top", "gnorm"):
            assert line[name] == pytest.approx(expected[name], abs=2e-3 if name != "expert1_balance_top" else 0.3), name
        assert line["all_to_all_cpu_time_ms"] > 0
        assert expected["all_to_all_cpu_time_ms"] == 0
    assert min(line["gnorm"] for line in here) > 0.5  # clipping was at work
    merged, files = whole(f"{text}/{backend}")
    assert set(merged) == set(reference)
    for name, value in reference.items():
        bound = 1e-6 if ".experts." in name else 1e-4
        torch.testing.assert_close(merged[name], value, rtol=0, atol=bound, msg=lambda m, n=name: f"{n}: {m}")
        if ".experts." not in name:
            assert torch.equal(files[0][name], files[1][name]), name
    at_start = in_fairseq(jobs.train_text, text, "none", 2, {"max_update": 1})
    assert at_start.status == 0
    moved = load(f"{text}/none/checkpoint_last.pt")
    assert max((moved[name] - value).abs().max() for name, value in reference.items() if ".experts." in name) > 1e-3


def test_two_ranks_evaluate_together_and_resume(text, pair):
    """Validation shards of unequal length, and a second run that goes on from the ranks' files."""
    changes = {"ddp_backend": "legacy_ddp", "checkpoint_activations": True}
    runs = [
        pair.run(jobs.train_text_on_ranks, text, "resumed", {**changes, "max_update": updates}, limit=300)
        for updates in (4, 8)
    ]
    for done in (each for run in runs for each in run):
        assert done.status == 0, done.err
    resumed, _ = runs[1]
    assert any("@ 4 updates" in line for _, line in resumed.log)
    lines = jobs.stats_of(resumed, "train_inner")
    assert [line["num_updates"] for line in lines] == [5, 6, 7, 8]
    straight = in_fairseq(jobs.train_text, text, "straight", 2, {"max_update": 8})
    for line, expected in zip(lines, jobs.stats_of(straight, "train_inner")[4:], strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], abs=2e-3)
    held_out = [jobs.stats_of(each, "valid")[-1]["valid_inner_loss"] for each in (resumed, straight)]
    assert held_out[0] == pytest.approx(held_out[1], abs=2e-3)


def test_experts_that_ranks_cannot_share_are_told(text, pair):
    changes = {"ddp_backend": "legacy_ddp", "moe_expert_count": 3, "save_dir": f"{text}/odd"}
    ranks = pair.run(jobs.train_text_on_ranks, text, "odd", changes, limit=300)
    assert [done.status for done in ranks] == [1, 1]
    for done in ranks:
        assert done.err.strip().splitlines()[-1] == (
            "fairseq_moe: --moe-expert-count: expected a multiple of the 2 ranks, got 3; every rank holds as many "
            "experts"
        )


def test_the_root_of_the_ranks(text, one, pair):
    """sqrt_world_size: experts' gradients are sqrt(2) larger, the others the same; seen in the first step's norm."""
    changes = {"ddp_backend": "legacy_ddp", "max_update": 1, "clip_norm": 0.0, "no_save": True}
    by_world, by_root = (
        jobs.stats_of(
            pair.run(jobs.train_text_on_ranks, text, "root", {**changes, "moe_normalize_expert_grad": how}, limit=300)[
                0
            ],
            "train_inner",
        )[0]["gnorm"]
        for how in ("world_size", "sqrt_world_size")
    )
    norms = in_fairseq(jobs.first_gradient_norms, text, 2)
    assert by_world == pytest.approx(math.hypot(*norms), abs=2e-3)
    assert by_root == pytest.approx(math.hypot(norms[0], math.sqrt(2) * norms[1]), abs=2e-3)
    assert by_root > by_world + 2e-3
