"""Fine-tuning recipes for models of Transformers: what they train, what they write, what they draw."""

from __future__ import annotations

import sys

import pytest
import rank_jobs_finetune as jobs
import torch
from lm_cases import EXAMPLES
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(EXAMPLES / "transformers"))

import finetune_peft
import recipe

TINY = {"hidden_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 2, "head_dim": 8}
SHORT = ["--steps", "6", "--base-steps", "4", "--batch", "4", "--seq-len", "32", "--lr", "0.02"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The small model that recipes begin with, smaller."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "SMALL", recipe.SMALL | TINY)
        return recipe.base_model(tmp_path_factory.mktemp("out") / "base", 4, 32, 4)


def is_picture(path):
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def out(base, tmp_path):
    (tmp_path / "base").symlink_to(base)
    return tmp_path


def test_lora_is_trained_on_experts_that_dmoe_computes(base, out, text, capsys, monkeypatch):
    implementations = []
    draw = finetune_peft.draw

    def watched(*given):
        implementations.append(given)
        draw(*given)

    monkeypatch.setattr(finetune_peft, "draw", watched)
    before = (base / "model.safetensors").read_bytes()
    assert finetune_peft.main([*SHORT, "--out", str(out), "--data", str(text), "--rank", "2"]) == 0
    assert (base / "model.safetensors").read_bytes() == before
    assert is_picture(out / "finetune_peft.png")
    ((*_, losses, (first, last), loads),) = implementations
    assert [step for step, _ in losses] == [1, 2, 3, 4, 5, 6]
    assert last < first
    assert f"held-out loss {first:.3f} -> {last:.3f}" in capsys.readouterr().out
    for load in loads:
        torch.testing.assert_close(load.sum(1), torch.full((2,), 8.0))
    factors = load_file(out / "adapter" / "adapter_model.safetensors")
    of_experts = [name for name in factors if ".experts." in name and "lora_B" in name]
    assert len(of_experts) == 2 * 2  # two projections of two layers
    assert all(factors[name].abs().max() > 0 for name in of_experts)
    # The adapter is PEFT's: on the same model with Transformers' own experts it gives the loss that was told.
    plain = AutoModelForCausalLM.from_pretrained(base, experts_implementation="eager")
    adapted = PeftModel.from_pretrained(plain, out / "adapter")
    loss, _ = recipe.held_out(adapted.base_model.model, recipe.text_of([str(text)], 32), 32)
    assert loss == pytest.approx(last, rel=1e-4)


def test_what_the_user_can_put_right_is_told(tmp_path, capsys):
    assert finetune_peft.main(["--out", str(tmp_path), "--data", str(tmp_path / "none")]) == 2
    assert "none: no such file or folder" in capsys.readouterr().err


def test_text_without_files_is_pythons_help(base):
    text = recipe.text_of([], 32)
    assert text.name == "Python's help topics"
    assert 15 < len(text.train) / len(text.held_out) < 25
    assert recipe.held_out_sequences(text, 32).shape == (32, 32)


@pytest.mark.parametrize("ep", [2, 4])
def test_experts_over_ranks_are_fine_tuned_from_files_to_files(ranks, base, out, text, ep):
    line = [*SHORT, "--out", str(out), "--data", str(text), "--ep", str(ep), "--lr", "0.01"]
    assert ranks.run(jobs.finetune, line) == [0] * 4
    assert is_picture(out / "finetune_ep.png")
    tokens = recipe.text_of([str(text)], 32)
    losses = []
    for folder in (base, out / "tuned"):  # by Transformers alone
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert not model.config.output_router_logits
        losses.append(recipe.held_out(model, tokens, 32)[0])
    assert losses[1] < losses[0]


def test_ranks_that_cannot_be_divided_are_told(ranks):
    assert ranks.run(jobs.finetune, ["--ep", "3"]) == ["--ep: expected a divisor of the 4 ranks, got 3"] * 4
