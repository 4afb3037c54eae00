"""The monitor: hooks on a model's layers, steps that a loop marks, and one record for every ``every``-th of them."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dmoe.metric_sums import num_ranks
from dmoe.model_tools import moe_layers
from dmoe.monitoring.alarms import Alarms, Limits
from dmoe.monitoring.clocks import Clock, Clocks
from dmoe.monitoring.layer_watch import LayerWatch, inside_backward
from dmoe.monitoring.records import StepRecord
from dmoe.monitoring.similarity import expert_similarity
from dmoe.monitoring.step_sums import layer_records
from dmoe.monitoring.token_counts import TokenCounts, TokenTable
from dmoe.monitoring.writers import Writer, writers_of
from dmoe.parallel import as_group


class Monitor:
    """What :func:`dmoe.monitor` returns; see there.

    Attributes:
        last: the last :class:`StepRecord`, or None.
        tokens: the last :class:`TokenTable`, which steps with ``token_ids`` make, or None.
        warnings: every warning so far, as sentences.
    """

    def __init__(
        self,
        model: nn.Module,
        to: Any = None,
        *,
        every: int = 10,
        group: Any = None,
        similarity_every: int = 100,
        most_tokens: int = 64,
        limits: Limits | None = None,
    ) -> None:
        self._layers = _layers_of(model)
        for name, value in (("every", every), ("similarity_every", similarity_every), ("most_tokens", most_tokens)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"monitor: {name}: expected an integer of at least 1, got {value!r}")
        self._model, self._every, self._similarity_every = model, every, similarity_every
        self._group = None if group is None else as_group(group, "monitor: group")
        self._makers, self._writers = writers_of(to), list[Writer]()
        self._clocks = Clocks()
        self._watches = {
            name: LayerWatch(name, layer, self._clocks, self._routed) for name, layer in self._layers.items()
        }
        self._token_counts = TokenCounts(
            {n: layer.config.num_experts for n, layer in self._layers.items()}, most_tokens
        )
        self._alarms = Alarms(limits or Limits(), {name: layer.config.top_k for name, layer in self._layers.items()})
        self.last: StepRecord | None = None
        self.tokens: TokenTable | None = None
        self.warnings: list[str] = []
        self._handles: list[Any] = []
        self._step: int | None = None  # the number of the step that is open
        self._next = 0
        self._recording = False
        self._measured: int | None = None  # the step of the last similarity
        self._clock: Clock | None = None  # of the step
        self._begun: Any = None
        self._parts: list[tuple[str, Any, Any]] = []

    # ------------------------------------------------------------------------------------------------------ lifetime

    def start(self) -> Monitor:
        """Put the hooks in. ``with monitor:`` does it, too.

        Raises:
            RuntimeError: they are in already.
        """
        if self._handles:
            raise RuntimeError("Monitor.start: expected a monitor that is not running, got one that is")
        if self._rank == 0:
            about = {
                "started": time.time(),
                "ranks": num_ranks(self._group),
                "every": self._every,
                "layers": {
                    name: {"num_experts": layer.config.num_experts, "top_k": layer.config.top_k}
                    for name, layer in self._layers.items()
                },
            }
            self._writers = [make(about) for make in self._makers]
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
        writers, self._writers = self._writers, []
        for writer in writers:
            writer.close()

    @property
    def _rank(self) -> int:
        return dist.get_rank(self._group) if num_ranks(self._group) > 1 else 0

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
            ValueError, TypeError: a number below 0; ids that are no tensor of integers.
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
        recording = number % self._every == 0
        self._token_counts.begin(token_ids if recording else None)
        self._step, self._next, self._recording = number, number + 1, recording
        for watch in self._watches.values():
            watch.begin(recording)
        if recording:
            self._clock = self._clocks.of(next(self._model.parameters()).device)
            self._begun = self._clock.now()

    def end_step(self) -> StepRecord | None:
        """The step is over, on every rank; call it after backward and the optimizer.

        Returns:
            The step's record, over all ranks, if it is an ``every``-th one: one all-reduce, for which the host waits.

        Raises:
            RuntimeError: no step is open.
        """
        if self._step is None:
            raise RuntimeError("Monitor.end_step: expected begin_step() first, got no step that is open")
        number, clock = self._step, self._clock
        if clock is None:
            self._drop()
            return None
        ended = clock.now()
        for watch in self._watches.values():
            if not watch.metrics:  # compiled, in a model whose own hooks are compiled with it
                watch.take()
        to_sum = self._token_counts.to_sum(self._rank)
        layers, tokens, sums = layer_records(self._watches, self._similarities(number), self._group, to_sum)
        parts: dict[str, float] = {}
        for name, first, second in self._parts:
            parts[name] = parts.get(name, 0.0) + clock.between(first, second)
        unread = [name for name, watch in self._watches.items() if watch.metrics and watch.layer.auxiliary.is_unread]
        said = self._alarms.of(number, layers, unread)
        self.last = record = StepRecord(number, clock.between(self._begun, ended), parts, tokens, layers, tuple(said))
        self._drop()
        self._tell(record, self._token_counts.summed(number, sums))
        return record

    def _tell(self, record: StepRecord, table: TokenTable | None) -> None:
        self.warnings += record.warnings
        self.tokens = table or self.tokens
        for writer in self._writers:
            writer.write(record)
            if table is not None:
                writer.write_tokens(table)
        for sentence in record.warnings if self._rank == 0 else ():
            warnings.warn(f"dmoe: {sentence}", stacklevel=5)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A part of a step by any name, such as "forward", "backward", "optimizer": its seconds are in the record."""
        clock = self._clock
        if clock is None:
            yield
            return
        first = clock.now()
        yield
        self._parts.append((name, first, clock.now()))

    def _drop(self) -> None:
        """No step is open any more."""
        self._step, self._recording, self._clock, self._begun, self._parts = None, False, None, None, []
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

    def _routed(self, watch: LayerWatch, chosen: Tensor | None, tokens: int) -> None:
        self._token_counts.count(watch.name, chosen, tokens)


def _layers_of(model: nn.Module) -> dict[str, Any]:
    if isinstance(model, nn.DataParallel):
        raise ValueError("monitor: model: expected no nn.DataParallel, whose replicas run at once, got one")
    found = moe_layers(model) if isinstance(model, nn.Module) else {}
    if not found:
        raise ValueError(
            f"monitor: model: expected an nn.Module with dmoe.MoE layers, got {type(model).__name__} without any"
        )
    return dict(found)
