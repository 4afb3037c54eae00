"""Training: one model's run, the schedule, held-out evaluation, and the turns that two models take."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import dmoe

from .data import Corpus, held_out_batches, training_batch
from .loads import Loads, relative
from .model import ByteLM
from .optimizer import learning_rate, optimizer
from .ranks import ALONE, Ranks
from .settings import Settings, UsageError

if TYPE_CHECKING:
    from .teacher import Teacher

LOG_EVERY = 10  # steps between two looks at the loss; each makes the host wait for the device
ROUTING_POINTS = 100  # columns of the report's expert-load picture, about


class Run:
    """One model in training: its weights, its optimizer, the steps it has made, and what was measured on the way.

    Args:
        name: ``moe`` or ``dense``, maybe with ``-`` and a seed behind it: see `Settings.each_run`.
        settings: its own.
        corpus: to learn and to be measured on.
        device: where it runs.
        ranks: that train it together.
        teacher: what it learns from beside the text.
        clock: seconds of training are told by it.
    """

    def __init__(
        self,
        name: str,
        settings: Settings,
        corpus: Corpus,
        device: torch.device,
        ranks: Ranks = ALONE,
        teacher: Teacher | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.name = name
        self.kind = name.partition("-")[0]
        self.ranks = ranks
        self.teacher = teacher
        self.settings = settings
        self.corpus = corpus
        self.device = device
        self._read_clock = clock
        _seed(settings.seed, "initialisation")
        self.model = ByteLM(settings, dense=self.kind == "dense", ranks=ranks).to(device)
        if settings.compile:
            self.model.compile()
        self.trained = ranks.wrap(self.model)
        self.optimizer = optimizer(self.model, settings)
        self.step = 0
        self.seconds = 0.0
        """Time spent in training steps; evaluation, checkpoints and warm-up are not in it."""
        self.curve: list[dict[str, float]] = []
        """One entry for each evaluation: step, seconds, held_out_bpb, train_bpb (of the steps since the last one)."""
        self.routing: list[dict[str, Any]] = []
        """One entry for each stretch of steps: step, and what `Loads` tells of each layer."""
        # This rank's share; the sum over ranks is the measure of the batch.
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        self._loss_steps = 0
        self._loads = Loads(self.model.moe_layers, device)

    @property
    def routing_every(self) -> int:
        """Steps in one entry of ``routing``."""
        return max(1, self.settings.steps // ROUTING_POINTS)

    def warm_up(self, steps: int = 1) -> float:
        """Seconds that a training step takes, the fastest of ``steps``. They learn nothing and leave no trace.

        Kernels are chosen, memory is found and ``torch.compile`` compiles in the first step: that is no training time.

        Raises:
            UsageError: a preset's layer cannot take these batches.
        """
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]  # a selection bias is one
        times = []
        for _ in range(steps):
            start = self._clock()
            try:
                self._update(0, rate=0.0)
            except ValueError as error:
                if self.settings.preset is None:
                    raise
                raise UsageError(f"--preset {self.settings.preset}: {error}") from error
            times.append(self._clock() - start)
        self.optimizer = optimizer(self.model, self.settings)  # without the moments of those steps
        dmoe.update_selection_bias(self.model)  # takes with it the loads that were counted
        for buffer, before in buffers:
            buffer.copy_(before)
        return min(times)

    def advance(self, target: int, bar: tqdm, should_stop: Callable[[], bool], *, tell: bool = True) -> None:
        """Trains up to step ``target`` and measures there, or returns early, between two steps, when asked to stop.

        ``tell``: whether to write a line about what was measured.
        """
        while self.step < target and not should_stop():
            start = self._clock()
            first = self.step
            stretch = min(target, first - first % LOG_EVERY + LOG_EVERY)
            while self.step < stretch and not should_stop():
                self._train_step()
            loss = float(self.ranks.sum(self._loss_sum)) / max(1, self._loss_steps)  # waits for the device
            self.seconds += self._clock() - start
            if not math.isfinite(loss):
                raise UsageError(f"{self.name}: the loss is {loss} at step {self.step}. Lower --lr or --clip")
            self._show(bar, loss, self.step - first)
        if self.step == target and (not self.curve or self.curve[-1]["step"] < target):
            bits = float(self.ranks.sum(self._loss_sum)) / self._loss_steps / math.log(2)
            self._loss_sum.zero_()
            self._loss_steps = 0
            point = {"step": self.step, "seconds": self.seconds, "held_out_bpb": self.evaluate(), "train_bpb": bits}
            self.curve.append(point)
            if tell and self.ranks.first:
                bar.write(
                    f"{self.name:>7}  step {self.step:5d}  {self.seconds:6.1f} s  "
                    f"held-out {point['held_out_bpb']:.4f}  train {bits:.4f} bits per byte"
                )

    def evaluate(self, loads: Loads | None = None) -> float:
        """Bits per byte on the held-out text: the mean over its windows of -log2 p(next byte).

        Args:
            loads: counts what the experts of the model do on it.
        """
        self.model.eval()
        _seed(self.settings.seed, "evaluation")  # some drop at random, whatever the mode
        nats = torch.zeros((), dtype=torch.float64, device=self.device)
        count = 0
        s = self.settings
        batches = held_out_batches(self.corpus, max_bytes=s.eval_bytes, batch=s.batch, seq_len=s.seq_len)
        with torch.inference_mode():
            for inputs, targets in batches:
                rows, counted = self.ranks.rows(len(inputs))
                logits = self._logits(self.model, self._to_device(inputs[rows]))
                loss = _cross_entropy(logits, self._to_device(targets[rows]))
                nats += loss * (counted * targets.shape[1])
                count += targets.numel()
                if loads is not None:
                    loads.add(counted / len(inputs))
        self.model.train()
        return float(self.ranks.sum(nats)) / count / math.log(2)

    def state_dict(self) -> dict[str, Any]:
        """All that the rest of the run depends on. Batches and random numbers come from the seed and the step.

        Rank 0's is that of the whole run, as one process has it; the other ranks have to ask for it, too.
        """
        parts = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        return {
            **self.ranks.merged(parts, bool(self.model.moe_layers)),
            "step": self.step,
            "seconds": self.seconds,
            "curve": self.curve,
            "routing": self.routing,
            "sums": {
                "loss": self.ranks.sum(self._loss_sum),
                "loss_steps": self._loss_steps,
                **self._loads.state_dict(self.ranks),
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what `state_dict` gave."""
        parts = {name: state[name] for name in ("model", "optimizer")}
        parts = self.ranks.part(parts, self.model, self.optimizer)
        self.model.load_state_dict(parts["model"])
        self.optimizer.load_state_dict(parts["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.curve, self.routing = list(state["curve"]), list(state["routing"])
        sums = state["sums"]
        if self.ranks.first:
            self._loss_sum.copy_(sums["loss"])
        self._loss_steps = sums["loss_steps"]
        self._loads.load_state_dict(sums, self.ranks)

    def _train_step(self) -> None:
        self._loss_sum += self._update(self.step, learning_rate(self.step, self.settings))
        dmoe.update_selection_bias(self.model)
        self._loss_steps += 1
        self.step += 1
        self._record_routing()

    def _update(self, step: int, rate: float) -> Tensor:
        """Moves the weights by the batch of ``step``; returns this rank's share of its cross-entropy, in nats."""
        s = self.settings
        # Whatever a layer draws in this step depends on the step alone: not on a resume, nor on the other model.
        _seed(s.seed, f"step {step}")
        inputs, targets = training_batch(self.corpus, seed=s.seed, step=step, batch=s.batch, seq_len=s.seq_len)
        rows, counted = self.ranks.rows(s.batch)
        inputs, targets = self._to_device(inputs[rows]), self._to_device(targets[rows])
        logits = self._logits(self.trained, inputs)
        share = counted / s.batch
        task_loss = _cross_entropy(logits, targets) * share
        loss = task_loss
        if self.teacher is not None and self.teacher.present and s.taught(step):
            loss = loss + share * dmoe.losses.distillation_loss(
                logits,
                self.teacher.logits(inputs, self._autocast()),
                temperature=s.kd_temperature,
                coefficient=s.kd_coefficient,
            )
        loss = loss * self.ranks.count  # the ranks' gradients are averaged, and these are to be added
        loss = loss + dmoe.aux_loss(self.model) if self.model.moe_layers else loss
        loss.backward()
        self.ranks.clip(self.model, s.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return task_loss.detach()

    def _logits(self, model: torch.nn.Module, inputs: Tensor) -> Tensor:
        with self._autocast():
            return model(inputs)

    def _to_device(self, tensor: Tensor) -> Tensor:
        """On a GPU from pinned memory: a copy from any other makes the host wait until all work before it is done."""
        if self.device.type != "cuda":
            return tensor.to(self.device)
        return tensor.contiguous().pin_memory().to(self.device, non_blocking=True)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.settings.dtype == "bfloat16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()

    def _record_routing(self) -> None:
        if not self.model.moe_layers:
            return
        self._loads.add(self.ranks.rows(self.settings.batch)[1] / self.settings.batch)
        if self._loads.forwards == self.routing_every:
            self.routing.append({"step": self.step, **self._loads.told(self.ranks)})
            self._loads.clear()

    def _show(self, bar: tqdm, loss: float, steps: int) -> None:
        shown = {
            "loss": f"{loss:.3f}",
            "bits/byte": f"{loss / math.log(2):.3f}",
            "bytes/s": f"{self.step * self.settings.batch * self.settings.seq_len / self.seconds:,.0f}",
        }
        last = [layer.last_metrics for layer in self.model.moe_layers]
        loads = [metrics.tokens_per_expert for metrics in last if metrics is not None]
        if loads:
            of_all = self.ranks.sum(torch.cat(loads)).split([len(load) for load in loads])
            busiest = max(float(relative(load).max()) for load in of_all)
            shown["busiest expert"] = f"{busiest:.1f}x mean"
        bar.set_description(f"{self.name:>7}", refresh=False)
        bar.set_postfix(shown, refresh=False)
        bar.update(steps)

    def _clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self._read_clock()


def train(runs: Sequence[Run], on_turn: Callable[[], None], should_stop: Callable[[], bool]) -> None:
    """Trains all runs to the end, in turns from one evaluation to the next.

    Turns, not one model after the other: what slows the machine down for a while then slows both.

    Args:
        runs: at equal or neighbouring turns, as a checkpoint may have left them.
        on_turn: called after each turn of all runs, when they stand at the same step.
        should_stop: asked between steps, on all ranks alike; true ends the training early.
    """
    s = runs[0].settings
    done = sum(run.step for run in runs)
    silent = not runs[0].ranks.first
    with tqdm(
        total=s.steps * len(runs), initial=done, unit="step", dynamic_ncols=True, mininterval=0.5, disable=silent
    ) as bar:
        target = min(run.step for run in runs)
        while target < s.steps or any(not run.curve or run.curve[-1]["step"] < s.steps for run in runs):
            target = min(s.steps, target - target % s.eval_every + s.eval_every)
            for run in runs:
                run.advance(target, bar, should_stop)
                if should_stop():
                    return
            on_turn()


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def _seed(seed: int, purpose: str) -> None:
    digest = hashlib.sha256(f"{purpose} {seed}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:4], "little"))
