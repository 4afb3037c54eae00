"""fairseq's other tools, and its ways to cut text, on real text from end to end: dense models and mixtures."""

from __future__ import annotations

import re

import fairseq_jobs as jobs
import fairseq_tools as tools
import pytest
from fairseq_pool import in_fairseq, needs_fairseq

pytestmark = needs_fairseq


def spoken(out, kind):
    """The lines of `generate` of one kind (S, T, H, P), by the number of the sentence: the last column."""
    found = re.findall(rf"^{kind}-(\d+)\t(.*)$", out, re.MULTILINE)
    return {int(number): rest.split("\t")[-1] for number, rest in found}


@pytest.mark.parametrize("experts", [False, True], ids=["dense", "mixture"])
def test_a_translation_model_from_training_to_text(tmp_path, experts):
    """Every tool runs, and their figures and sentences are the same where they compute the same."""
    trained, said = in_fairseq(tools.translation, str(tmp_path), experts)
    for done in (*trained, *(done for name, done in said.items() if name != "no task")):
        assert done.status == 0, done.err
    assert any("Loaded checkpoint" in line and "@ 6 updates" in line for _, line in trained[1].log)
    valid = jobs.stats_of(trained[1], "valid")[-1]
    assert "valid_bleu" in valid
    loss = "inner_loss" if experts else "loss"

    (validated,) = jobs.stats_of(said["validate"], "valid")
    assert validated["valid_" + loss] == pytest.approx(valid["valid_" + loss], abs=2e-3)
    scores = [float(score) for line in spoken(said["reference"].out, "P").values() for score in line.split()]
    assert -sum(scores) / len(scores) == pytest.approx(valid["valid_" + loss], abs=2e-3)

    sentences = spoken(said["generate"].out, "H")
    assert sorted(sentences) == list(range(24))
    typed = spoken(said["interactive"].out, "H")
    assert typed == {number: sentences[number] for number in range(5)}
    assert "BLEU4 = " in said["generate"].out
    assert re.search("Generate valid with beam=2: BLEU = ", said["sacrebleu"].out)
    assert said["no task"].status != 0
    assert said["no task"].err.strip().endswith("the following arguments are required: --task")


@pytest.mark.parametrize("mode", ["none", "complete", "complete_doc", "eos"])
def test_every_way_to_cut_text_into_samples(tmp_path, mode):
    """`--sample-break-mode`: the loss of `eval_lm` is that of the validation in training."""
    trained, evaluated = in_fairseq(tools.cut_into_samples, str(tmp_path), mode)
    for done in (trained, evaluated):
        assert done.status == 0, done.err
    told = re.search(r"Loss \(base 2\): ([\d.]+)", evaluated.log[-1][1])
    assert float(told[1]) == pytest.approx(jobs.stats_of(trained, "valid")[-1]["valid_inner_loss"], abs=6e-4)
