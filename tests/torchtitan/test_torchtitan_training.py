"""torchtitan's own Trainer with dmoe's experts, on 1, 2 and 4 ranks, equals one plain process on the same batches."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.xdist_group("torchtitan")
STEPS = 6
# Job -> the part of its answer, and the model.
RUNS = {
    "one_rank": ["qwen3", "deepseek_v3"],
    "ep": ["qwen3", "deepseek_v3"],
    "fsdp": ["qwen3"],
    "tp": ["qwen3"],
    "tp_ep": ["deepseek_v3"],
    "full_ac": ["qwen3"],
    "selective_ac": ["deepseek_v3"],
    "their_exchange": ["qwen3"],
    "compiled": ["qwen3"],
    "ep_fsdp": ["qwen3"],
    "hsdp": ["qwen3"],
}


def check(run, plain, *, first=1, losses=True):
    """Losses, norms before clipping, parameters and expert biases, from a step on."""
    assert run["steps"] == list(range(first, STEPS + 1))
    if losses:
        assert run["losses"] == pytest.approx(plain["losses"][first - 1 :], abs=1e-5)
    assert run["norms"] == pytest.approx(plain["norms"][first - 1 :], abs=1e-5)
    assert run["state"].keys() == plain["state"].keys()
    for name, expected in plain["state"].items():
        torch.testing.assert_close(
            run["state"][name], expected, rtol=0, atol=1e-5, msg=lambda text, name=name: name + text
        )


@pytest.mark.parametrize(("job", "model"), [(job, model) for job, models in RUNS.items() for model in models])
def test_losses_norms_and_parameters_equal_one_process(titan, job, model):
    run = titan[job] if len(RUNS[job]) == 1 else titan[job][model]
    check(run, titan["plain"][model])


def test_the_full_dtensor_backend(titan):
    check(titan["full_dtensor"], titan["plain"]["qwen3"], losses=False)  # torchtitan logs their sum over ranks there


@pytest.mark.parametrize("job", ["resumed_on_four", "resumed_on_one"])
def test_a_checkpoint_of_two_ranks_resumes_on_another_number(titan, job):
    check(titan[job], titan["plain"]["qwen3"], first=4)


def test_the_plain_run_could_fail(titan):
    """Gradients are clipped, biases move, every parameter is trained."""
    seeds, plain = titan["seeds"], titan["plain"]
    for model, run in plain.items():
        assert min(run["norms"]) > 0.55
        for name, value in run["state"].items():
            assert (value - seeds[model][name]).abs().max() > 3e-4, name


def test_tokens_that_travel_as_fp8_train_nearly_alike(titan):
    run, plain = titan["wire"], titan["plain"]["qwen3"]
    assert run["losses"] == pytest.approx(plain["losses"], abs=2e-3)
    assert run["losses"] != pytest.approx(plain["losses"], abs=1e-5)


def test_checkpoints_are_interchangeable_with_torchtitans_own_layer_and_hugging_faces_files(titan):
    read, after = titan["exchanged"], titan["ep"]["qwen3"]["state"]
    seed = titan["seeds"]["qwen3"]
    assert read["theirs_reads"].keys() == read["from_hugging_face"].keys() == after.keys()
    for name, value in after.items():
        assert not torch.equal(read["theirs_reads"][name], seed[name])  # of the third step
        if "expert_bias" in name:  # which Qwen3's files have no name for
            continue
        assert torch.equal(read["from_hugging_face"][name], value), name


def test_the_example_runs_by_the_launcher(titan):
    steps, losses = zip(*titan["example"], strict=True)
    assert steps == (1, 2)
    assert all(6 < loss < 9 for loss in losses)  # log 2048 is 7.6


def test_the_page_runs(titan):
    assert "layers.0.moe.experts.gate_up_proj" in titan["page"]
