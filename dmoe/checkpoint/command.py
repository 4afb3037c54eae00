"""How a program on checkpoint files ends."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence


def run_command(
    parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], None], arguments: Sequence[str] | None = None
) -> int:
    """Parse and run; what the user can put right is told in one line, without a traceback.

    Args:
        parser: the command line.
        run: called with what was parsed.
        arguments: None is ``sys.argv``.

    Returns:
        The exit status: 0, or 2 where ``run`` raised OSError, ValueError or TypeError.
    """
    options = parser.parse_args(arguments)
    try:
        run(options)
    except (OSError, ValueError, TypeError) as error:
        text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
        print(f"{parser.prog}: error: {text}", file=sys.stderr)
        return 2
    return 0
