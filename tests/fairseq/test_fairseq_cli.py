"""The commands a user types: the branch's own, on a dummy task and on real text, and what is refused."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import fairseq_jobs as jobs
import pytest
from fairseq_pool import in_fairseq, needs_fairseq
from helpers import written_to_stderr

ROOT = Path(__file__).resolve().parents[2]
STATISTICS = {
    *(name.format(k) for k in (1, 2) for name in ("overflow_expert{}", "unused_expert{}_count")),
    *(name.format(k) for k in (1, 2) for name in ("expert{}_balance_top", "expert{}_balance_bottom")),
    "entropy_gating",
    "all_to_all_cpu_time_ms",
    "all_to_all_cuda_time_ms",
}


@needs_fairseq
def test_the_command_of_fairseqs_page_with_small_sizes():
    done = in_fairseq(jobs.run_cli, "train", *jobs.small(max_update=60, no_save=True, dict_size=100))
    assert done.status == 0, done.err
    lines = jobs.stats_of(done, "train_inner")
    assert [line["num_updates"] for line in lines] == list(range(10, 70, 10))
    for line in lines:
        assert STATISTICS | {"loss", "moe_gate_loss", "inner_loss", "ppl", "wps", "ups", "gnorm"} <= set(line)
        # Bits, nats; each is rounded to three digits on its own.
        assert line["loss"] == pytest.approx(line["inner_loss"] + 0.01 * line["moe_gate_loss"] / 0.693147, abs=2e-3)
        assert 2 <= line["moe_gate_loss"] <= 2 * 8  # the sum of two layers', each from 1 to the number of experts
        assert 0 < line["overflow_expert1"] < 90
        assert 0 < line["entropy_gating"] < 2.0795  # ln 8
        assert 100 / 4 <= line["expert1_balance_top"] <= 100  # two of eight experts
        assert line["all_to_all_cpu_time_ms"] == 0
    assert lines[-1]["inner_loss"] < lines[0]["inner_loss"] - 0.05
    said = " ".join(line for _, line in done.log)
    for flag in ("--num-workers-valid", "--fp16-adam-stats", "--ddp-backend fully_sharded"):
        assert flag + ":" in said


@needs_fairseq
def test_real_text_from_preprocess_to_eval_lm(tmp_path):
    prepared, runs, (*evaluations, refused) = in_fairseq(jobs.real_text, str(tmp_path))
    for done in (prepared, *runs, *evaluations):
        assert done.status == 0, done.err
    _, resumed, straight = runs
    assert any("Loaded checkpoint" in line and "@ 30 updates" in line for _, line in resumed.log)
    held_out = [jobs.stats_of(done, "valid") for done in runs]
    losses = [[line["valid_inner_loss"] for line in lines] for lines in held_out]
    assert losses[1][-1] < losses[0][0] - 0.1
    assert losses[1][-1] < 9.6  # bits of a uniform guess among the dictionary's words
    # Stopped and resumed is straight through: same parameters, moments and batches.
    of_updates = {line["num_updates"]: line["loss"] for line in jobs.stats_of(straight, "train_inner")}
    for line in jobs.stats_of(resumed, "train_inner"):
        assert line["loss"] == pytest.approx(of_updates[line["num_updates"]], abs=1e-3)
    assert losses[1][-1] == pytest.approx(losses[2][-1], abs=1e-3)

    told = [re.search(r"Loss \(base 2\): ([\d.]+)", line) for done in evaluations for _, line in done.log]
    with_flag, without, tight = (float(found[1]) for found in told if found)
    assert with_flag == without == pytest.approx(losses[1][-1], abs=6e-4)
    assert abs(tight - with_flag) > 1e-3  # a capacity, in place of the training's none
    assert refused.status == 1
    assert refused.err.endswith("--moe-dropless: expected no --moe-eval-capacity-token-fraction beside it, got 0.02")


@needs_fairseq
@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"distributed_world_size": 8},
            "non-expert 908,423,168, expert 402,776,064 per rank on 8 ranks: 4,130,631,680 in all",
        ),
        (
            {
                "decoder_layers": 32,
                "decoder_embed_dim": 4096,
                "decoder_ffn_embed_dim": 16384,
                "moe_expert_count": 64,
                "tokens_per_sample": 1024,
                "batch_size": 12,
                "distributed_port": 12345,
                "distributed_world_size": 64,
            },
            "non-expert 4,505,346,048, expert 2,147,811,328 per rank on 64 ranks: 141,965,271,040 in all",
        ),
    ],
    ids=["4.1B", "142B"],
)
def test_parameters_of_the_two_commands(changes, line):
    done = in_fairseq(jobs.run_cli, "count", *jobs.command(**changes))
    assert (done.status, done.out.strip()) == (0, line), done.err


@needs_fairseq
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"moe_second_expert_policy": "best"},
            "--moe-second-expert-policy: expected all, sampling or random, got 'best'",
        ),
        (
            {"moe_normalize_expert_grad": "none"},
            "--moe-normalize-expert-grad: expected world_size or sqrt_world_size, got 'none'",
        ),
        ({"moe_expert_count": 1}, "--moe-expert-count: expected at least 2 experts in a MoE model, got 1"),
        (
            {"moe_eval_capacity_token_fraction": 1.5},
            "--moe-eval-capacity-token-fraction: expected a share of at most 1",
        ),
        ({"moe_freq": -1}, "--moe-freq: expected at least 0, got -1"),
        ({"activation_fn": "tanh"}, "--activation-fn: expected one of relu, gelu, gelu_accurate, gelu_fast, swish"),
        ({"scale_fc": True}, "--scale-fc: expected none in a model with MoE layers"),
        ({"quant_noise_pq": 0.1}, "--quant-noise-pq: expected 0 in a model with MoE layers"),
        ({"moe_gate_loss_combine_method": "max"}, "--moe-gate-loss-combine-method: expected average or sum, got 'max'"),
        ({"moe_gate_loss_transform": "log"}, "--moe-gate-loss-transform: expected none or neg_log, got 'log'"),
        (
            {"distributed_world_size": 2, "ddp_backend": "legacy_ddp", "dummy_a2a": True},
            "--dummy-a2a: expected one rank",
        ),
        (
            {"distributed_world_size": 2, "ddp_backend": "legacy_ddp"},
            "--distributed-world-size: expected 1, got 2 with --cpu",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_flags_are_told_in_one_sentence(changes, told):
    status, (last,), _, _ = in_fairseq(jobs.tool_and_flags, "train", *jobs.small(**changes))
    assert status != 0
    assert last.startswith(f"fairseq_moe: {told}"), last


@needs_fairseq
def test_user_dir_alone_registers_the_models():
    names = in_fairseq(jobs.user_dir, str(ROOT / "integrations" / "fairseq_moe"))
    assert names == ["MoETransformerLanguageModel", "MoETransformerModel"]


@needs_fairseq
def test_the_launcher_in_a_process_of_its_own():
    run = [sys.executable, "-m", "dmoe.integrations.fairseq_moe"]
    done = subprocess.run([*run, "tain"], capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == (
        "fairseq_moe: expected one of train, eval_lm, preprocess, generate, interactive, validate, count, and its "
        "flags; got tain"
    )
    on_two = {**os.environ, "WORLD_SIZE": "2", "RANK": "0"}
    done = subprocess.run([*run, "validate"], capture_output=True, text=True, check=False, env=on_two)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == (
        "fairseq_moe: validate: expected one process, got 2; train and eval_lm run on several"
    )


@pytest.mark.parametrize("found", [None, "0.13.0"])
def test_another_fairseq_or_none_is_told(monkeypatch, found):
    def version(name):
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    from dmoe.integrations.fairseq_moe import compat

    monkeypatch.setattr(metadata, "version", version)
    with pytest.raises(ImportError, match=r"fairseq, version 0\.12\.2, but .*`make fairseq`") as error:
        compat.check_installed()
    assert ("not installed" if found is None else "found 0.13.0") in str(error.value)


@needs_fairseq
def test_importing_the_integration_patches_nothing():
    import dmoe.integrations.fairseq_moe  # noqa: F401

    assert "fairseq" not in sys.modules
    assert dataclasses.dataclass.__module__ == "dataclasses"
    assert not hasattr(dataclasses.dataclass, "__wrapped__")


@needs_fairseq
def test_a_refusal_is_written_in_one_piece():
    """Ranks share a stream, and a line whose end comes apart may end after another rank's sentence."""
    pieces = written_to_stderr([sys.executable, "-m", "dmoe.integrations.fairseq_moe", "trian"])
    (told,) = [piece for piece in pieces if "fairseq_moe: " in piece]
    assert re.fullmatch("fairseq_moe: expected one of train, .*, and its flags; got trian\n", told)
