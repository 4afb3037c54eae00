"""Transformers' Trainer for models that are spread over ranks: :class:`ParallelTrainer`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

import dmoe
from dmoe.integrations.accelerate import teach
from dmoe.integrations.transformers.parallel_load import CountedFolder, fill
from dmoe.integrations.transformers.parallel_mesh import grid_of_model
from dmoe.integrations.transformers.parallel_optimizer import load_optimizer
from dmoe.integrations.transformers.parallel_save import save_pretrained

ARGUMENTS, SCHEDULER = "training_args.bin", "scheduler.pt"  # as Trainer calls them


class ParallelTrainer(Trainer):
    """``Trainer`` for a model of :func:`parallelize`, whose experts are on several ranks.

    ::

        model = parallelize("Qwen/Qwen3-30B-A3B", ep=8, aux_loss="attached").train()
        trainer = ParallelTrainer(model, args, train_dataset=...)
        trainer.add_callback(MoECallback(trainer))  # scales attached losses, logs the experts' load
        trainer.train()

    Nobody wraps the model, which averages its gradients by itself; clipping counts each expert once; parameters are in
    groups that foreach and fused optimizers take. A checkpoint is a folder in Hugging Face's format that all ranks
    write together, its optimizer's state in ``optimizer/``; with the model spread over another number of ranks,
    ``train(resume_from_checkpoint=...)`` goes on. For a Trainer of another package put this before it:
    ``class Mine(ParallelTrainer, SFTTrainer)``.

    Raises:
        ValueError: a model that :func:`parallelize` has not spread; ``load_best_model_at_end``, which is not there for
            such models; FSDP or DeepSpeed in ``args``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        try:
            grid_of_model(self.model)
        except ValueError as error:
            raise ValueError(f"ParallelTrainer: model: {error}") from None
        if self.args.load_best_model_at_end:
            raise ValueError("ParallelTrainer: args: expected load_best_model_at_end=False, got True")
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                "ParallelTrainer: args: expected neither FSDP nor DeepSpeed, as parallelize(..., fsdp=...) has cut the "
                f"model already, got {'FSDP' if self.is_fsdp_enabled else 'DeepSpeed'}"
            )

    def create_accelerator_and_postprocess(self) -> None:
        """Trainer's, of an Accelerator that knows of experts on other ranks."""
        super().create_accelerator_and_postprocess()
        teach(self.accelerator)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Trainer's, with experts in groups of their own on any number of ranks."""
        made = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if made:
            groups = list(_groups_of(optimizer))
            optimizer.param_groups.clear()
            for group in groups:
                optimizer.add_param_group(group)
        return optimizer

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model, by all ranks together.

        Args:
            output_dir: new or empty; None is the Trainer's own.
            _internal_call: whether it is a checkpoint, with the optimizer's state and in the place of an earlier one.
        """
        folder = Path(output_dir or self.args.output_dir or ".")
        if self.args.should_save:
            folder.parent.mkdir(parents=True, exist_ok=True)
        optimizer = self._own_optimizer() if _internal_call and not self.args.save_only_model else None
        save_pretrained(self.model, folder, optimizer=optimizer, overwrite=_internal_call, progress=False)
        if self.args.should_save:
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)
            torch.save(self.args, folder / ARGUMENTS)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """The optimizer's state is beside the model already."""
        if self.args.should_save:
            scheduler: Any = self.lr_scheduler
            torch.save(scheduler.state_dict(), os.path.join(output_dir, SCHEDULER))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        grid = grid_of_model(self.model)
        with CountedFolder(Path(resume_from_checkpoint)) as files:
            grid.together(lambda: fill(self.model, files, progress=False))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            load_optimizer(self._own_optimizer(), self.model, checkpoint, progress=False)
            scheduler: Any = self.lr_scheduler
            scheduler.load_state_dict(torch.load(os.path.join(checkpoint, SCHEDULER), weights_only=True))

    def _own_optimizer(self) -> Any:
        """Without Accelerate's around it."""
        return getattr(self.optimizer, "optimizer", self.optimizer)


def _groups_of(optimizer: torch.optim.Optimizer) -> Iterator[dict[str, Any]]:
    """The optimizer's groups, those that differ in nothing as one, and experts apart."""
    alike: dict[str, dict[str, Any]] = {}
    for group in optimizer.param_groups:
        options = {name: value for name, value in group.items() if name != "params"}
        found = alike.setdefault(repr(sorted(options.items(), key=lambda item: item[0])), {**options, "params": []})
        found["params"] += group["params"]
    for group in alike.values():
        for experts in (False, True):
            params = [each for each in group["params"] if dmoe.is_expert_param(each) == experts]
            if params:
                yield {**group, "params": params}
