"""``python -m dmoe.presets [NAME ...]``: presets side by side."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from dmoe.presets import table


def main(arguments: Sequence[str] | None = None) -> int:
    """0, or 2 where a name is unknown."""
    parser = argparse.ArgumentParser(prog="python -m dmoe.presets", description="Published layers, side by side.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="which; all of them without any")
    try:
        text = table(*parser.parse_args(arguments).names)
    except ValueError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    try:
        print(text, flush=True)
    except BrokenPipeError:  # whoever reads has seen enough; and Python is to find nothing left to write
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
