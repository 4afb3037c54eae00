"""``python -m dmoe.lora``: what is done to files of adapters."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from dmoe.checkpoint import progress_bar, run_command
from dmoe.checkpoint.hub_folder import local_folder
from dmoe.checkpoint.new_folder import new_folder
from dmoe.lora.merge_files import merge_folder
from dmoe.lora.peft_config import CONFIG, PARAMETERS_AS_STORED_SINCE
from dmoe.lora.peft_read import read_adapter
from dmoe.lora.peft_write import LAYOUTS, write_adapter

_TOLD = """Low-rank adapters of mixtures of experts, as files.

  merge    BASE ADAPTER OUT    a model folder of Hugging Face with the adapter's updates in its weights
  convert  ADAPTER OUT         the adapter in another layout, of PEFT's, vLLM's or SGLang's

Nothing in a file is executed, and OUT is there whole or not at all.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program; returns its exit status: 0, or 2 for what the user can put right."""
    return run_command(build_parser(), lambda options: options.run(options), arguments)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m dmoe.lora", description=_TOLD, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="merge|convert")
    merge = commands.add_parser("merge", help="into the model's own files, a tensor at a time")
    merge.set_defaults(run=_merge)
    merge.add_argument(
        "base", metavar="BASE", help="a folder in Hugging Face's format, or an id that the hub's cache has"
    )
    merge.add_argument("adapter", metavar="ADAPTER", help="a folder with adapter_config.json")
    merge.add_argument("out", metavar="OUT", type=Path, help="folder to write")
    merge.add_argument("--overwrite", action="store_true", help="replace a model in OUT")
    convert = commands.add_parser("convert", help="into another layout")
    convert.set_defaults(run=_convert)
    convert.add_argument("adapter", metavar="ADAPTER", help="a folder with adapter_config.json")
    convert.add_argument("out", metavar="OUT", type=Path, help="folder to write")
    convert.add_argument("--to", required=True, choices=LAYOUTS, metavar="LAYOUT", help=", ".join(LAYOUTS))
    convert.add_argument(
        "--base",
        metavar="BASE",
        help="the model, of which config.json alone is read [as the adapter says, if that is here]",
    )
    convert.add_argument(
        "--peft",
        type=_version,
        default=PARAMETERS_AS_STORED_SINCE,
        metavar="VERSION",
        help="that is to read it; 0.18 differs [0.19]",
    )
    convert.add_argument("--overwrite", action="store_true", help="replace an adapter in OUT")
    return parser


def _merge(options: argparse.Namespace) -> None:
    base = local_folder(options.base)
    adapter = read_adapter(options.adapter, base)
    with progress_bar("merging", sum(path.stat().st_size for path in base.glob("*.safetensors")), "B") as move:
        notes = merge_folder(base, adapter, options.out, overwrite=options.overwrite, progress=move)
    for note in notes:
        print(f"merge: {note}", file=sys.stderr)
    print(options.out)


def _convert(options: argparse.Namespace) -> None:
    convert(
        options.adapter,
        options.out,
        options.to,
        base=options.base,
        version=options.peft,
        overwrite=options.overwrite,
    )
    print(options.out)


def convert(
    adapter: str | os.PathLike[str],
    target: str | os.PathLike[str],
    to: str,
    *,
    base: str | os.PathLike[str] | None = None,
    version: tuple[int, int] = PARAMETERS_AS_STORED_SINCE,
    overwrite: bool = False,
) -> None:
    """Write an adapter in another layout: all of it or nothing.

    Args:
        adapter: a folder of PEFT's.
        target: a new folder.
        to: a layout of :data:`dmoe.lora.peft_write.LAYOUTS`.
        base: the model's folder, or its id in the hub's cache, of which ``config.json`` is read; None is what the
            adapter says, where that is here.
        version: of the PEFT that is to read it.
        overwrite: whether an adapter in ``target`` is replaced.

    Raises:
        OSError, ValueError: see :func:`dmoe.lora.peft_read.read_adapter` and ``write_adapter``.
    """
    found = read_adapter(adapter, base)
    with new_folder(target, overwrite=overwrite, marker=CONFIG) as folder:
        write_adapter(found, folder, to, base=None if base is None else str(base), version=version)


def _version(text: str) -> tuple[int, int]:
    numbers = text.split(".")
    if len(numbers) < 2 or not all(each.isdecimal() for each in numbers[:2]):
        raise argparse.ArgumentTypeError(f"expected a version as 0.19, got {text!r}")
    return int(numbers[0]), int(numbers[1])
