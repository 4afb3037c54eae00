"""What callbacks of training loops share: a monitor around each optimizer step, and what follows the step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dmoe.metric_sums import num_ranks
from dmoe.model_tools import moe_layers, set_aux_loss_scale, update_selection_bias
from dmoe.monitoring.alarms import Limits
from dmoe.monitoring.heat_map import heat_map
from dmoe.monitoring.recorder import Monitor
from dmoe.monitoring.records import StepRecord
from dmoe.monitoring.writers import add_load_image, scalars


class LoopMonitor:
    """A running :class:`Monitor` for loops that say when a micro batch begins, and when the optimizer has stepped.

    Args:
        model: with MoE layers, the same on all ranks.
        every: record steps whose number is a multiple of this.
        to: where records go besides, see :func:`dmoe.monitor`.
        limits: from where on it warns.
        move_bias: whether each step ends with :func:`dmoe.update_selection_bias` over all ranks.

    Raises:
        ValueError: a model without MoE layers, or ``every`` below 1.
    """

    def __init__(
        self, model: nn.Module, *, every: int = 1, to: Any = None, limits: Limits | None = None, move_bias: bool = True
    ) -> None:
        self._model, self._move_bias, self._open = model, move_bias, False
        self._attached = any(layer.config.aux_loss == "attached" for layer in moe_layers(model).values())
        self.monitor = Monitor(model, to, every=every, limits=limits).start()

    def begin(self, number: int) -> None:
        """A micro batch begins; with the first one its step does, by this number."""
        if not self._open:
            self.monitor.begin_step(number)
            self._open = True

    def end(self) -> StepRecord | None:
        """The optimizer has stepped: biases move, and the step's record is made if it is an ``every``-th one."""
        self._open = False
        record = self.monitor.end_step()
        if self._move_bias:
            update_selection_bias(self._model, dist.group.WORLD if num_ranks(None) > 1 else None)
        return record

    def scale_losses(self, micro_batches: int, scaler: torch.amp.GradScaler | None) -> None:
        """Tell layers with ``aux_loss="attached"`` what the loop multiplies the task's loss by; others need nothing.

        Args:
            micro_batches: of a step, by whose number it is divided.
            scaler: of float16, or None.
        """
        if not self._attached:
            return
        scale = torch.ones((), device=next(self._model.parameters()).device) / micro_batches
        set_aux_loss_scale(self._model, scale if scaler is None else scaler.scale(scale))

    def close(self) -> None:
        """Take the hooks out; a step that is open is dropped."""
        self.monitor.close()
        self._open = False


def numbers(record: StepRecord) -> dict[str, float]:
    """A record's numbers by name, as loggers take them: ``moe/LAYER/entropy``, ``moe/step_seconds`` and so on."""
    return dict(scalars(record))


def draw(record: StepRecord, boards: Iterable[Any]) -> None:
    """The load of all layers as an image, ``moe/load``.

    Args:
        record: of the step.
        boards: each a ``SummaryWriter`` (``add_image``), or what takes arrays as Lightning's ``WandbLogger`` does
            (``log_image``).

    Raises:
        ImportError: TensorBoard's, without Pillow.
    """
    for board in boards:
        if hasattr(board, "add_image"):
            add_load_image(board, record)
        else:
            board.log_image("moe/load", [heat_map(record).numpy()], step=record.step)
