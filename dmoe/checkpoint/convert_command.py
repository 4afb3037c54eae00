"""``convert``, and the sources and options that it shares with ``inspect``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from dmoe.checkpoint.command import count, progress_bar
from dmoe.checkpoint.formats.base import DTYPES, Options
from dmoe.checkpoint.formats.known import FORMATS, find_format
from dmoe.checkpoint.model import Model
from dmoe.checkpoint.stored import total_bytes

_Path: TypeAlias = str | os.PathLike[str]


def add_convert(add: Callable[..., argparse.ArgumentParser]) -> None:
    """The subcommand."""
    layouts = "\n".join(f"  {name:<20} {each.about}" for name, each in FORMATS.items())
    convert = add("convert", run, "A checkpoint of another system, or for another one.")
    convert.formatter_class = argparse.RawDescriptionHelpFormatter
    convert.epilog = f"layouts:\n{layouts}"
    convert.add_argument(
        "sources", nargs="+", metavar="SRC", help="a folder or file; or the files of all ranks, also as rank{rank}.pt"
    )
    convert.add_argument("target", metavar="DST", help="a folder or file; with {rank} where each rank has a file")
    convert.add_argument("--to", required=True, choices=[*FORMATS], metavar="LAYOUT", help="see below")
    add_source_options(convert)
    convert.add_argument("--ranks", type=count, metavar="W", help="ranks to write for [as in the same layout, else 1]")
    convert.add_argument(
        "--gpus", type=count, metavar="N", help="inference ranks (fastertransformer) [as read, else 1]"
    )
    convert.add_argument("--dtype", choices=[*DTYPES], help="of floating-point numbers [as they are]")
    convert.add_argument("--vocab", type=Path, metavar="F", help="vocab.json, to go beside the model")
    convert.add_argument("--merges", type=Path, metavar="F", help="merges.txt, to go beside the model")
    convert.add_argument("--family", metavar="NAME", help="of a Hugging Face model, as mixtral [as its files say]")
    convert.add_argument("--overwrite", action="store_true", help="replace what is there")


def add_source_options(parser: argparse.ArgumentParser) -> None:
    """What ``inspect`` has as well."""
    parser.add_argument(
        "--from", dest="source_layout", metavar="LAYOUT", help="layout of SRC [found by names and files]"
    )
    parser.add_argument("--num-experts", type=count, metavar="E", help="of a layer, where no router tells")
    add_as_given(parser)
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a field of dmoe.MoEConfig that the files do not tell, as top_k=2 or activation=gelu; may be repeated",
    )


def add_as_given(parser: argparse.ArgumentParser) -> None:
    """How the files of ranks are ordered, which ``merge`` asks for as well."""
    parser.add_argument(
        "--as-given",
        action="store_true",
        help="the files are in the order of the ranks [by the number in their names, if they differ in it alone]",
    )


def read_model(sources: _Path | Sequence[_Path], *, layout: str | None = None, options: Options | None = None) -> Model:
    """The model in a checkpoint of any layout; its tensors stay in the files until they are read.

    Args:
        sources: a folder or a file, or the files of all ranks.
        layout: a name of ``python -m dmoe.checkpoint convert --help``; None finds it.
        options: what the files do not tell.

    Raises:
        OSError: a file is missing, or cannot be read.
        ValueError: files in no layout, or damaged ones; the message names the file.
    """
    paths = [Path(sources)] if isinstance(sources, str | os.PathLike) else [Path(each) for each in sources]
    given = options or Options()
    model = find_format(paths, layout).read(paths, given)
    model.apply_settings(given.settings)
    return model


def write_model(model: Model, target: _Path, to: str, options: Options) -> list[Path]:
    """Write a model in a layout: all of it or nothing.

    Raises:
        OSError, ValueError: it cannot be written, or held by the layout; or what is kept with the model of the files
            that it comes from is not what that layout keeps.
    """
    try:
        return FORMATS[to].write(model, Path(target), options)
    except OSError as error:
        if error.filename is None and error.errno is not None:  # a full disk, say
            error.filename = str(target)
        raise
    except (AttributeError, KeyError, IndexError, TypeError) as error:
        if not model.from_json:
            raise
        raise ValueError(
            f"{to}: expected origin and gpt beside the tensors as they were written, got others: "
            f"{type(error).__name__} {error}"
        ) from error


def convert(
    sources: _Path | Sequence[_Path],
    target: _Path,
    to: str,
    *,
    layout: str | None = None,
    options: Options | None = None,
) -> tuple[list[Path], list[str]]:
    """Write a checkpoint in another layout: all of it or nothing.

    Args:
        sources, layout: see :func:`read_model`.
        target: a folder or file; with ``{rank}`` in its name where each rank has a file.
        to: a name of ``python -m dmoe.checkpoint convert --help``.
        options: of the user.

    Returns:
        What was written, and sentences about what differs.

    Raises:
        OSError, ValueError: see :func:`read_model`; or a model that the layout cannot hold.
    """
    given = options or Options()
    model = read_model(sources, layout=layout, options=given)
    return write_model(model, target, to, given), model.notes


def run(options: argparse.Namespace) -> None:
    """``convert``."""
    for file in (options.vocab, options.merges):
        if file is not None and not file.is_file():
            raise FileNotFoundError(f"{file}: expected a file, got nothing of that name")
    sources = [Path(source) for source in options.sources]
    given = options_of_user(options)
    model = read_model(sources, layout=options.source_layout, options=given)
    with progress_bar("converting", total_bytes(model.tensors), "B") as progress:
        written = write_model(model, options.target, options.to, options_of_user(options, progress))
    for note in model.notes:
        print(f"{options.to}: {note}", file=sys.stderr)
    for path in written:
        print(path)


def options_of_user(options: argparse.Namespace, progress: Callable[[int], object] = lambda count: None) -> Options:
    """The values of a command line."""
    kept = {
        name: getattr(options, name, None) for name in ("ranks", "gpus", "vocab", "merges", "num_experts", "family")
    }
    dtype = getattr(options, "dtype", None)
    return Options(
        **kept,
        dtype=None if dtype is None else DTYPES[dtype],
        as_given=getattr(options, "as_given", False),
        settings=dict(_setting(text) for text in options.set),
        overwrite=getattr(options, "overwrite", False),
        progress=progress,
    )


def _setting(text: str) -> tuple[str, Any]:
    name, given, value = text.partition("=")
    if not given or not name:
        raise ValueError(f"--set: expected NAME=VALUE, got {text}")
    constants = {"None": None, "True": True, "False": False}
    if value in constants:
        return name, constants[value]
    for kind in (int, float):
        try:
            return name, kind(value)
        except ValueError:
            continue
    return name, value
