"""A process for each case: what breaks the device, hangs or is killed takes its own case along and no other.

The child writes what it knows after each step, in one piece, into a file that the parent names; the parent never
touches the device.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from parts.harness import Timing, write_json

PROGRAM = [sys.executable, str(Path(__file__).resolve().parents[1] / "layer_gpu.py")]
LOOK = 1.0  # seconds between looks at the child's file
AFTER_TIME = 5.0  # seconds beyond the budget for a case to end by itself


def run_apart(
    index: int,
    arguments: Sequence[str],
    deadline: float,
    *,
    ceilings: Sequence[float] | None,
    changed: Callable[[dict[str, Any]], None],
) -> dict[str, Any] | None:
    """Run one case in a process of its own until it ends, or until ``deadline``.

    Args:
        index: of the case among those that ``arguments`` ask for.
        arguments: of this program.
        deadline: of ``time.monotonic``.
        ceilings: FLOP/s and bytes/s, when an earlier case has measured them.
        changed: called with the child's document whenever it has more to say.

    Returns:
        {"environment", "cases": [entry]}; the entry says how the process ended, if not by itself. None when it left
        nothing.
    """
    with tempfile.TemporaryDirectory(prefix="dmoe-case-") as folder:
        file = Path(folder) / "case.json"
        command = [*PROGRAM, *arguments, "--case", str(index), "--into", str(file)]
        command += ["--budget", f"{max(deadline - time.monotonic(), 1):.0f}"]
        if ceilings:
            command += ["--ceilings", ",".join(map(str, ceilings))]
        process = subprocess.Popen(command)
        seen, ended = 0, ""
        try:
            while process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=LOOK)
                if time.monotonic() > deadline + AFTER_TIME and process.poll() is None:
                    process.kill()
                    process.wait()
                    ended = "stopped: out of time"
                now = file.stat().st_mtime_ns if file.exists() else 0
                if now != seen:
                    seen = now
                    changed(load(file))
        finally:
            if process.poll() is None:
                process.kill()
        if not file.exists():
            return None
        document = load(file)
        entry = document["cases"][0]
        if ended or process.returncode not in (0, 1):
            entry.setdefault("broken", ended or f"its process ended with status {process.returncode}")
        return document


class Reporter:
    """Writes a case's process' file anew whenever something is worth keeping."""

    def __init__(self, args: argparse.Namespace, env: dict[str, Any], entry: dict[str, Any]) -> None:
        self.args, self.env, self.entry = args, env, entry

    def __call__(self) -> None:
        write_json(self.args.into, self.env, {}, [self.entry])


def load(path: Path) -> dict[str, Any]:
    """A document of :func:`parts.harness.write_json`, its timings as they were."""
    return dict(json.loads(path.read_text(), object_hook=_revived))


_FIELDS = {field.name for field in dataclasses.fields(Timing)}


def _revived(value: dict[str, Any]) -> Any:
    return Timing(**value) if set(value) == _FIELDS else value
