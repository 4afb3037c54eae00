"""Certify all kernels on this machine, or serve those who ask: see :mod:`dmoe.certify`."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from dmoe.certify.standard import standard_subjects
from dmoe.ops._cache_folder import cache_folder


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where all is trusted, 1 where something is refused."""
    parser = argparse.ArgumentParser(prog="python -m dmoe.certify", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", default="", help="subjects whose name contains this")
    parser.add_argument("--seconds", type=float, default=3600.0, help="after which no further subject is begun")
    parser.add_argument("--json", type=Path, help="write the verdicts, renewed after each")
    parser.add_argument("--list", action="store_true", help="print what would be certified; needs no GPU")
    parser.add_argument("--forget", action="store_true", help="remove what is kept of earlier verdicts, and stop")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--answers", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.serve:
        from dmoe.certify.serve import serve

        serve(torch.device(args.device), args.answers)
        return 0
    from dmoe.ops import _verdicts

    if args.forget:
        folder = cache_folder()
        for path in [] if folder is None else folder.glob("certified-*.json"):
            path.unlink()
        return 0
    subjects = {name: subject for name, subject in standard_subjects().items() if args.only in name}
    if args.list:
        print(*subjects, sep="\n")
        return 0
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error(
            "expected a CUDA device, and this machine has none; --device cpu with TRITON_INTERPRET=1 runs the kernels "
            "under Triton's interpreter, which has no bfloat16"
        )
    if device.type == "cpu" and not interpreted:
        parser.error("--device cpu: expected TRITON_INTERPRET=1, Triton's interpreter")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    report: dict[str, Any] = {"machine": _verdicts.machine(device), "verdicts": {}}
    refused, deadline = 0, time.monotonic() + args.seconds
    for name, subject in progress(subjects.items()):
        if interpreted and "bfloat16" in name:
            continue
        start = time.monotonic()
        if start > deadline:
            report["verdicts"][name] = {"left out": "out of time"}
            continue
        reason, _ = _verdicts.ask(subject, device)
        seconds = time.monotonic() - start
        refused += bool(reason)
        print(
            f"{'REFUSED' if reason else 'trusted'}  {name}  {seconds:.1f} s{'  ' + reason if reason else ''}",
            flush=True,
        )
        report["verdicts"][name] = {"refused": reason, "seconds": round(seconds, 2)}
        if args.json:
            partial = args.json.with_suffix(".partial")
            partial.write_text(json.dumps(report, indent=1) + "\n")
            partial.replace(args.json)
    left_out = sum("left out" in verdict for verdict in report["verdicts"].values())
    rest = f", {left_out} left out" if left_out else ""
    print(f"{refused} of {len(subjects)} refused{rest} on {report['machine']}")
    return 1 if refused else 0


def progress(items: Iterable[Any]) -> Iterable[Any]:
    """A progress bar where tqdm is installed and somebody looks."""
    if not sys.stderr.isatty():
        return items
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    return tqdm(list(items), unit="subject")


if __name__ == "__main__":
    sys.exit(main())
