"""``--record-a2a-perf-stats``: the time that a layer spends in its exchange between ranks."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


class ExchangeTimer:
    """Time a layer spends in dispatch and combine, for ``--record-a2a-perf-stats``.

    Host time is measured around the calls, packing and waiting included; device time by CUDA events around them.

    Args:
        dispatcher: an ``AllToAllDispatcher``, whose calls are timed from now on.
    """

    _CALLS = ("start_dispatch", "finish_dispatch", "combine")

    def __init__(self, dispatcher: Any) -> None:
        self._host, self._events = 0.0, list[tuple[Any, Any]]()
        for name in self._CALLS:
            setattr(dispatcher, name, self._timed(getattr(dispatcher, name)))

    def take(self) -> tuple[float, float]:
        """Milliseconds of the host and of the device since the last call; waits for the device."""
        host, events = self._host, self._events
        self._host, self._events = 0.0, []
        if not events:
            return host, 0.0
        torch.cuda.synchronize()
        return host, sum(start.elapsed_time(end) for start, end in events)

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            on_device = torch.cuda.is_available() and torch.cuda.is_initialized()
            events = tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) if on_device else None
            start = time.perf_counter()
            if events:
                events[0].record()
            result = call(*args, **kwargs)
            if events:
                events[1].record()
                self._events.append((events[0], events[1]))
            self._host += 1000 * (time.perf_counter() - start)
            return result

        return timed
