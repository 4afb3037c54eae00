"""One process for each contestant, so that none sees what another left behind.

oneDNN keeps the code that it generates for each shape of a bfloat16 product in one cache per process (1024 entries):
in a shared process a contestant would find shapes that a rival paid for, or lose its own to one. The same holds for
the allocator's free blocks. The processes take turns: only one computes at a time.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parts.harness import require_close


class WorkerError(Exception):
    """A call in the other process raised; the message is its traceback."""


class Worker:
    """``factory(*args)`` in a process of its own; :meth:`call` runs one of its methods and waits.

    Args:
        factory: importable by name, as ``multiprocessing`` wants it.
        *args: its arguments; they must pickle.
        threads: PyTorch's threads in that process.
    """

    def __init__(self, factory: Callable[..., Any], *args: Any, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, factory, args, threads), daemon=True)
        self._process.start()
        there.close()

    def call(self, method: str, *args: Any) -> Any:
        """The method's result, which must pickle.

        Raises:
            WorkerError: it raised, or the process ended (killed for memory, say).
        """
        try:
            self._connection.send((method, args))
            succeeded, value = self._connection.recv()
        except (EOFError, OSError) as error:
            self._process.join(1)
            raise WorkerError(f"the process ended during {method}, exit code {self._process.exitcode}") from error
        if not succeeded:
            raise WorkerError(value)
        return value

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join(5)
        if self._process.is_alive():
            self._process.terminate()


def _serve(connection: Connection, factory: Callable[..., Any], args: tuple[Any, ...], threads: int) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here needs a download, so nothing may wait for one
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler says on stderr that it starts and stops
    torch.set_num_threads(threads)
    served = None
    while True:
        try:
            method, arguments = connection.recv()
        except (EOFError, OSError):
            return
        try:
            served = served if served is not None else factory(*args)
            answer = (True, getattr(served, method)(*arguments))
        except Exception:
            answer = (False, traceback.format_exc())
        connection.send(answer)


def worst_errors(
    where: str, workers: Mapping[str, Worker], reference: Callable[[int], dict[str, Tensor]], tolerance: float
) -> dict[str, dict[str, float]]:
    """Every contestant against the truth, for two seeds, before anything is timed.

    Args:
        where: benchmark and case, for messages.
        workers: contestants with a method ``errors(seed, path)``, whose processes read the truth from a file.
        reference: the truth of a seed.
        tolerance: of the relative norm.

    Returns:
        The larger error of the two, by contestant and tensor.

    Raises:
        CheckError: one is off.
    """
    worst: dict[str, dict[str, float]] = {name: {} for name in workers}
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "reference.pt")
        for seed in (0, 1):
            torch.save(reference(seed), path)
            for name, worker in workers.items():
                found = worker.call("errors", seed, path)
                require_close(f"{where}, seed {seed}: {name}", found, tolerance)
                worst[name] = {key: max(value, worst[name].get(key, 0.0)) for key, value in found.items()}
    return worst
