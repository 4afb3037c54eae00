"""Clocks: the host's, and a GPU's, whose hands are events in its stream that are read when the work is done."""

from __future__ import annotations

import time
from typing import Any, Protocol

import torch


class Clock(Protocol):
    """Marks of time now, and the seconds between two of them."""

    def now(self) -> Any:
        """A mark."""
        ...

    def between(self, first: Any, second: Any) -> float:
        """Seconds between two marks; it may wait for the device."""
        ...

    def forget(self) -> None:
        """No mark of before is looked at again."""
        ...


class HostClock:
    """``time.perf_counter``."""

    def now(self) -> float:
        """A mark."""
        return time.perf_counter()

    def between(self, first: float, second: float) -> float:
        """Seconds between two marks."""
        return second - first

    def forget(self) -> None:
        """Nothing is held."""


class StreamClock:
    """Events in a GPU's current stream: the host waits for none before it reads one.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._events: list[Any] = []  # made once, and recorded again in each step
        self._used = 0

    def now(self) -> Any:
        """An event behind all work that the current stream has been given."""
        if self._used == len(self._events):
            self._events.append(torch.cuda.Event(enable_timing=True))
        event = self._events[self._used]
        self._used += 1
        event.record(torch.cuda.current_stream(self.device))
        return event

    def between(self, first: Any, second: Any) -> float:
        """Seconds between two events, once the second has happened."""
        second.synchronize()
        return float(first.elapsed_time(second)) / 1e3

    def forget(self) -> None:
        """The events may be recorded again."""
        self._used = 0


class Clocks:
    """The clock of each device, made when it is first asked for."""

    def __init__(self) -> None:
        self._of: dict[str, Clock] = {}

    def of(self, device: torch.device) -> Clock:
        """Of such a device."""
        found = self._of.get(str(device))
        if found is None:
            found = self._of[str(device)] = StreamClock(device) if device.type == "cuda" else HostClock()
        return found

    def forget(self) -> None:
        """No mark of before is looked at again."""
        for clock in self._of.values():
            clock.forget()
