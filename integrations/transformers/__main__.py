"""``python -m dmoe.integrations.transformers COMMAND``: what the integration does to files.

    python -m dmoe.integrations.transformers upcycle SRC DST --num-experts 8 --top-k 2 --verify

``COMMAND --help`` tells what it takes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from dmoe.checkpoint import run_command
from dmoe.integrations.transformers.upcycle_command import add_upcycle

COMMANDS = (add_upcycle,)  # each adds itself to the parser, with what it runs as ``run``


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program; returns its exit status: 0, or 2 for what the user can put right."""
    return run_command(build_parser(), lambda options: options.run(options), arguments)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m dmoe.integrations.transformers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in COMMANDS:
        add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
