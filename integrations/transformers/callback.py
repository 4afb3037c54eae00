"""What MoE layers do, in the logs of Transformers' Trainer: :class:`MoECallback`."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from dmoe.monitoring import Limits, StepRecord
from dmoe.monitoring.heat_map import heat_map
from dmoe.monitoring.loops import LoopMonitor, draw, numbers


class MoECallback(TrainerCallback):
    """Logs what MoE layers do, moves their selection biases, and warns.

    ::

        trainer = Trainer(model, args, ...)
        trainer.add_callback(MoECallback(trainer))

    In each step that the Trainer logs (``logging_steps``) each layer's ``moe/LAYER/entropy``, ``max_load``,
    ``dropped_share``, ``dead_experts``, ``bytes_sent`` and so on, over all ranks and all micro batches of the step, go
    through ``trainer.log``: to ``trainer.state.log_history``, and to whatever ``report_to`` names. The load of all
    layers goes to TensorBoard and Weights & Biases as an image, ``moe/load``. Such a step costs one all-reduce and
    waits for it; others cost nothing. It warns, once, of experts that get no tokens, of a load that collapses, of an
    auxiliary loss that nobody adds, and of the rest of what :class:`dmoe.monitoring.Limits` names.

    After every optimizer step :func:`dmoe.update_selection_bias` moves the biases by the load of all ranks. Layers with
    ``aux_loss="attached"`` are told what the Trainer multiplies the loss by.

    Args:
        trainer: whose logs they are.
        every: record every so many optimizer steps; None is the Trainer's ``logging_steps``.
        to: where records go besides: a folder for ``python -m dmoe.report``, or others that :func:`dmoe.monitor` takes.
        limits: from where on it warns; None is ``Limits()``.
        move_bias: False leaves the selection biases to somebody else.

    Attributes:
        last: the last :class:`dmoe.monitoring.StepRecord`, or None.

    Raises:
        TypeError: no Trainer.
        ValueError: when training starts, a model without :class:`dmoe.MoE` layers.
    """

    def __init__(
        self,
        trainer: Any,
        every: int | None = None,
        *,
        to: Any = None,
        limits: Limits | None = None,
        move_bias: bool = True,
    ) -> None:
        if not hasattr(trainer, "callback_handler"):
            raise TypeError(
                "MoECallback: trainer: expected the Trainer whose logs are meant, "
                f"trainer.add_callback(MoECallback(trainer)), got {type(trainer).__name__}"
            )
        self._trainer, self._every = trainer, every
        self._options = {"to": to, "limits": limits, "move_bias": move_bias}
        self._loop: LoopMonitor | None = None
        self.last: StepRecord | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **about: Any) -> None:
        """Put the monitor's hooks in."""
        self._close()  # where a run before broke off
        every = self._every if self._every is not None else int(state.logging_steps) or 1
        self._loop = LoopMonitor(about["model"], every=every, **self._options)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A step begins; attached losses are scaled as its loss will be."""
        assert self._loop is not None
        self._loop.begin(state.global_step + 1)
        self._loop.scale_losses(self._trainer.current_gradient_accumulation_steps, self._trainer.accelerator.scaler)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The optimizer has stepped."""
        assert self._loop is not None
        record = self._loop.end()
        if record is None:
            return
        self.last = record
        due = control.should_log
        self._trainer.log(numbers(record))
        control.should_log = due  # the Trainer takes its own numbers to be logged, too
        if state.is_world_process_zero and record.layers:
            self._draw(record)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take the hooks out."""
        self._close()

    def _close(self) -> None:
        if self._loop is not None:
            self._loop.close()
            self._loop = None

    def _draw(self, record: StepRecord) -> None:
        callbacks = self._trainer.callback_handler.callbacks
        writers = (getattr(callback, "tb_writer", None) for callback in callbacks)
        draw(record, [writer for writer in writers if writer is not None])
        for wandb in (getattr(callback, "_wandb", None) for callback in callbacks):
            if wandb is not None:
                image = wandb.Image(heat_map(record).numpy())
                wandb.log({"moe/load": image, "train/global_step": record.step})
