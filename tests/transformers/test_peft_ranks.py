"""dmoe's adapters on models of Transformers over gloo ranks: steps and files are those of one process."""

from __future__ import annotations

import pytest
import rank_jobs_hf_lora as jobs
import torch
from hub_cases import batches_of, model_of
from peft import PeftModel
from safetensors.torch import load_file

import dmoe

# Ranks import transformers, which takes them seconds: in one worker they do so once.
pytestmark = pytest.mark.xdist_group("transformers")


@pytest.mark.parametrize(
    ("family", "how", "checkpointing"),
    [
        ("qwen3_moe", "parallelize", None),
        ("mixtral", "parallelize", False),
        ("qwen3_moe", "parallelize", True),
        ("qwen3_moe", "fsdp", None),
        ("mixtral", "fsdp", False),
        ("qwen3_moe", "both", None),
        ("mixtral", "both", False),
    ],
)
def test_steps_and_files_are_those_of_one_process(ranks, family, how, checkpointing, tmp_path):
    batches = batches_of(3, 4)
    results = ranks.run(jobs.trained, family, how, batches, str(tmp_path / "ranks"), checkpointing)
    model, parameters = jobs.spread(family, "alone")
    expected = jobs.train(model, parameters, batches)
    found = torch.tensor([losses for losses, *_ in results]).mean(0)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=0)
    assert len({round(loss, 3) for loss in expected}) == 3  # it learns something
    dmoe.lora.save_peft(model, tmp_path / "alone", base="base")
    ours, theirs = (load_file(tmp_path / each / "adapter_model.safetensors") for each in ("ranks", "alone"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name] - tensor).norm() <= 1e-3 * tensor.norm(), name
    configs = [(tmp_path / each / "adapter_config.json").read_text() for each in ("ranks", "alone")]
    assert configs[0] == configs[1]
    for _, *differences in results:
        assert all(difference <= 1e-6 for difference in differences)
    read = PeftModel.from_pretrained(model_of(family), tmp_path / "ranks")
    with torch.no_grad():
        logits = [each.eval()(input_ids=batches[0]).logits for each in (read, model)]
    assert (logits[0] - logits[1]).abs().max() <= 1e-3 * logits[1].abs().max()
