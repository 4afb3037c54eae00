"""``python -m dmoe.checkpoint inspect|convert|merge|split``; see the package for what the files hold."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import dmoe.checkpoint
from dmoe.checkpoint.command import progress_over, run_command
from dmoe.checkpoint.convert_command import add_as_given, add_convert, add_source_options, options_of_user, read_model
from dmoe.checkpoint.files import in_rank_order, read_file, write_file
from dmoe.checkpoint.formats.dmoe_files import DMOE
from dmoe.checkpoint.formats.known import find_format, fitting
from dmoe.checkpoint.inspect_model import describe_model
from dmoe.checkpoint.inspection import inspect_state, report
from dmoe.checkpoint.slots import Widths
from dmoe.checkpoint.states import Cut, merge_states
from dmoe.checkpoint.together import finish_writing, name_of, refuse_existing, write_together


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program; returns its exit status: 0, or 2 for what the user can put right."""
    return run_command(build_parser(), lambda options: options.run(options), arguments)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m dmoe.checkpoint",
        description=dmoe.checkpoint.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="inspect|convert|merge|split")

    def command(name: str, run: Callable[[argparse.Namespace], None], help: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=help, description=help)
        added.set_defaults(run=run)
        return added

    def sharing(added: argparse.ArgumentParser) -> None:
        added.add_argument(
            "--shards",
            type=int,
            default=1,
            metavar="S",
            help="every S consecutive ranks hold slices along F of the same experts [1]",
        )
        added.add_argument(
            "--widths",
            action="append",
            default=[],
            metavar="[LAYER=]F,F,...",
            help="F of every expert, where they differ; for one layer: blocks.0.ffn.experts=F,F,...; may be repeated",
        )
        added.add_argument("--overwrite", action="store_true", help="replace files that exist")

    add_convert(command)
    merge = command("merge", _merge, "One file for one process from those of all ranks.")
    merge.add_argument("out", metavar="OUT")
    merge.add_argument("files", nargs="+", metavar="FILE")
    merge.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="PATTERN",
        help="what may differ between ranks, as 'rng*' or 'model/step'; the first rank's is kept; may be repeated",
    )
    add_as_given(merge)
    sharing(merge)
    split = command("split", _split, "A file for each of W ranks from that of one process.")
    split.add_argument("file", metavar="IN")
    split.add_argument("ranks", type=int, metavar="W", help="files to write, shards included")
    split.add_argument("pattern", metavar="OUT_PATTERN", help="with {rank} in it, as part-{rank}.pt")
    sharing(split)
    inspect = command("inspect", _inspect, "What a checkpoint of any layout holds; which rank holds which experts.")
    inspect.add_argument("files", nargs="+", metavar="SRC", help="a folder or file; or the files of all ranks")
    add_source_options(inspect)
    return parser


def _merge(options: argparse.Namespace) -> None:
    files = _ordered(options)
    out = Path(options.out)
    if os.path.realpath(out) in map(os.path.realpath, files):
        raise ValueError(f"merge: {out}: expected another file to write than those to read")
    finish_writing(out.parent)
    refuse_existing([out], options.overwrite)
    widths = _widths(options.widths)
    states = [read_file(file, mapped=True) for file in files]
    whole = merge_states(
        states, shards=options.shards, widths=widths, ignore=options.ignore, progress=progress_over("merging", "tensor")
    )
    write_file(out, whole, overwrite=options.overwrite)
    print(f"{out}: merged {', '.join(files)}, as ranks 0 to {len(files) - 1}")


def _split(options: argparse.Namespace) -> None:
    if "{rank}" not in options.pattern:
        raise ValueError(f"split: OUT_PATTERN: expected {{rank}} in it, got {options.pattern}")
    outs = [Path(options.pattern.replace("{rank}", str(rank))) for rank in range(max(0, options.ranks))]
    if os.path.realpath(options.file) in map(os.path.realpath, outs):
        raise ValueError(f"split: {options.pattern}: expected other files to write than the one to read")
    name = name_of(options.pattern)
    finish_writing(name.parent)
    refuse_existing(outs, options.overwrite)
    whole = read_file(options.file, mapped=True)
    cut = Cut(whole, options.ranks, shards=options.shards, widths=_widths(options.widths))
    files = {out: partial(cut.part, rank) for rank, out in enumerate(outs)}
    write_together(name, files, overwrite=options.overwrite, progress=progress_over("writing", "file"))
    print(f"{', '.join(map(str, outs))}: split {options.file}")


def _inspect(options: argparse.Namespace) -> None:
    sources = [Path(file) for file in options.files]
    formats = fitting(sources, options.source_layout)
    of_torch = all(source.is_file() and source.suffix not in (".npz", ".safetensors") for source in sources)
    if not of_torch or (formats and (formats[0] is not DMOE or DMOE.holds_configs(sources))):
        layout = find_format(sources, options.source_layout).name
        model = read_model(sources, layout=options.source_layout, options=options_of_user(options))
        print(describe_model(model, ", ".join(options.files), layout))
        return
    files = _ordered(options)
    found = []
    for file in files:
        parts = inspect_state(read_file(file, mapped=True))
        if not parts:
            raise ValueError(f"inspect: {file}: expected a checkpoint with MoE layers, got none of their parameters")
        found.append(parts)
    print(report(files, found))


def _ordered(options: argparse.Namespace) -> list[str]:
    return list(options.files) if options.as_given else in_rank_order(options.files)


def _widths(given: Sequence[str]) -> Widths:
    """One list for all layers, or lists by layer."""
    by_layer: dict[str, list[int]] = {}
    for text in given:
        layer, _, numbers = text.rpartition("=")
        try:
            by_layer[layer] = [int(number) for number in numbers.split(",")]
        except ValueError:
            raise ValueError(f"--widths: expected [LAYER=]F,F,... with integers, got {text}") from None
    if "" in by_layer and len(given) > 1:
        raise ValueError(f"--widths: expected one list for all layers, or LAYER= before each, got {' '.join(given)}")
    return by_layer.get("", by_layer or None)


if __name__ == "__main__":
    sys.exit(main())
