"""Lightning's callback: its numbers, where they go, what they cost, and what it does to biases and losses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from parallel_layer_cases import close
from rank_jobs_by_name import call
from training_cases import Case, by_hand

import dmoe

pytestmark = pytest.mark.xdist_group("pair")
CASE = Case()
FIELDS = ("entropy", "dropped_share", "dead_experts", "bytes_sent")


@pytest.fixture
def job(pair):
    return lambda name, *arguments: pair.run(call, "rank_jobs_lightning", name, *arguments)


def check_numbers(record, expected, logged):
    """A step's record, and what was logged of it, is what ``reduce_metrics`` says, to the last bit."""
    assert list(record.layers) == list(expected)
    for name, metrics in expected.items():
        layer = record.layers[name]
        assert layer.tokens_per_expert == tuple(metrics.tokens_per_expert.tolist())
        assert layer.load == tuple(metrics.load.tolist())
        for field in FIELDS:
            assert getattr(layer, field) == float(getattr(metrics, field)), field
            if logged is not None:
                assert logged[f"moe/{name}/{field}"] == pytest.approx(float(getattr(metrics, field)), rel=1e-6)
        if logged is not None:
            assert logged[f"moe/{name}/max_load"] == pytest.approx(float(metrics.load.max()), rel=1e-6)


@pytest.mark.parametrize("how", ["plain", "fsdp2"])
def test_numbers_are_those_of_reduce_metrics(job, tmp_path, how):
    """In every logger, the real TensorBoard's file among them; one all-reduce in each step that is logged."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    case = replace(CASE, accumulate=1)
    results = job("watch", case, how, str(tmp_path), 2)
    for seen, reduced, logged, _, _ in results:
        assert [record.step for record, _ in seen] == [2, 4, 6]
        assert reduced == [0, 1] * 3
        for record, expected in seen:
            check_numbers(record, expected, logged if record.step == 6 else None)
    first, second = ([record for record, _ in seen] for seen, *_ in results)
    assert [each.layers for each in first] == [each.layers for each in second]
    _, _, _, numbers, images = results[0]
    assert [("moe/net.moe/entropy" in each) for each in numbers] == [True] * 3
    assert images == [("moe/load", step, (12, 48, 3)) for step in (2, 4, 6)]
    assert results[1][3:] == ([], [])  # the other rank shows nothing
    events = EventAccumulator(str(tmp_path)).Reload()
    written = {event.step: event.value for event in events.Scalars("moe/net.moe/entropy")}
    assert list(written.values()) == pytest.approx([record.layers["net.moe"].entropy for record in first])
    assert [event.step for event in events.Images("moe/load")] == [2, 4, 6]


def test_micro_batches_add_up(job, tmp_path):
    (seen, reduced, *_), _ = job("watch", CASE, "plain", str(tmp_path), 3)
    assert [record.step for record, _ in seen] == [3, 6]
    assert sum(reduced) == 2
    for record, _ in seen:
        layer = record.layers["net.moe"]
        assert (record.tokens, layer.forwards) == (CASE.batch * CASE.accumulate, 2 * CASE.accumulate)


@pytest.mark.parametrize("how", ["plain", "fsdp2"])
def test_biases_move_after_each_step(job, how):
    """By the load of all ranks, and all micro batches."""
    fields = {"load_balancing_coefficient": 0.0, "selection_bias": True, "selection_bias_update_rate": 0.05}
    case = replace(CASE, steps=5, fields=fields)  # an odd number: steps up and down do not cancel
    net, losses = by_hand(case, dmoe.update_selection_bias)
    assert net.moe.router.selection_bias.any()
    for values, losses_there in job("fit", case, how, 2, None, None, None, True):
        close("losses", losses_there, losses)
        for name, value in net.state_dict().items():
            close(name, values[name], value)


def test_attached_losses_follow_accumulation(job):
    """They add their gradients by themselves; what the Trainer divides the loss by, divides them."""
    net, _ = by_hand(CASE)
    for values, _ in job("fit", replace(CASE, fields={"aux_loss": "attached"}), "plain", 2, None, None, None, True):
        for name, value in net.state_dict().items():
            close(name, values[name], value)


def test_it_warns_of_dead_experts_and_of_losses_that_nobody_adds(job):
    told, told_there = job("warned", CASE)
    assert not any("step " in each for each in told_there)  # the first rank speaks for all
    assert any("nobody has read the auxiliary loss of this step's forward; add dmoe.aux_loss" in each for each in told)
    assert any("2 experts (2, 3) have had no token for 3 recorded steps" in each for each in told)


def alone(step, **options):
    """A Trainer in one process with the callback, and a module that has two optimizers and the step that is given."""
    import lightning.pytorch as pl
    from rank_jobs_lightning import Module

    from dmoe.integrations.lightning import MoECallback

    class TwoOptimizers(Module):
        automatic_optimization = False
        training_step = step

        def configure_optimizers(self):
            return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.net.first, self.net.moe)]

    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, limit_train_batches=4, limit_val_batches=0, log_every_n_steps=2,
        callbacks=[MoECallback(**options)], **dict.fromkeys(off, False),
    )  # fmt: skip
    return trainer, TwoOptimizers(CASE, "plain")


def test_several_optimizers_are_one_step():
    """Lightning counts each of them; of every second number it would never see one."""

    def step(self, _, position):
        self.manual_backward(self.net(torch.ones(2, 6, dtype=CASE.dtype)).sum() + dmoe.aux_loss(self))
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()

    seen = []
    trainer, module = alone(step, to=seen.append)
    trainer.fit(module)
    assert trainer.global_step == 8
    assert [record.step for record in seen] == [2, 4]


def test_a_run_that_breaks_off_leaves_no_hooks():
    def step(self, _, position):
        assert any(each._forward_hooks for each in self.modules())
        raise KeyError("of the module")

    trainer, module = alone(step)
    with pytest.raises(KeyError, match="of the module"):
        trainer.fit(module)
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in module.modules())


def test_a_module_without_layers_is_refused():
    from lightning.pytorch import LightningModule, Trainer

    from dmoe.integrations.lightning import MoECallback

    module = LightningModule()
    module.linear = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"with dmoe\.MoE layers, got LightningModule without any"):
        MoECallback().on_train_start(Trainer(logger=False, enable_checkpointing=False, barebones=False), module)
