"""``python -m dmoe.integrations.megatron convert``: checkpoint files of MoE layers from one layout to another.

    python -m dmoe.integrations.megatron convert --to dmoe out/rank{rank}.pt in/rank0.pt in/rank1.pt
    python -m dmoe.integrations.megatron convert --to sequential --ranks 1 whole.pt out/rank*.pt

Files are ``torch.save``'s: a model's ``state_dict()``, or a dict with it under ``model``, or under ``model0``,
``model1``, ... for the chunks of a virtual pipeline. They are those of all expert-parallel ranks with equal tensor and
pipeline ranks, in order. What stands beside the model is taken over from each rank's file (from the first, for another
number of ranks), but for the optimizer's state, which does not fit the new parameters: go on with ``--no-load-optim``.

Distributed checkpoints (``--ckpt-format torch_dist``) need no conversion: dmoe's layer saves and loads Megatron's own.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dmoe.checkpoint import finish_writing, name_of, run_command, write_together
from dmoe.checkpoint.command import count
from dmoe.checkpoint.together import Written
from dmoe.checkpoint.torch_reader import RefusedError, read_lazily
from dmoe.checkpoint.torch_writer import write_lazily
from dmoe.integrations.megatron.convert import convert_ranks
from dmoe.integrations.megatron.expert_layouts import LAYOUTS

_MODEL = re.compile(r"model\d*")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program; returns its exit status: 0, or 2 for what the user can put right."""
    return run_command(build_parser(), _convert, arguments)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m dmoe.integrations.megatron",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="convert")
    told = "MoE layers of checkpoint files from one layout to another."
    convert = commands.add_parser("convert", help=told, description=told)
    convert.add_argument("out", metavar="OUT", help="a file; with {rank} in it where several are written")
    convert.add_argument("files", nargs="+", metavar="IN", help="of each expert-parallel rank, in order")
    convert.add_argument("--to", choices=LAYOUTS, default="dmoe", help="[dmoe]")
    convert.add_argument("--ranks", type=count, metavar="W", help="expert-parallel ranks to write [as many as files]")
    convert.add_argument("--num-experts", type=count, metavar="E", help="of a layer, where no router tells")
    convert.add_argument("--overwrite", action="store_true", help="replace files that exist")
    convert.add_argument(
        "--trust",
        action="store_true",
        help="read files with any Python objects in them, which may run any code; Megatron's own need no trust",
    )
    return parser


def _convert(options: argparse.Namespace) -> None:
    ranks = options.ranks or len(options.files)
    if ranks > 1 and "{rank}" not in options.out:
        raise ValueError(f"OUT: expected a name with {{rank}} in it for {ranks} files, got {options.out}")
    name = name_of(options.out)
    targets = [Path(options.out.replace("{rank}", str(rank))) for rank in range(ranks)]
    finish_writing(name.parent)
    for target in targets:
        if target.exists() and not options.overwrite:
            raise ValueError(f"{target} exists; --overwrite replaces it")
    contents = [_read(path, options.trust) for path in options.files]
    keys = [key for key, value in contents[0].items() if _MODEL.fullmatch(str(key)) and isinstance(value, Mapping)]
    for path, content in zip(options.files, contents, strict=True):
        if odd := [key for key in keys if not isinstance(content.get(key), Mapping)]:
            raise ValueError(f"{path}: expected {odd[0]} in it, as in {options.files[0]}, got none")
        if not keys and any(isinstance(value, Mapping) for key, value in content.items() if _MODEL.fullmatch(str(key))):
            raise ValueError(f"{path}: expected a state dict, as in {options.files[0]}, got one under 'model'")
    if keys:
        models = {key: _converted([content[key] for content in contents], options) for key in keys}
        wholes = [dict(contents[rank if ranks == len(contents) else 0]) for rank in range(ranks)]
        without = [" (without the optimizer)" if whole.pop("optimizer", None) is not None else "" for whole in wholes]
        parts = [whole | {key: made[rank] for key, made in models.items()} for rank, whole in enumerate(wholes)]
    else:
        parts, without = _converted(contents, options), [""] * ranks
    files = {
        target: part if options.trust else Written(partial(write_lazily, content=part))
        for target, part in zip(targets, parts, strict=True)
    }
    write_together(name, files, overwrite=True)
    for target, said in zip(targets, without, strict=True):
        print(f"{target}{said}")


def _converted(states: list[Mapping[str, Any]], options: argparse.Namespace) -> list[dict[str, Any]]:
    return convert_ranks(states, options.to, ranks=options.ranks, num_experts=options.num_experts)


def _read(path: str, trust: bool) -> Mapping[str, Any]:
    if trust:
        return _read_objects(path)
    try:
        content = read_lazily(path)
    except RefusedError as error:
        raise ValueError(f"{error}; --trust reads any Python object, if you know where the file is from") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: expected a state dict, or a dict around one, got {type(content).__name__}")
    return content


def _read_objects(path: str) -> Mapping[str, Any]:
    """Whatever torch.save wrote.

    Raises:
        OSError: no such file, or one that cannot be read.
        ValueError: no file of torch.save, objects of packages or names that are not here, or no state dict.
    """
    try:
        with open(path, "rb") as file:
            content = torch.load(file, map_location="cpu", weights_only=False)
    except (ImportError, AttributeError) as error:  # what pickle says of a module, or of a name in one
        raise ValueError(
            f"{path}: expected objects of packages that are installed here, got: {error}; make that importable "
            "(Megatron's own files: with its checkout in PYTHONPATH)"
        ) from error
    except Exception as error:  # bytes that are no pickle, or a part of one, end in an error of almost any type
        if isinstance(error, MemoryError) or getattr(error, "filename", None) is not None:  # no such file, say
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path}: expected a file of torch.save, got: {reason}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: expected a state dict, or a dict around one, got {type(content).__name__}")
    return content


if __name__ == "__main__":
    sys.exit(main())
