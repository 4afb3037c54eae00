"""``python -m dmoe.checkpoint convert``: a model from one system's files into another's."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from dmoe.checkpoint.formats.base import Format, Options
from dmoe.checkpoint.formats.known import FORMATS
from dmoe.checkpoint.model import Model

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    names = [each.name for each in FORMATS]
    parser.add_argument("source", type=Path, metavar="SRC")
    parser.add_argument("target", type=Path, metavar="DST")
    parser.add_argument("--to", required=True, choices=[*names, "deepspeed"], help="layout to write")
    parser.add_argument("--from", dest="source_format", choices=names, help="layout of SRC [found by looking]")
    parser.add_argument("--gpus", type=int, metavar="N", help="inference ranks (FasterTransformer) [1]")
    parser.add_argument("--ranks", type=int, metavar="W", help="training ranks [as many as SRC has, or 1]")
    parser.add_argument("--dtype", choices=DTYPES, help="of the numbers to write [as they are]")
    parser.add_argument("--vocab", type=Path, metavar="FILE", help="vocab.json, to go beside the model")
    parser.add_argument("--merges", type=Path, metavar="FILE", help="merges.txt, to go beside the model")
    parser.add_argument("--overwrite", action="store_true", help="replace a folder of the same kind")


def convert(options: argparse.Namespace) -> None:
    """Read, write, and say what to know of it."""
    given = Options(
        ranks=options.ranks,
        gpus=options.gpus,
        dtype=None if options.dtype is None else DTYPES[options.dtype],
        vocab=options.vocab,
        merges=options.merges,
        overwrite=options.overwrite,
    )
    source = _named(options.source_format) if options.source_format else _found(options.source)
    model = source.read([options.source], given)
    written = _target(options.to, model).write(model, options.target, given)
    for note in model.notes:
        print(f"warning: {note}", file=sys.stderr)
    print(f"{', '.join(map(str, written))}: {options.source}, from {source.name}")


def _target(name: str, model: Model) -> Format:
    if name == "deepspeed" and model.gpt is not None:
        return _named("deepspeed-gpt")
    return _named(name)


def _named(name: str) -> Format:
    for each in FORMATS:
        if each.name == name:
            return each
    raise ValueError(f"convert: expected a layout, {', '.join(each.name for each in FORMATS)}, got {name}")


def _found(source: Path) -> Format:
    for each in FORMATS:
        if each.fits([source]):
            return each
    if not source.exists():
        raise FileNotFoundError(f"{source}: expected a checkpoint, got nothing of that name")
    known = "; ".join(f"{each.name}: {each.about}" for each in FORMATS)
    raise ValueError(f"{source}: expected a checkpoint of a known layout, got none of these: {known}")
