"""What the monitor warns of: each once for a layer, and again only after it was cured."""

from __future__ import annotations

import math
import re
import warnings

import pytest
import torch
from monitoring_cases import FIELDS, QUIET, H

import dmoe
from dmoe.monitoring import LayerRecord, Limits
from dmoe.monitoring.alarms import Alarms


def layer(tokens=(40, 40, 40, 40), kept=None, entropy=1.0, rms=1.0, largest=2.0):
    total = sum(tokens)
    kept = tokens if kept is None else kept
    return LayerRecord(
        tokens_per_expert=tokens,
        kept_per_expert=kept,
        load=tuple(each / max(total, 1) for each in tokens),
        entropy=entropy,
        dropped_share=1 - sum(kept) / total if total else 0.0,
        dead_experts=tokens.count(0),
        router_logits_rms=rms,
        router_logits_max=largest,
    )


def said(layers, limits=None, top_k=1, unread=()):
    """Of steps of one layer, ``{step: sentences}``."""
    alarms = Alarms(limits or Limits(), {"a": top_k})
    told = {step: alarms.of(step, {"a": each}, list(unread)) for step, each in enumerate(layers)}
    return {step: sentences for step, sentences in told.items() if sentences}


FINE = layer()


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (layer(tokens=(140, 10, 5, 5)), "load has collapsed: expert 0 takes 88% of the tokens"),
        (layer(entropy=0.001), "entropy is 0.001 nats: it is certain of every token"),
        (layer(kept=(40, 40, 0, 0)), "50% of the assignments were dropped"),
        (layer(rms=5.0, largest=30.0), r"logits grow: their RMS is 5, 5.0 times the smallest so far, .* largest is 30"),
        (layer(entropy=math.nan), "not finite"),
        (layer(rms=math.inf, largest=math.inf), "not finite"),
    ],
    ids=["collapse", "certain", "dropped", "logits", "nan", "inf"],
)
def test_once_until_it_is_cured(bad, words):
    """One alone, and two in a row, are noise of a batch; a NaN is none."""
    at_once = "finite" in words
    told = said([FINE, bad, FINE, bad, bad, FINE, bad, bad, bad, FINE, bad, *[FINE] * 22, bad, bad, bad, bad])
    assert list(told) == ([1, 33] if at_once else [8, 35])
    for (sentence,), step in zip(told.values(), told, strict=True):
        assert sentence.startswith(f"step {step}, layer a: ")
        assert re.search(words, sentence)


def test_undecided_and_uneven():
    (two,) = said([layer(tokens=(140, 10, 5, 5), entropy=1.38)] * 3).values()
    assert len(two) == 2
    assert "undecided (entropy 1.38 of 1.39 nats)" in two[1]
    assert not said([layer(entropy=1.38)] * 3)


def test_dead_experts_are_told_after_so_many_steps_with_enough_tokens():
    dead = layer(tokens=(60, 60, 0, 40))
    told = said([FINE, *[dead] * 30])
    assert list(told) == [20]
    assert "expert 2 has had no token for 20 recorded steps" in told[20][0]
    assert not said([*[dead] * 19, FINE] * 3)
    assert not said([layer(tokens=(1, 0, 0, 0), entropy=0.5)] * 25, Limits(collapse=2))  # six tokens for each at most
    (many,) = said([layer(tokens=(150, 0, 0, 0))] * 20, Limits(collapse=2)).values()
    assert "3 experts (1, 2, 3) have had no token" in many[0]
    assert not said([layer(tokens=(0, 0, 0, 0), entropy=0.0)] * 30)  # a layer without tokens


def test_several_choices_of_an_even_router_are_no_collapse():
    assert not said([layer(tokens=(40, 40))] * 3, top_k=2)
    assert not said([layer(tokens=(90, 70, 40, 40))] * 3, top_k=2)


def model_with(**fields):
    torch.manual_seed(0)
    return dmoe.MoE(**FIELDS, num_experts=4, **fields)


def test_an_auxiliary_loss_that_nobody_reads():
    layer = model_with()
    assert not layer.auxiliary.is_unread
    read = [True, False, False, *[True] * 22, False]
    with dmoe.monitor(layer, every=1) as monitor, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for each in read:
            with monitor.step():
                y = layer(torch.randn(6, H)).sum()
                assert layer.auxiliary.is_unread
                (y + (dmoe.aux_loss(layer) if each else 0)).backward()
            dmoe.aux_loss(layer)
    assert [sentence.split(",")[0] for sentence in monitor.warnings] == ["step 1", "step 25"]
    assert "add dmoe.aux_loss(model) to the task's loss" in monitor.warnings[0]


@pytest.mark.parametrize("how", ["attached", "no coefficient", "evaluation"])
def test_losses_that_nobody_has_to_read(how):
    layer = model_with(
        **{"attached": {"aux_loss": "attached"}, "no coefficient": {"load_balancing_coefficient": 0.0}}.get(how, {})
    )
    layer.train(how != "evaluation")
    with dmoe.monitor(layer, every=1) as monitor, monitor.step():
        layer(torch.randn(6, H)).sum().backward()
    assert not monitor.warnings


def test_nan_tokens_are_told_and_warned_of():
    layer = model_with(aux_loss="attached")
    with dmoe.monitor(layer, limits=QUIET, every=1) as monitor:
        monitor.begin_step(7)
        layer(torch.full((6, H), math.nan))
        with pytest.warns(UserWarning, match="dmoe: step 7, layer : the router's logits are not finite"):
            record = monitor.end_step()
    assert record.warnings == tuple(monitor.warnings)
