"""``python -m dmoe.report RUN``: a page about a monitored run, and PNGs on request."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dmoe.report.columns import columns_of
from dmoe.report.page import page
from dmoe.report.reading import RunError, read_run
from dmoe.report.specialisation import names_of


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0, or 2 for what the user can put right."""
    parser = argparse.ArgumentParser(prog="python -m dmoe.report", description=__doc__)
    parser.add_argument("run", metavar="RUN", help="the folder that dmoe.monitor wrote")
    parser.add_argument("--out", metavar="FILE", help="the page; RUN/report.html if left out")
    parser.add_argument("--png", action="store_true", help="pictures, too, beside the page; needs matplotlib")
    named = parser.add_mutually_exclusive_group()
    named.add_argument(
        "--tokens", metavar="FILE", help="names of token ids, as JSON: a list, names by id, or ids by name"
    )
    named.add_argument("--tokenizer", metavar="FILE", help="a tokenizer.json, for the same; needs tokenizers")
    options = parser.parse_args(arguments)
    try:
        names = names_of(options.tokens, options.tokenizer)
        run = read_run(options.run)
        columns = columns_of(run)
        out = Path(options.out) if options.out else Path(options.run) / "report.html"
        written = [_write(out, page(run, columns, names))]
        if options.png:
            from dmoe.report.pictures import draw  # matplotlib comes with it

            written += draw(run, columns, out)
    except RunError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    for note in run.notes:
        sys.stderr.write(f"dmoe.report: {note}\n")
    for path in written:
        print(path)
    return 0


def _write(path: Path, text: str) -> Path:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RunError(f"dmoe.report: --out: expected a file that can be written, got {path}: {error}") from None
    return path


if __name__ == "__main__":
    sys.exit(main())
