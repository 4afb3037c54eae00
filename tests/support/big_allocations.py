"""Who makes tensors as large as all experts, and by how much a process's memory grows."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class BigAllocations(TorchDispatchMode):
    """Names of operations, dmoe's own only if asked for, whose results are new memory of at least so many bytes."""

    def __init__(self, size, *known, own=False):
        super().__init__()
        self.own = own
        self.size, self.known, self.found = size, {tensor.untyped_storage().data_ptr() for tensor in known}, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for tensor in results if isinstance(results, tuple | list) else (results,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes() >= self.size:
                storage = tensor.untyped_storage().data_ptr()
                if storage not in self.known and (self.own or not str(func).startswith("dmoe.")):
                    self.found.append(str(func))
                self.known.add(storage)
        return results


class Peak:
    """Bytes by which this process's memory was larger than at the beginning, at most; counts what C++ takes as well.

    What was freed before goes back to the system first: who took that again would not be seen to take anything.
    """

    def __enter__(self):
        if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc's
            trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        self.before = self._read("VmRSS")
        return self

    def __exit__(self, *error):
        self.bytes = self._read("VmHWM") - self.before

    @staticmethod
    def _read(name):
        status = Path("/proc/self/status").read_text()
        return int(re.search(rf"{name}:\s+(\d+) kB", status)[1]) * 1024


def peaks_can_be_read():
    """Whether :class:`Peak` works here."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True
