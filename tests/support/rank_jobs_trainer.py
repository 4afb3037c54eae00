"""Transformers' Trainer on ranks that are a group already, and what one process makes of the same batches."""

from __future__ import annotations

import json
import os
import warnings
from unittest.mock import patch

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState
from hub_cases import batches_of
from torch.utils.data import SequentialSampler
from training_cases import environment
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import dmoe
import dmoe.integrations.transformers as on_transformers

STEPS, BATCH, ACCUMULATE, CLIP, LR = 6, 4, 2, 0.05, 1e-2


def data_of():
    rows = batches_of(STEPS * ACCUMULATE, BATCH).flatten(0, 1)
    labels = rows.clone()
    labels[:, 0] = -100  # nobody predicts it, and older releases of Transformers count it in the mean
    return [{"input_ids": row, "labels": of_row} for row, of_row in zip(rows, labels, strict=True)]


def by_hand(model, aux):
    """Plain PyTorch in one process: values by name, and each step's loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    losses = []
    for step in batches_of(STEPS * ACCUMULATE, BATCH).split(ACCUMULATE):
        total = 0.0
        for ids in step:
            loss = model(input_ids=ids, labels=ids).loss
            total += loss.detach() / ACCUMULATE
            ((loss + aux(model)) / ACCUMULATE).backward()
        assert torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP) > CLIP
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return {name: value.detach() for name, value in model.state_dict().items()}, torch.stack(losses)


def arguments_of(folder, **options):
    defaults = {
        "output_dir": folder,
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH // dist.get_world_size(),
        "gradient_accumulation_steps": ACCUMULATE,
        "max_grad_norm": CLIP,
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return TrainingArguments(**{**defaults, **options})


class InOrder:
    """Data in order, which Trainer would shuffle."""

    def _get_train_sampler(self, *_):
        return SequentialSampler(self.train_dataset)


class Mine(InOrder, on_transformers.ParallelTrainer):
    pass


class Plain(InOrder, Trainer):
    pass


def fresh(job):
    def run():
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        with patch.dict(os.environ, environment(dist.get_rank(), dist.get_world_size())):
            return job()

    return run()


def whole(model):
    state = {name: value.detach() for name, value in model.state_dict().items()}
    return {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in state.items()}


def trained(path, grid, folder, options=None, resume=None, **arguments):
    """A Trainer that has trained the model at a path, and its callback."""
    ep, fsdp = grid
    model = on_transformers.parallelize(
        path, ep=ep, fsdp=fsdp, dtype=torch.float64, progress=False, **(options or {})
    ).train()
    trainer = Mine(model, arguments_of(folder, **arguments), train_dataset=data_of())
    callback = on_transformers.MoECallback(trainer)
    trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, callback


def fit(group, path, grid, folder, options=None, resume=None, arguments=None):
    """What all ranks end with, and the logged losses."""

    def job():
        trainer, _ = trained(path, grid, folder, options, resume, **(arguments or {}))
        losses = [each["loss"] for each in trainer.state.log_history if "loss" in each]
        return whole(trainer.model), losses

    return fresh(job)


def watch(group, path, folder):
    """Numbers of the callback, with a plain Trainer around one dmoe model on each rank, and a real TensorBoard."""

    def job():
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).train()
        on_transformers.to_dmoe(model)
        arguments = arguments_of(folder, gradient_accumulation_steps=1, logging_steps=2, report_to=["tensorboard"])
        trainer = Plain(model, arguments, train_dataset=data_of())
        callback = on_transformers.MoECallback(trainer, limits=dmoe.monitoring.Limits(dead_steps=1))
        trainer.add_callback(callback)
        shown = Shown()
        trainer.add_callback(shown)
        seen = []
        real = callback.on_step_end

        def on_step_end(*rest, **about):
            before, expected = callback.last, dmoe.reduce_metrics(model)
            with patch.object(dist, "all_reduce", wraps=dist.all_reduce) as all_reduce:
                real(*rest, **about)
            seen.append((None if callback.last is before else callback.last, expected, all_reduce.call_count))

        callback.on_step_end = on_step_end
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.train()
        said = sorted({str(each.message) for each in caught if str(each.message).startswith("dmoe: step")})
        return seen, trainer.state.log_history, said, shown._wandb.logged

    with patch.dict(os.environ, {"TENSORBOARD_LOGGING_DIR": folder}):
        return fresh(job)


class Shown(on_transformers.MoECallback.__mro__[1]):
    """Stands for Transformers' callback of Weights & Biases."""

    class Wandb:
        def __init__(self):
            self.logged = []

        def Image(self, pixels):  # noqa: N802 - W&B's name
            return pixels.shape

        def log(self, values):
            self.logged.append(values)

    def __init__(self):
        self._wandb = self.Wandb()


def refusals(group, path, folder):
    """What the Trainer says to what it does not do."""

    def told(*arguments, **options):
        try:
            Mine(*arguments, **options)
        except ValueError as error:
            return str(error)

    def job():
        spread = on_transformers.parallelize(path, ep=2, progress=False)
        best = arguments_of(folder, load_best_model_at_end=True, save_strategy="steps", eval_strategy="steps")
        return {
            "another": told(AutoModelForCausalLM.from_pretrained(path), arguments_of(folder), train_dataset=data_of()),
            "best": told(spread, best, train_dataset=data_of(), eval_dataset=data_of()),
        }

    return fresh(job)


def state_of(folder):
    """What a checkpoint holds: its files, and the trainer's step."""
    with open(os.path.join(folder, "trainer_state.json")) as file:
        return sorted(os.listdir(folder)), json.load(file)["global_step"]
