"""The monitor on one rank: its numbers are those of a loop over tokens, whatever the steps are made of."""

from __future__ import annotations

import math
import warnings
from unittest.mock import patch

import pytest
import torch
from monitoring_cases import FIELDS, QUIET, VOCABULARY, H, TwoMixtures, by_hand, compare
from torch import nn

import dmoe
from dmoe.monitoring import Monitor, expert_similarity


def batch(tokens=15, seed=0):
    return torch.randint(VOCABULARY, (tokens,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("checkpointed", [None, False, True])
@pytest.mark.parametrize("micro", [1, 3])
def test_numbers_are_those_of_a_loop_over_tokens(checkpointed, micro):
    """Accumulation adds up; what a checkpoint runs again, of either kind, does not."""
    model = TwoMixtures(checkpointed=checkpointed)
    seen = []
    with dmoe.monitor(model, seen.append, limits=QUIET, every=1) as monitor:
        for step in range(3):
            for inputs in model.inputs.values():
                inputs.clear()
            hands = {}
            with monitor.step():
                for part in range(micro):
                    x = model(batch(12 + part, seed=10 * step + part))
                    x.square().sum().backward()
            hands = {name: by_hand(layer, model.inputs[name]) for name, layer in model.mixtures().items()}
            record = seen[-1]
            assert record is monitor.last
            assert record.step == step
            assert record.tokens == sum(12 + part for part in range(micro))
            assert set(record.layers) == set(hands)
            for name, layer in record.layers.items():
                compare(layer, [hands[name]])
                assert layer.forwards == micro
            assert record.layers["second.moe"].dropped_share > 0
            if micro == 1 and checkpointed is None:
                for name, metrics in dmoe.reduce_metrics(model).items():
                    assert record.layers[name].entropy == float(metrics.entropy)
                    assert record.layers[name].load == tuple(metrics.load.tolist())


def test_parts_of_steps_and_layers_take_seconds_that_fit_into_the_whole():
    model = TwoMixtures()
    with dmoe.monitor(model, limits=QUIET, every=1) as monitor, monitor.step():
        with monitor.part("forward"):
            y = model(batch()) + model(batch())
        with monitor.part("backward"):
            (y.sum() + dmoe.aux_loss(model)).backward()
        with monitor.part("forward"):
            pass
    record = monitor.last
    assert set(record.parts) == {"forward", "backward"}
    assert 0 < sum(record.parts.values()) <= record.seconds
    layers = sum(sum(layer.seconds.values()) for layer in record.layers.values())
    assert all(set(layer.seconds) == {"router", "dispatch", "experts", "combine"} for layer in record.layers.values())
    assert all(value > 0 for layer in record.layers.values() for value in layer.seconds.values())
    assert layers <= record.parts["forward"]


def test_steps_that_are_not_recorded_and_what_runs_outside_of_steps_leave_nothing():
    model = TwoMixtures()
    with dmoe.monitor(model, every=3, limits=QUIET) as monitor:
        kept = []
        for _ in range(7):
            model(batch())
            monitor.begin_step()
            model(batch(5))
            kept.append(monitor.end_step())
            dmoe.aux_loss(model)
        assert [None if record is None else (record.step, record.tokens) for record in kept] == [
            (0, 5), None, None, (3, 5), None, None, (6, 5)
        ]  # fmt: skip
        with monitor.step(12):
            pass
        assert monitor.last.step == 12
        assert monitor.last.layers == {}
        monitor.begin_step()
        assert monitor.end_step() is None


def test_a_layer_that_did_not_run_is_left_out():
    model = TwoMixtures()
    with dmoe.monitor(model, limits=QUIET, every=1) as monitor, monitor.step():
        model.first(torch.randn(4, H, dtype=torch.float64))
    assert set(monitor.last.layers) == {"first"}


def test_an_evaluation_is_recorded_where_it_has_a_step():
    model = TwoMixtures().eval()
    with dmoe.monitor(model, limits=QUIET, every=1) as monitor, torch.no_grad(), monitor.step():
        model(batch())
    compare(monitor.last.layers["first"], [by_hand(model.first, model.inputs["first"])])


def test_masked_tokens_count_in_nothing():
    layer = dmoe.MoE(**FIELDS, num_experts=4, dtype=torch.float64)
    x, mask = torch.randn(9, H, dtype=torch.float64), torch.arange(9) % 3 > 0
    with dmoe.monitor(layer, limits=QUIET, every=1) as monitor, monitor.step():
        layer(x, token_mask=mask)
        dmoe.aux_loss(layer)
    compare(monitor.last.layers[""], [by_hand(layer, [x[mask]])])


def hooks_of(model):
    return [hook for m in model.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]


def test_hooks_are_gone_afterwards_also_after_an_exception():
    model = TwoMixtures()
    assert not hooks_of(model)
    monitor = dmoe.monitor(model, limits=QUIET, every=1)
    assert not hooks_of(model)
    with monitor:
        assert hooks_of(model)
    with pytest.raises(ZeroDivisionError), monitor, monitor.step():
        raise ZeroDivisionError
    assert not hooks_of(model)
    assert monitor.last is None
    with monitor, monitor.step():  # it may start again
        model(batch())
    assert monitor.last.step == 1  # the step that broke off had a number
    assert not hooks_of(model)


def test_hooks_that_look_leave_the_experts_weights_ahead_of_their_forward():
    layer = dmoe.MoE(**FIELDS, num_experts=4)
    assert layer.experts.weights_ahead() is not None
    with dmoe.monitor(layer, every=1):
        assert layer.experts.weights_ahead() is not None
        layer.experts.register_forward_pre_hook(lambda *_: None)
        assert layer.experts.weights_ahead() is None


@pytest.mark.parametrize("blocks", ["the whole", "each block", "inside"])
def test_compiled_models(blocks):
    """Counts, entropy, logits and tokens; of a wrapper that the monitor was not given, the last forward of a step."""
    model = TwoMixtures(load_balancing_coefficient=0.0)

    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.moe = model.first, model.second.moe

        def forward(self, x):
            return self.moe(self.first(x))

    chain = Chain()
    if blocks == "each block":
        chain.first, chain.moe = (torch.compile(each, backend="aot_eager", fullgraph=True) for each in chain.children())
        called = watched = chain
    else:
        called = torch.compile(chain, backend="aot_eager", fullgraph=True)
        watched = chain if blocks == "inside" else called
    generator = torch.Generator().manual_seed(0)
    with dmoe.monitor(watched, limits=QUIET, every=1) as monitor, torch.no_grad():
        for step in range(3):
            inputs = [torch.randn(10, H, dtype=torch.float64, generator=generator) for _ in range(1 + step)]
            with monitor.step():
                for x in inputs:
                    called(x)
            counted = inputs[-1:] if blocks == "inside" else inputs
            assert len(monitor.last.layers) == 2
            record = next(iter(monitor.last.layers.values()))
            compare(record, [by_hand(model.first, counted)])
            assert monitor.last.tokens == 10 * len(counted)
            assert not record.seconds


def test_expert_similarity_is_the_mean_over_pairs():
    layer = dmoe.MoE(**FIELDS, num_experts=5, dtype=torch.float64)
    experts = layer.experts
    flat = torch.cat([experts.gate_up_proj.flatten(1), experts.down_proj.flatten(1)], 1).detach()
    cosines = [
        float(nn.functional.cosine_similarity(flat[a], flat[b], dim=0)) for a in range(5) for b in range(5) if a != b
    ]
    assert math.isclose(float(expert_similarity(experts)), sum(cosines) / len(cosines), abs_tol=1e-6)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(parameter[:1].expand_as(parameter))
    assert math.isclose(float(expert_similarity(experts)), 1, abs_tol=1e-6)
    assert expert_similarity(dmoe.MoE(**FIELDS | {"top_k": 1}, num_experts=1).experts) is None
    assert expert_similarity(dmoe.MoE(hidden_size=H, ffn_hidden_size=[8, 16], num_experts=2).experts) is None
    assert expert_similarity(nn.Linear(2, 2)) is None
    dmoe.quant.quantize(layer.float(), "int8")
    assert expert_similarity(layer.experts) is None


def test_similarity_is_measured_once_in_so_many_steps():
    model = TwoMixtures()
    with dmoe.monitor(model, every=2, similarity_every=5, limits=QUIET) as monitor:
        measured = []
        for number in range(14):
            monitor.begin_step()
            model(batch())
            dmoe.aux_loss(model)
            record = monitor.end_step()
            if record and record.layers["first"].expert_similarity is not None:
                measured.append(number)
    assert measured == [0, 6, 10]
    assert math.isclose(float(expert_similarity(model.first.experts)), measured and _last(model), abs_tol=1e-6)


def _last(model):
    with dmoe.monitor(model, limits=QUIET, every=1) as monitor, monitor.step():
        model(batch())
        dmoe.aux_loss(model)
    return monitor.last.layers["first"].expert_similarity


def test_tokens_by_expert_are_those_of_a_loop():
    """Two micro batches a step, whose ids are one after the other; padding, negative, is nobody's token."""
    model = TwoMixtures()
    counted = {name: {} for name in model.mixtures()}
    with dmoe.monitor(model, most_tokens=5, limits=QUIET, every=1) as monitor:
        for step in range(5):
            ids = batch(20, seed=step) % (step + 6)
            names = torch.where(ids == 3, -100, ids)
            for inputs in model.inputs.values():
                inputs.clear()
            with monitor.step(token_ids=names):
                model(ids[:12])
                dmoe.aux_loss(model)
                model(ids[12:])
                dmoe.aux_loss(model)
            if step == 0:
                first = sorted(set(names.tolist()) - {-100}, key=lambda t: (-names.tolist().count(t), t))[:5]
                assert monitor.tokens is None
            if 0 < step < 4:  # sums are made in the 2nd and 4th step
                for name, layer in model.mixtures().items():
                    for chosen, token in zip(by_hand(layer, model.inputs[name]).chosen, names.tolist(), strict=True):
                        for expert in chosen:
                            counted[name][expert, token] = counted[name].get((expert, token), 0) + 1
            if step in (1, 3):
                table = monitor.tokens
                assert table.step == step
                assert table.ids == tuple(sorted(first))
                for name, rows in table.layers.items():
                    for expert, row in enumerate(rows):
                        assert list(row) == [counted[name].get((expert, token), 0) for token in table.ids]
    assert monitor.tokens.step == 3


def test_unrecorded_steps_keep_no_tensor():
    model = TwoMixtures()
    with dmoe.monitor(model, every=2, limits=QUIET) as monitor:
        monitor.begin_step(1)
        with patch("dmoe.monitoring.layer_watch.logits_size", side_effect=AssertionError), monitor.part("forward"):
            model(batch())
        assert monitor.end_step() is None


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (
            lambda m: Monitor(nn.Linear(2, 2)),
            ValueError,
            "model: expected an nn.Module with dmoe.MoE layers, got Linear",
        ),
        (lambda m: Monitor(7), ValueError, "got int without any"),
        (lambda m: Monitor(nn.DataParallel(m)), ValueError, "expected no nn.DataParallel"),
        (lambda m: Monitor(m, every=0), ValueError, "every: expected an integer of at least 1, got 0"),
        (lambda m: Monitor(m, similarity_every=1.5), ValueError, "similarity_every: expected an integer"),
        (lambda m: Monitor(m, most_tokens=True), ValueError, "most_tokens: expected an integer"),
        (lambda m: Monitor(m, to=7), TypeError, "to: expected a folder's path, .* got int"),
        (lambda m: Monitor(m, group="ep"), TypeError, "monitor: group: expected a torch.distributed ProcessGroup"),
        (lambda m: Monitor(m).begin_step(), RuntimeError, "expected a running monitor"),
        (lambda m: Monitor(m).start().start(), RuntimeError, "expected a monitor that is not running"),
        (lambda m: Monitor(m).start().end_step(), RuntimeError, "expected begin_step.. first"),
        (lambda m: Monitor(m).start().begin_step(-1), ValueError, "number: expected an integer of at least 0, got -1"),
        (lambda m: Monitor(m).start().begin_step(token_ids=[1]), TypeError, "token_ids: .* integers, got list"),
        (lambda m: Monitor(m).start().begin_step(token_ids=torch.ones(2)), TypeError, "got torch.float32"),
    ],
)
def test_bad_input_gets_a_sentence(build, error, words):
    with pytest.raises(error, match=words):
        build(TwoMixtures())


def test_a_step_inside_a_step_and_too_few_ids_get_a_sentence():
    model = TwoMixtures()
    with dmoe.monitor(model, limits=QUIET, every=1) as monitor:
        monitor.begin_step()
        with pytest.raises(RuntimeError, match=r"expected end_step\(\) for step 0 first"):
            monitor.begin_step()
        monitor.end_step()
        with pytest.raises(TypeError, match="token_ids"):
            monitor.begin_step(token_ids=batch().double())  # no step is open then
        told = r"token_ids: .* got 3 ids, and layer first has seen 15 tokens"
        with pytest.raises(ValueError, match=told), monitor.step(token_ids=batch(3)):
            model(batch(15))
        with warnings.catch_warnings(), monitor.step():  # the step that broke off is over
            warnings.simplefilter("ignore")
            model(batch())
