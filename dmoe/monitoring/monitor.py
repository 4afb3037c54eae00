"""The monitor: hooks on a model's layers, steps that a loop marks, and one record for every ``every``-th of them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dmoe.metric_sums import num_ranks
from dmoe.model_tools import moe_layers
from dmoe.monitoring.clocks import Clock, Clocks
from dmoe.monitoring.layer_watch import LayerWatch, inside_backward
from dmoe.monitoring.records import StepRecord
from dmoe.monitoring.similarity import expert_similarity
from dmoe.monitoring.step_sums import layer_records
from dmoe.parallel import as_group


class Monitor:
    """What :func:`dmoe.monitor` returns; see there.

    Attributes:
        last: the last :class:`StepRecord`, or None.
        warnings: every warning so far, as sentences.
    """

    def __init__(
        self, model: nn.Module, to: Any = None, *, every: int = 1, group: Any = None, similarity_every: int = 100
    ) -> None:
        for name, value in (("every", every), ("similarity_every", similarity_every)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"monitor: {name}: expected an integer of at least 1, got {value!r}")
        self._layers = _layers_of(model)
        self._model, self._every, self._similarity_every = model, every, similarity_every
        self._group = None if group is None else as_group(group, "monitor: group")
        self.last: StepRecord | None = None
        self.warnings: list[str] = []
        self._clocks = Clocks()
        self._watches = {name: LayerWatch(layer, self._clocks, self._routed) for name, layer in self._layers.items()}
        self._handles: list[Any] = []
        self._step: int | None = None  # the number of the step that is open
        self._next = 0
        self._recording = False
        self._measured: int | None = None  # when similarity was
        self._marks: tuple[Clock, Any] | None = None
        self._parts: list[tuple[str, Any, Any]] = []

    # ------------------------------------------------------------------------------------------------------ lifetime

    def start(self) -> Monitor:
        """Put the hooks in. ``with monitor:`` does it, too.

        Raises:
            RuntimeError: they are in already.
        """
        if self._handles:
            raise RuntimeError("Monitor.start: expected a monitor that is not running, got one that is")
        self._handles = [
            self._model.register_forward_pre_hook(self._model_begins),
            self._model.register_forward_hook(self._model_ends),
        ]
        for watch in self._watches.values():
            self._handles += watch.start()
        return self

    def close(self) -> None:
        """Take the hooks out and close the files; a step that is open is dropped. Talks to no other rank."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._drop()

    def __enter__(self) -> Monitor:
        return self if self._handles else self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    # --------------------------------------------------------------------------------------------------------- steps

    @contextmanager
    def step(self, number: int | None = None, *, token_ids: Tensor | None = None) -> Iterator[None]:
        """One step of the loop: what the model does inside is one record. See :meth:`begin_step`.

        A step that raises is dropped.
        """
        self.begin_step(number, token_ids=token_ids)
        try:
            yield
        except BaseException:
            self._drop()
            raise
        self.end_step()

    def begin_step(self, number: int | None = None, *, token_ids: Tensor | None = None) -> None:
        """A step begins, on every rank.

        Args:
            number: of the step, at least 0; None is one more than the last, from 0.
            token_ids: integers, one for each token of the batch in the order in which the forwards take them.

        Raises:
            RuntimeError: the monitor is not running, or a step is open.
        """
        if not self._handles:
            raise RuntimeError(
                "Monitor.begin_step: expected a running monitor (with monitor:, or start()), got a closed one"
            )
        if self._step is not None:
            raise RuntimeError(f"Monitor.begin_step: expected end_step() for step {self._step} first, which is open")
        number = self._next if number is None else number
        if isinstance(number, bool) or not isinstance(number, int) or number < 0:
            raise ValueError(f"Monitor.begin_step: number: expected an integer of at least 0, got {number!r}")
        self._step, self._next = number, number + 1
        self._recording = number % self._every == 0
        for watch in self._watches.values():
            watch.begin(self._recording)
        if self._recording:
            self._parts = []
            clock = self._clocks.of(next(self._model.parameters()).device)
            self._marks = clock, clock.now()

    def end_step(self) -> StepRecord | None:
        """The step is over, on every rank; call it after backward and the optimizer.

        Returns:
            The step's record, over all ranks, if it is an ``every``-th one: one all-reduce, for which the host waits.

        Raises:
            RuntimeError: no step is open.
        """
        if self._step is None:
            raise RuntimeError("Monitor.end_step: expected begin_step() first, got no step that is open")
        number = self._step
        if not self._recording or self._marks is None:
            self._drop()
            return None
        clock, begun = self._marks
        ended = clock.now()
        for watch in self._watches.values():
            if not watch.metrics:  # compiled, below a model whose hooks are compiled, too
                watch.take()
        similarities = self._similarities(number)
        layers, tokens, _ = layer_records(self._watches, similarities, self._group)
        parts: dict[str, float] = {}
        for name, first, second in self._parts:
            parts[name] = parts.get(name, 0.0) + clock.between(first, second)
        self.last = record = StepRecord(number, clock.between(begun, ended), parts, tokens, layers)
        self._drop()
        return record

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A part of a step by any name, such as "forward", "backward", "optimizer": its seconds are in the record."""
        if not self._recording or self._marks is None:
            yield
            return
        clock = self._marks[0]
        first = clock.now()
        yield
        self._parts.append((name, first, clock.now()))

    def _drop(self) -> None:
        """No step is open any more."""
        self._step, self._recording, self._marks, self._parts = None, False, None, []
        for watch in self._watches.values():
            watch.begin(False)
        self._clocks.forget()

    def _similarities(self, number: int) -> dict[str, Tensor]:
        """Of the layers' experts, in the first recorded step and wherever ``similarity_every`` steps have passed."""
        due = self._measured is None or number // self._similarity_every != self._measured // self._similarity_every
        if not due:
            return {}
        self._measured = number
        found = {name: expert_similarity(layer.experts) for name, layer in self._layers.items()}
        return {name: value for name, value in found.items() if value is not None}

    # --------------------------------------------------------------------------------------------------------- hooks

    def _model_begins(self, model: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling() and self._recording and not inside_backward():
            for watch in self._watches.values():
                watch.skip()

    def _model_ends(self, model: nn.Module, args: Any, y: Any) -> None:
        if not torch.compiler.is_compiling() and self._recording and not inside_backward():
            for watch in self._watches.values():
                watch.take()

    def _routed(self, watch: LayerWatch, chosen: Tensor | None) -> None:
        pass


def _layers_of(model: nn.Module) -> dict[str, Any]:
    if isinstance(model, nn.DataParallel):
        raise ValueError("monitor: model: expected no nn.DataParallel, whose replicas run at once, got one")
    found = moe_layers(model) if isinstance(model, nn.Module) else {}
    if not found:
        raise ValueError(
            f"monitor: model: expected an nn.Module with dmoe.MoE layers, got {type(model).__name__} without any"
        )
    return dict(found)
