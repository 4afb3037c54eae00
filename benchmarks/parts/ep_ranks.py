"""Processes that form a group and are told what to do all at once; a failure says which rank and why."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import wait
from typing import Any
from unittest.mock import patch

from parts.workers import _serve

# glibc gives large tensors back to the system when they are freed, and every step pays for their pages anew: the more
# the larger they are, which is not what is to be compared here. With these it keeps them, as PyTorch does on a GPU.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**34), "MALLOC_TOP_PAD_": str(2**28)}


class RankFailedError(Exception):
    """A rank raised, ended or did not answer; the message has each such rank and its traceback."""


class Ranks:
    """``factory(rank, world, folder)`` in ``world`` processes of their own.

    Args:
        factory: importable by name, as ``multiprocessing`` wants it.
        world: ranks.
        threads: PyTorch's threads in each.
        limit: seconds in which a call has to answer.
        grace: seconds that the others have left once one has failed: they soon fail too, or wait for it.
        environment: variables of the new processes, beside those of this one.
    """

    def __init__(
        self,
        factory: Callable[..., Any],
        world: int,
        *,
        threads: int,
        limit: float,
        grace: float = 10.0,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._folder, self._limit, self._grace = tempfile.TemporaryDirectory(), limit, grace
        self._pipes, self._processes = [], []
        context = multiprocessing.get_context("spawn")
        for rank in range(world):
            here, there = context.Pipe()
            arguments = (there, factory, (rank, world, self._folder.name), threads)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            with patch.dict(os.environ, environment or {}):
                process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *error: object) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(0.5)
            if process.is_alive():  # gloo's shutdown may wait for a rank that is gone
                process.kill()
                process.join()
        self._folder.cleanup()

    def call(self, method: str, *args: Any) -> list[Any]:
        """The method's result on every rank, in their order.

        Raises:
            RankFailedError: any rank raised, ended, or did not answer in time; the ranks are of no use then.
        """
        results: list[Any] = [None] * len(self._pipes)
        failed: dict[int, str] = {}
        for rank, pipe in enumerate(self._pipes):
            try:
                pipe.send((method, args))
            except OSError:
                failed[rank] = "the process has ended"
        open_pipes: dict[Any, int] = {pipe: rank for rank, pipe in enumerate(self._pipes) if rank not in failed}
        deadline = time.monotonic() + self._limit
        while open_pipes and (ready := wait(list(open_pipes), max(deadline - time.monotonic(), 0))):
            for there in ready:
                rank = open_pipes.pop(there)
                try:
                    succeeded, value = self._pipes[rank].recv()
                except (EOFError, OSError):
                    self._processes[rank].join(self._grace)  # its end of the pipe is closed: it is ending
                    succeeded, value = False, f"the process ended, exit code {self._processes[rank].exitcode}"
                if succeeded:
                    results[rank] = value
                else:
                    failed[rank] = value
                    deadline = min(deadline, time.monotonic() + self._grace)
        failed |= dict.fromkeys(open_pipes.values(), f"no answer to {method}")
        if failed:
            told = "\n".join(f"rank {rank} of {len(self._pipes)}: {why}" for rank, why in sorted(failed.items()))
            raise RankFailedError(f"{method} failed:\n{told}")
        return results
