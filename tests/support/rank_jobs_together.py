"""Ranks that write files together, and are killed or fail at a point in between."""

from __future__ import annotations

import datetime
import errno
import os
import signal
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from patience import PATIENCE

from dmoe.checkpoint import together, write_together

NAMES = ("ck-rank-0.pt", "ck-rank-1.pt", "ck-shared.pt")


def files_of(folder, rank, value):
    """What a rank writes: its own file and, on the first, the shared one."""
    names = [NAMES[rank], NAMES[2]] if rank == 0 else [NAMES[rank]]
    return {Path(folder) / name: {"value": torch.full((256,), value), "name": name} for name in names}


@contextmanager
def stages(at):
    """Call ``at`` in the middle of each file, before each step on files or folders, and before each talk of ranks."""
    fill, talk, active = together._fill, dist.all_gather_object, True

    def filling(file, content):
        if isinstance(content, os.PathLike):  # a copy
            return fill(file, content)
        file.write(b"half")
        file.flush()
        at("half a file")
        file.seek(0)
        file.truncate()
        return fill(file, content)

    def talking(*args, **kwargs):
        at("talk")
        talk(*args, **kwargs)
        at("talked")

    def hook(event, args):
        if active and event in ("os.rename", "os.remove", "os.symlink"):
            at(event)
        elif active and event == "open" and str(args[0]).endswith((".part", ".draft")):
            at(f"open {args[1]}")

    sys.addaudithook(hook)
    try:
        with patch.object(together, "_fill", filling), patch.object(dist, "all_gather_object", talking):
            yield
    finally:
        active = False


def process(rank, folder, store, value, kill, pipe):
    """A rank of two in a process of its own, that kills itself at stage ``kill`` of all. The stages it came to."""
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=PATIENCE)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=limit)
    pipe.send("connected")
    pipe.recv()  # a rank killed at its first stage would else fail the other one, which still connects to it
    seen = []

    def at(stage):
        if len(seen) == kill:
            os.kill(os.getpid(), signal.SIGKILL)
        seen.append(stage)

    outcome = "written"
    try:
        with stages(at):
            write_together(Path(folder) / "ck", files_of(folder, rank, value), group=dist.group.WORLD, overwrite=True)
    except Exception as error:
        outcome = f"{type(error).__name__}: {error}"
    pipe.send((seen, outcome))
    os._exit(0)  # gloo's own shutdown may wait for ranks that are gone


def fail(group, folder, value, where, stage):
    """Write where rank ``where`` finds the disk full at a stage; what is told, on each rank."""
    rank = dist.get_rank(group)

    def at(reached):
        if rank == where and reached == stage:
            raise OSError(errno.ENOSPC, "No space left on device")

    try:
        with stages(at):
            write_together(Path(folder) / "ck", files_of(folder, rank, value), group=group, overwrite=True)
    except Exception as error:
        return type(error).__name__, str(error)
    return "written", ""


def killed_at(stage, act, *, times=1):
    """Whether ``act`` came to a stage for the so-manieth time, where its process, a fork, ends as if by SIGKILL."""
    left = [times]

    def at(reached):
        left[0] -= reached == stage
        if left[0] == 0:
            os._exit(9)

    child = os.fork()
    if child == 0:
        try:
            with stages(at):
                act()
            os._exit(0)
        finally:
            os._exit(1)  # whatever went wrong: the tests go on in the other process alone
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9)
    return status == 9
