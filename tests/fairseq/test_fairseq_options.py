"""No option is accepted without effect: each acts, says why it need not, or is refused with a sentence."""

from __future__ import annotations

import re

import fairseq_jobs as jobs
import fairseq_options as options
import pytest
from fairseq_pool import in_fairseq, needs_fairseq

pytestmark = needs_fairseq

BRANCH, DROPLESS, DENSE = "branch.pt", "dropless/checkpoint_last.pt", "dense/checkpoint_last.pt"
TIGHT = ("--moe-eval-capacity-token-fraction", 0.02)


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A folder with text and three models, what their trainings said, and the files that they left."""
    folder = str(tmp_path_factory.mktemp("options"))
    done, files = in_fairseq(options.trained, folder)
    for run in done.values():
        assert run.status == 0, run.err
    return folder, done, files


def test_flags_of_the_branch_in_training(saved):
    _, done, files = saved
    assert files["dropless"] == ["checkpoint_last.pt"]
    assert files["capacity"] == ["checkpoint_best.pt", "checkpoint_last.pt"]
    said = [line for name, line in done["dropless"].log if "fairseq_moe" in name]
    for flag in ("--symlink-best-and-last-checkpoints", "--log-nvidia-smi", "--max-source-positions"):
        assert sum(line.startswith(flag + ": ") for line in said) == 1
    counted = [line for name, line in done["capacity"].log if name == "fairseq_cli.train" and line.startswith("num. ")]
    assert [re.sub(r"[\d,]+", "N", line) for line in counted] == [
        f"num. {kind} model params: N (num. trained: N)" for kind in ("non-expert", "expert")
    ]
    assert all(re.search(r": \d{1,3}(,\d{3})+ ", line) for line in counted)


def test_options_of_evaluation_reach_every_checkpoint(saved):
    """Whether its arguments have the option or not, and whether it comes as a flag or in a dictionary."""
    overrides = "--model-overrides", str(options.TIGHT)
    dropless = "--model-overrides", "{'moe_dropless': True}"
    cases = [(BRANCH,), (BRANCH, "--moe-dropless"), (BRANCH, *dropless), (BRANCH, *TIGHT), (BRANCH, *overrides)]
    cases += [(DROPLESS,), (DROPLESS, *TIGHT), (DROPLESS, *overrides)]
    plain, free, also_free, tight, also_tight, all_of_it, cut, also_cut = in_fairseq(options.losses, saved[0], cases)
    assert free == also_free
    assert tight == also_tight
    assert min(abs(plain - free), abs(plain - tight), abs(free - tight)) > 1e-3
    assert cut == also_cut
    assert abs(cut - all_of_it) > 1e-3
    others = [("validate", BRANCH, "--moe-dropless"), ("generate", BRANCH, "--moe-dropless", "--score-reference")]
    others += [("validate", DROPLESS, *TIGHT)]
    assert in_fairseq(options.losses_of, saved[0], others) == pytest.approx([free, free, cut], abs=6e-4)


def test_part_of_the_batches_and_figures_in_a_file(saved):
    """`--max-valid-steps N` takes N + 1 batches, in `eval_lm` as in training's validation."""
    folder, done, _ = saved
    valid = jobs.stats_of(done["dropless"], "valid")[-1]
    written, told = in_fairseq(options.figures, folder, "--nval", 1)
    ((subset, figures),) = written.items()
    assert subset == "valid"
    assert figures["loss"] == pytest.approx(told, abs=6e-5)
    assert figures["loss"] == pytest.approx(valid["valid_inner_loss"], abs=6e-4)
    assert figures["perplexity"] == pytest.approx(2 ** figures["loss"], rel=1e-5)
    assert 0 < figures["wall_time_model"] < figures["wall_time"]
    every = in_fairseq(options.figures, folder)[0]["valid"]["ntok_total"]
    assert every > 4 * 64
    assert figures["ntok_total"] == 3 * 64 + every % 64  # two batches of two, the shortest first


def test_options_without_effect_are_refused(saved):
    dense = "expected a checkpoint with experts, got a dense model's"
    cases = {
        ("eval_lm", DENSE, "--is-moe"): f"--is-moe: {dense}",
        ("eval_lm", DENSE, "--moe-dropless"): f"--moe-dropless: {dense}",
        ("validate", DENSE, *TIGHT): f"{TIGHT[0]}: {dense}",
        (
            "eval_lm",
            DROPLESS,
            "--model-overrides",
            "{'moe_eval_capacity_fraction': 0.1}",
        ): "--model-overrides: expected a flag of the model, such as 'moe_eval_capacity_token_fraction', got "
        "'moe_eval_capacity_fraction'",
        ("eval_lm", BRANCH, "--moe-dropless", "--model-overrides", str(options.TIGHT)): (
            f"--moe-dropless: expected no {TIGHT[0]} beside it, got 0.02"
        ),
        ("generate", DROPLESS, "--max-valid-steps", 2): (
            "--max-valid-steps: expected none where all batches are taken: train and eval_lm take a part"
        ),
        ("eval_lm", DROPLESS, "--nval", -1): "--max-valid-steps: expected at least 0, got -1",
    }
    told = in_fairseq(options.refusals, saved[0], list(cases))
    assert told == [(1, f"fairseq_moe: {sentence}") for sentence in cases.values()]


RANKS = {"distributed_world_size": 2, "distributed_init_method": "tcp://localhost:1"}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"moe_dropless": True, "moe_batch_prioritized_routing": True},
            "--moe-batch-prioritized-routing: expected none with --moe-dropless, under which every token comes through",
        ),
        (
            {"moe_dropless": True, "moe_eval_capacity_token_fraction": 0.5},
            "--moe-eval-capacity-token-fraction: expected none with --moe-dropless, or 0, got 0.5",
        ),
        ({"moe_random_second_expert_in_eval": True}, "--moe-random-second-expert-in-eval: expected two experts and"),
        ({"dropout": 1.0}, "--dropout (expert_dropout): expected 0 <= p < 1, got 1.0"),
        ({"use_stable_embedding": True}, "--use-stable-embedding: expected none: bitsandbytes' embedding is not in"),
        ({"block_wise": True}, "--block-wise: expected none: it cuts up the 8-bit moments of bitsandbytes' Adam"),
        (
            {"ddp_backend": "legacy_ddp", "ddp_comm_hook": "fp16", **RANKS},
            "--ddp-comm-hook: expected none with experts",
        ),
        (
            {"ddp_backend": "pytorch_ddp", "decoder_layerdrop": 0.5, **RANKS},
            "--decoder-layerdrop: expected --find-unused-parameters or --ddp-backend legacy_ddp beside it",
        ),
    ],
    ids=lambda value: "-".join(value)[:40] if isinstance(value, dict) else "",
)
def test_training_options_without_effect_are_refused(changes, told):
    status, (last,), _, _ = in_fairseq(jobs.tool_and_flags, "train", *jobs.small(**changes))
    assert status == 1
    assert last.startswith(f"fairseq_moe: {told}"), last


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"moe_top1_expert": True}, "--moe-second-expert-policy: expected nothing with --moe-top1-expert"),
        ({"moe_freq": 0}, "--moe-expert-count: expected --moe-freq beside it, without which no layer has experts"),
    ],
    ids=["one expert", "no layers"],
)
def test_what_the_branch_accepts_without_effect_is_told(changes, told):
    done = in_fairseq(jobs.run_cli, "train", *jobs.small(**changes, max_update=1, no_save=True))
    assert done.status == 0, done.err
    assert any(line.startswith(told) for _, line in done.log)
