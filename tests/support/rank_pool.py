"""Processes that form a gloo group and take many jobs: a rank costs seconds to start, a job milliseconds."""

from __future__ import annotations

import contextlib
import datetime
import io
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from multiprocessing.connection import wait
from unittest.mock import patch

import compiling
import torch
import torch.distributed as dist
from patience import GRACE, PATIENCE

GIVEN_UP = f"waiting {PATIENCE * 1000:.0f}ms"  # gloo, of a call that nobody answered to the last


def pack(value):
    """To bytes, by torch.save: plain pickle has no float8."""
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def unpack(data):
    return torch.load(io.BytesIO(data), weights_only=False)


class RankError(Exception):
    """What went wrong on which ranks: ``.by_rank`` maps a rank to its exception's type and text."""

    def __init__(self, by_rank):
        self.by_rank = by_rank
        super().__init__("\n".join(f"rank {rank}: {text}" for rank, (_, text) in by_rank.items()))


def _one_loop_for_all_groups():
    """Groups of this process share the thread that looks after gloo's connections, which looks 100 times a second.

    A pool's jobs make some hundred groups, which PyTorch keeps until the process ends: a thread each would take most of
    a core from the tests, with nothing to do.
    """
    device, make = dist.ProcessGroupGloo.create_default_device(), dist.ProcessGroupGloo.__init__

    def init(self, store, rank, size, timeout):
        options = dist.ProcessGroupGloo._Options()
        options._devices, options._timeout = [device], timeout
        make(self, store, rank, size, options)

    dist.ProcessGroupGloo.__init__ = init  # not a class of our own: PyTorch sets the timeout of this one's groups alone


def _serve(rank, world, store, pipe):
    torch.set_num_threads(1)
    _one_loop_for_all_groups()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # as in conftest: memory nobody wrote is NaN
    limit = datetime.timedelta(seconds=PATIENCE)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=limit)
    groups = {world: dist.group.WORLD}
    for size in (1, 2):
        if size < world and world % size == 0:
            members = [list(range(first, first + size)) for first in range(0, world, size)]
            mine = [dist.new_group(ranks, timeout=limit) for ranks in members]
            groups[size] = mine[rank // size]
    while True:
        with contextlib.suppress(EOFError):
            job = pipe.recv_bytes()
            if job:
                function, size, arguments = unpack(job)
                torch.manual_seed(0)  # what ranks draw does not depend on the jobs before, nor does it differ
                try:
                    answer = (True, function(groups[size], *arguments) if rank < size else None)
                except Exception as error:
                    kind = "hung" if GIVEN_UP in str(error) else type(error).__name__
                    answer = (False, (kind, f"{error}\n{traceback.format_exc()}"))
                compiling.forget()  # as conftest does after a test
                pipe.send_bytes(pack(answer))
                continue
        os._exit(0)  # gloo's own shutdown may wait for ranks that are gone


class RankPool:
    """``world`` processes, started by the first job, and again by the next one after a job that broke the group.

    A job is a function of an importable module, ``function(group, *arguments)``; all ranks begin it with one seed.

    Args:
        world: ranks.
    """

    def __init__(self, world):
        self._world = world
        self._pipes, self._processes, self._folder = [], [], None

    def _start(self):
        # One process imports torch, and every rank is a fork of it: four imports would take most of the tests' time.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["rank_jobs"])
        self._folder = tempfile.TemporaryDirectory()
        store = os.path.join(self._folder.name, "store")
        for rank in range(self._world):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self._world, store, there), daemon=True)
            with patch.dict(os.environ, {"PYTHONPATH": os.pathsep.join(sys.path)}):  # for the preloading
                process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)

    def run(self, function, *arguments, ranks=None):
        """The function's result on each of the first ``ranks`` ranks (default: all), which form a group.

        Raises:
            RankError: any rank raised, died (``"died"``), or did not answer, or waited for another one to the last
                (``"hung"``): see ``patience.py``.
        """
        if not self._processes:
            self._start()
        ranks = self._world if ranks is None else ranks
        job = pack((function, ranks, arguments))
        for pipe in self._pipes:
            pipe.send_bytes(job)
        results, errors = [None] * self._world, {}
        open_pipes = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        deadline = time.monotonic() + PATIENCE + GRACE  # collectives give up first, and say so
        while open_pipes and (ready := wait(list(open_pipes), max(deadline - time.monotonic(), 0))):
            for pipe in ready:
                rank = open_pipes.pop(pipe)
                try:
                    fine, answer = unpack(pipe.recv_bytes())
                except (EOFError, ConnectionResetError):
                    fine, answer = False, ("died", "")
                if fine:
                    results[rank] = answer
                else:
                    errors[rank] = answer
                    deadline = min(deadline, time.monotonic() + GRACE)  # the others may wait for this one for ever
        errors |= dict.fromkeys(open_pipes.values(), ("hung", "no answer"))
        gone = any(kind == "died" for kind, _ in errors.values())
        if errors and (open_pipes or gone or len(errors) < ranks):
            self.close()  # ranks that did not fail together have left the group out of step
        if errors:
            raise RankError(dict(sorted(errors.items())))
        return results[:ranks]

    def close(self):
        for process in self._processes:
            if process.is_alive():  # the number of one that has ended may be another's by now
                process.kill()
        for process in self._processes:
            process.join()
        if self._folder is not None:
            self._folder.cleanup()
        self._pipes, self._processes, self._folder = [], [], None
