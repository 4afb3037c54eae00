"""Verdicts on kernels: asked of a process that a kernel may take down, and kept in the user's cache folder.

One file for each kind of machine: GPU, driver, torch, Triton and the sources of dmoe. Ranks that start together ask
once: who holds the lock certifies, and the others read.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmoe.ops._cache_folder import cache_folder
from dmoe.ops._trust import Subject, mode

START = 600.0  # seconds in which the process that certifies is there; it takes about four
LIMIT = 180.0  # seconds until a kernel that does not come back is said to hang; all of a subject's take a few
# What serves; it is told the device and where to answer.
SERVER = [sys.executable, "-m", "dmoe.certify", "--serve"]
_PACKAGE = Path(__file__).resolve().parent.parent


def certified(subjects: Sequence[Subject], device: torch.device) -> list[str]:
    """Why each is refused, ``""`` for what is trusted: from the file, or else certified now and written there."""
    with _locked(path_of(device)) as path:
        known = read(path)
        for subject in subjects:
            name = name_of(subject)
            if name not in known:
                reason, lasting = ask(subject, device)
                known[name] = {"part": subject.part, "subject": repr(subject.key), "refused": reason}
                if lasting:
                    write(path, known)
    return [known[name_of(subject)]["refused"] for subject in subjects]


def name_of(subject: Subject) -> str:
    """Of an entry in the file."""
    by_hand = os.environ.get("DMOE_GLUON", "")
    told = f"{mode()} {by_hand} {sorted(launch_shapes().items())!r} {subject.key!r}"
    return hashlib.sha256(told.encode()).hexdigest()[:24]


def launch_shapes() -> dict[str, Any]:
    """Measured ones, by name; see :mod:`dmoe.kernels.configs`."""
    from dmoe.ops._library import has_triton

    if not has_triton():
        return {}
    from dmoe.kernels import configs

    return dict(configs.measured())


def path_of(device: torch.device) -> Path:
    """The file of verdicts for a device."""
    return (
        cache_folder() or Path(os.devnull)
    ) / f"certified-{hashlib.sha256(machine(device).encode()).hexdigest()[:16]}.json"


@functools.cache
def machine(device: torch.device) -> str:
    """What a verdict holds for: GPU, driver, torch, Triton, and the sources of dmoe's kernels."""
    from dmoe.ops._library import has_triton

    triton = "absent"
    if has_triton():
        triton = __import__("triton").__version__
    gpu = device.type
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        gpu = f"{properties.name} sm_{properties.major}{properties.minor}"
    driver = Path("/proc/driver/nvidia/version")
    told = driver.read_text().splitlines()[0] if driver.exists() else ""
    return f"{gpu} | {told} | torch {torch.__version__} | triton {triton} | dmoe {_sources()}"


@functools.cache
def _sources() -> str:
    digest = hashlib.sha256()
    for room in ("kernels", "ops", "certify"):
        for path in sorted((_PACKAGE / room).glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def read(path: Path) -> dict[str, dict[str, str]]:
    """The verdicts in a file; none from a file that is not there, or is something else."""
    try:
        entries = json.loads(path.read_text())
        return {name: entry for name, entry in entries.items() if isinstance(entry["refused"], str)}
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return {}


def write(path: Path, entries: dict[str, dict[str, str]]) -> None:
    """The whole file or the one before it; nothing where the folder is not ours to write to."""
    with contextlib.suppress(OSError):
        partial = path.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps(entries, indent=1) + "\n")
        partial.replace(path)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[Path]:
    try:
        import fcntl

        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_suffix(".lock").open("a")
    except (OSError, ImportError):  # nowhere to write: every process certifies for itself
        yield path
        return
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield path


def ask(subject: Subject, device: torch.device) -> tuple[str, bool]:
    """Why it is refused, and whether that will be so tomorrow: a machine short of memory says nothing of a kernel."""
    try:
        return _server(str(device)).ask(subject)
    except OSError as error:
        return f"certifying did not start: {error}", False


@functools.cache
def _server(device: str) -> _Server:
    return _Server(device)


def close() -> None:
    """End the processes that certify."""
    for kept in list(_Server.running):
        kept.end()


class _Server:
    """A process that certifies, started when it is needed, and again after a kernel took it down."""

    running: list[_Server] = []  # noqa: RUF012  # all of them

    def __init__(self, device: str) -> None:
        self.device = device
        self.process: subprocess.Popen[bytes] | None = None
        self.answers = -1

    def _start(self) -> None:
        reading, writing = os.pipe()
        environment = {**os.environ, "DMOE_CERTIFY": "full" if mode() == "full" else "1"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(_PACKAGE.parent), os.environ.get("PYTHONPATH"))))
        try:
            self.process = subprocess.Popen(
                [*SERVER, "--device", self.device, "--answers", str(writing)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(writing,),
                env=environment,
                start_new_session=True,  # so that its helpers end with it
            )
        except OSError:
            os.close(reading)
            raise
        finally:
            os.close(writing)
        self.answers = reading
        _Server.running.append(self)
        if self._line(time.monotonic() + START) != b"ready\n":
            self.end()
            raise OSError("the process for it ended at once, or did not come")

    def ask(self, subject: Subject) -> tuple[str, bool]:
        """See :func:`ask`."""
        if self.process is None or self.process.poll() is not None:
            self.end()
            self._start()
        assert self.process is not None
        assert self.process.stdin is not None
        with tempfile.NamedTemporaryFile(suffix=".pt") as job:
            described = [_described(value) for value in subject.arguments]
            told = {"arguments": described, "extra": subject.extra, "launch_shapes": launch_shapes()}
            torch.save({"part": subject.part, **told}, job)
            job.flush()
            try:
                self.process.stdin.write(f"{job.name}\n".encode())
                self.process.stdin.flush()
                line = self._line(time.monotonic() + LIMIT)
            except BrokenPipeError:
                line = b""
        if line is None:
            self.end()
            return f"it did not end within {LIMIT:.0f} s", True
        if not line:
            code = self.process.wait()
            self.end()
            how = f"signal {signal.Signals(-code).name}" if code < 0 else f"status {code}"
            return f"it ended the process that ran it, with {how}", True
        answer = json.loads(line)
        if answer.get("ends"):  # a kernel that failed may have left the device unusable
            self.end()
        return answer["refused"], answer["lasting"]

    def _line(self, deadline: float) -> bytes | None:
        """The answer; nothing where the process ended, None where it does not come."""
        line = b""
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([self.answers], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                return None
            piece = os.read(self.answers, 65536)
            if not piece:
                return b""
            line += piece
        return line

    def end(self) -> None:
        """Kill it and its helpers, if it lives."""
        if self.process is None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        os.close(self.answers)
        self.process = None
        _Server.running.remove(self)


def _described(value: Any) -> Any:
    """An argument as the checks get it: integers as they are, and of other tensors what they look like."""
    if not isinstance(value, Tensor):
        return value
    if not value.is_floating_point():
        return value.detach().cpu()
    aligned = value.data_ptr() % 16 == 0
    return {"dtype": value.dtype, "shape": tuple(value.shape), "stride": value.stride(), "aligned": aligned}


atexit.register(close)
