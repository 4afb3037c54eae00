"""Where kernels are started: on the device of their tensors, and not at all for an empty grid."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dmoe.kernels._launch import launch


class Recorder:
    """Stands in for a kernel, and for the device that is current."""

    def __init__(self):
        self.current, self.started = 0, []

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.started.append((grid, self.current))

    @contextlib.contextmanager
    def device(self, index):
        before, self.current = self.current, index
        yield
        self.current = before


@pytest.mark.parametrize("index", [0, 1, 3])
def test_kernels_start_where_their_tensors_are(index, monkeypatch):
    """Triton would take the current device, and read another one's addresses there."""
    recorder = Recorder()
    monkeypatch.setattr(torch.cuda, "current_device", lambda: recorder.current)
    monkeypatch.setattr(torch.cuda, "device", recorder.device)
    with FakeTensorMode():
        tensor = torch.empty(3, device=f"cuda:{index}")
        launch(recorder, (5,), 7, None, tensor, num_warps=4)
    assert recorder.started == [((5,), index)]
    assert recorder.current == 0


def test_an_empty_grid_starts_nothing():
    recorder = Recorder()
    launch(recorder, (5, 0), torch.empty(3))
    launch(recorder, (1, 2), torch.empty(3))
    assert recorder.started == [((1, 2), 0)]
