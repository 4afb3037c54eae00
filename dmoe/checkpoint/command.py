"""What programs on files have in common: how they end, and the bar that they show."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any


def run_command(
    parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], None], arguments: Sequence[str] | None = None
) -> int:
    """Parse and run; what the user can put right is told in one line, without a traceback.

    Args:
        parser: the command line.
        run: called with what was parsed.
        arguments: None is ``sys.argv``.

    Returns:
        The exit status: 0, or 2 where ``run`` raised OSError, ValueError, TypeError or ImportError;
        130 where somebody stopped it.
    """
    options = parser.parse_args(arguments)
    try:
        run(options)
    except KeyboardInterrupt:
        print(f"{parser.prog}: stopped", file=sys.stderr)
        return 130
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        advice = f": pip install -U {package}" if package else ""
        print(f"{parser.prog}: error: expected a package that is missing: {error}{advice}", file=sys.stderr)
        return 2
    except (OSError, ValueError, TypeError) as error:
        text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
        print(f"{parser.prog}: error: {text}", file=sys.stderr)
        return 2
    return 0


def count(text: str) -> int:
    """For a command line: an integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")
    return int(text)


@contextmanager
def progress_bar(name: str, total: int, unit: str) -> Iterator[Callable[[int], object]]:
    """A progress bar on a terminal, where tqdm is installed; gives what moves it on. ``B`` are counted in megabytes."""
    try:
        from tqdm import tqdm
    except ImportError:  # a courtesy
        yield lambda count: None
        return
    scaled = unit == "B"
    with tqdm(total=total, desc=name, unit=unit, unit_scale=scaled, disable=None, leave=False, file=sys.stderr) as bar:
        yield bar.update


def progress_over(name: str, unit: str) -> Callable[[Iterable[Any], int], Iterable[Any]]:
    """Wraps items, of which there are so many, in such a bar."""

    def wrap(items: Iterable[Any], total: int) -> Iterator[Any]:
        with progress_bar(name, total, unit) as move:
            for item in items:
                yield item
                move(1)

    return wrap
