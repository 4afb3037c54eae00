"""Clocks: a GPU's events are made once, recorded in its current stream, and waited for only when they are read."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from dmoe.monitoring.clocks import Clocks, HostClock, StreamClock


class Event:
    """``torch.cuda.Event`` of a device that counts milliseconds."""

    made = 0
    now = 0.0

    def __init__(self, enable_timing):
        assert enable_timing
        Event.made += 1
        self.done = False

    def record(self, stream):
        assert stream.device == torch.device("cuda", 1)
        Event.now += 5
        self.at, self.done = Event.now, False

    def synchronize(self):
        self.done = True

    def elapsed_time(self, other):
        assert other.done
        return other.at - self.at


def test_a_stream_clock_records_the_same_events_in_each_step(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(device=device))
    clocks = Clocks()
    clock = clocks.of(torch.device("cuda", 1))
    assert isinstance(clock, StreamClock)
    assert clocks.of(torch.device("cuda", 1)) is clock
    for _ in range(3):
        first, second, third = clock.now(), clock.now(), clock.now()
        assert not any(each.done for each in (first, second, third))
        assert clock.between(first, third) == pytest.approx(0.01)
        assert clock.between(second, third) == pytest.approx(0.005)
        clocks.forget()
    assert Event.made == 3


def test_the_hosts_clock():
    clock = Clocks().of(torch.device("cpu"))
    assert isinstance(clock, HostClock)
    first, second = clock.now(), clock.now()
    assert clock.between(first, second) >= 0
