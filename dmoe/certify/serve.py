"""The process that certifies for others: a job is a file's name on a line of stdin, the answer a line of JSON."""

from __future__ import annotations

import concurrent.futures
import json
import multiprocessing
import os
import select
import signal
import sys
from typing import Any

import torch

from dmoe.certify.checks import PARTS, certify
from dmoe.certify.draw import Draw

IDLE = 30.0  # seconds without a job, after which it ends, and gives its memory back


def serve(device: torch.device, answers: int) -> None:
    """Answer until stdin ends, nobody asks any more, or a kernel leaves the device unusable."""
    os.environ["DMOE_CERTIFY"], full = "0", os.environ.get("DMOE_CERTIFY") == "full"
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]  # outputs begin as NaN
    pool = _compilers() if device.type == "cuda" else None  # forked before this process touches the device
    os.write(answers, b"ready\n")
    while select.select([sys.stdin], [], [], IDLE)[0]:
        line = sys.stdin.buffer.readline()
        if not line:
            break
        job = torch.load(line.decode().strip(), weights_only=False)
        answer = answered(job, device, pool, draws=3 if full else 1)
        os.write(answers, (json.dumps(answer) + "\n").encode())
        if answer["ends"]:
            break
    # A device that a kernel broke hangs in its destructors, and nobody would end the compilers.
    if pool is not None and os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(0)


def answered(job: dict[str, Any], device: torch.device, pool: Any, *, draws: int) -> dict[str, Any]:
    """The verdict on one job: why it is refused, whether that lasts, and whether this process has to end."""
    part, arguments, extra = job["part"], job["arguments"], job["extra"]
    try:
        _take_launch_shapes(job)
        if pool is not None and part_needs_kernels(part):
            capability = _capability(device)
            futures = [
                pool.submit(compile_share, job, capability, i, pool._max_workers) for i in range(pool._max_workers)
            ]
            for future in futures:
                future.result()
        reason = certify(part, arguments, extra, device, draws=draws)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except torch.OutOfMemoryError as error:
        return {"refused": f"not enough memory to certify it: {_short(error)}", "lasting": False, "ends": True}
    except Exception as error:
        return {"refused": _short(error), "lasting": True, "ends": True}
    return {"refused": reason, "lasting": True, "ends": bool(reason)}


def _short(error: BaseException) -> str:
    words = str(error).strip().splitlines()
    return f"{type(error).__name__}: {words[0] if words else ''}"[:300]


def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _compilers() -> concurrent.futures.ProcessPoolExecutor:
    workers = max(1, min(16, os.cpu_count() or 1))
    pool = concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("fork"))
    barrier = [pool.submit(_nothing) for _ in range(4 * workers)]
    concurrent.futures.wait(barrier)
    return pool


def _nothing() -> None:
    return None


def _take_launch_shapes(job: dict[str, Any]) -> None:
    """Those that the asking process has measured."""
    if part_needs_kernels(job["part"]):
        from dmoe.kernels import configs

        configs.replace_measured(job["launch_shapes"])


def part_needs_kernels(part: str) -> bool:
    """Whether Triton's kernels are in it; without Triton csrc/'s operations are certified all the same."""
    return part != "compiled"


def compile_share(job: dict[str, Any], capability: int, index: int, count: int) -> None:
    """Every count-th kernel of a job into Triton's cache, from shapes alone; errors are for the run to meet."""
    from dmoe.kernels.offline import compiling

    _take_launch_shapes(job)
    with compiling(capability, share=(index, count)):
        try:
            for run in PARTS[job["part"]](job["arguments"], Draw(torch.device("meta"), 0), *job["extra"]):
                run.kernel(*run.arguments)
        except Exception:  # what does not compile is met again by the run, and told
            return


__all__ = ["answered", "serve"]
