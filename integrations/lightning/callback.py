"""What MoE layers do, in the logs of Lightning's Trainer: :class:`MoECallback`."""

from __future__ import annotations

from typing import Any

from dmoe.integrations.lightning.package import pl
from dmoe.monitoring import Limits
from dmoe.monitoring.loops import LoopMonitor, draw, numbers


class MoECallback(pl.callbacks.Callback):
    """Logs what MoE layers do, moves their selection biases, and warns, under any strategy.

    ::

        trainer = Trainer(callbacks=[MoECallback()], logger=TensorBoardLogger("runs"))

    In each step that the Trainer logs (``log_every_n_steps``) each layer's ``moe/LAYER/entropy``, ``max_load``,
    ``dropped_share``, ``dead_experts``, ``bytes_sent`` and so on, over all ranks and all micro batches of the step, go
    to every logger, to ``trainer.logged_metrics`` and ``callback_metrics``; and the load of all layers, as an image
    ``moe/load``, to TensorBoard and Weights & Biases. Such a step costs one all-reduce and waits for it; others cost
    nothing. It warns, once, of experts that get no tokens, of a load that collapses, of an auxiliary loss that nobody
    adds, and of the rest of what :class:`dmoe.monitoring.Limits` names.

    After every optimizer step :func:`dmoe.update_selection_bias` moves the biases by the load of all ranks. Layers with
    ``aux_loss="attached"`` are told what the Trainer multiplies the loss by.

    Args:
        every: record every so many optimizer steps; None is the Trainer's ``log_every_n_steps``. Of others the Trainer
            logs those that are multiples of its own number, too.
        to: where records go besides: a folder for ``python -m dmoe.report``, or others that :func:`dmoe.monitor` takes.
        limits: from where on it warns; None is ``Limits()``.
        move_bias: False leaves the selection biases to the module.

    Attributes:
        last: the last :class:`dmoe.monitoring.StepRecord`, or None.

    Raises:
        ValueError: when training starts, a module without MoE layers.
    """

    def __init__(
        self, every: int | None = None, *, to: Any = None, limits: Limits | None = None, move_bias: bool = True
    ) -> None:
        self._every, self._options = every, {"to": to, "limits": limits, "move_bias": move_bias}
        self._loop: LoopMonitor | None = None
        self._steps = self._begun = 0
        self.last: Any = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Put the monitor's hooks in."""
        self._steps = trainer.global_step  # which several optimizers count several times: from here on we count
        every = self._every if self._every is not None else trainer.log_every_n_steps or 50
        self._loop = LoopMonitor(pl_module, every=every, **self._options)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """The first micro batch of a step begins it."""
        assert self._loop is not None
        self._begun = trainer.global_step
        self._loop.begin(self._steps + 1)  # the Trainer logs where this is a multiple

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        """Attached losses are scaled as the loss has been."""
        if self._loop is not None:
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            self._loop.scale_losses(trainer.accumulate_grad_batches, scaler)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """The micro batch with which the optimizer stepped ends the step."""
        assert self._loop is not None
        if trainer.global_step == self._begun:
            return
        self._steps += 1
        record = self._loop.end()
        if record is None:
            return
        self.last = record
        pl_module.log_dict(numbers(record))
        if trainer.is_global_zero and record.layers:
            draw(record, [board for logger in trainer.loggers if (board := _board_of(logger)) is not None])

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Take the hooks out."""
        self._close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Take the hooks out: the Trainer does not call ``teardown`` then."""
        self._close()

    def _close(self) -> None:
        if self._loop is not None:
            self._loop.close()
            self._loop = None


def _board_of(logger: Any) -> Any:
    """What takes images of a logger: itself as that of W&B, TensorBoard's writer; None where there is nothing."""
    if hasattr(logger, "log_image"):
        return logger
    experiment = getattr(logger, "experiment", None)
    return experiment if hasattr(experiment, "add_image") else None
