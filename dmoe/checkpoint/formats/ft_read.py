"""A FasterTransformer folder as a model, whatever N it was written for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmoe.checkpoint.formats.base import FILES
from dmoe.checkpoint.formats.ft_config import ARGS, CONFIG, FTConfig, read_args, read_config
from dmoe.checkpoint.formats.gpt_model import gpt_model
from dmoe.checkpoint.formats.gpt_names import Part, all_parts, ft_joined, ft_pieces
from dmoe.checkpoint.formats.megatron_args import activation_of, from_text, whole_number
from dmoe.checkpoint.model import Model
from dmoe.checkpoint.raw import read_bytes
from dmoe.checkpoint.stored import Stored, mapped

FOLDER = re.compile(r"(\d+)-gpu")


def find_folder(source: Path) -> Path:
    """The folder with the ``config.ini``: the given one, or the only ``N-gpu`` in it.

    Raises:
        OSError: there is none.
        ValueError: there are several.
    """
    if (source / CONFIG).is_file() or not source.is_dir():
        return source
    inside = [path for path in source.iterdir() if FOLDER.fullmatch(path.name) and path.is_dir()]
    if not inside:
        return source
    if len(inside) > 1:
        names = ", ".join(sorted(path.name for path in inside))
        raise ValueError(f"{source}: expected one folder of FasterTransformer's, got {names}: name one of them")
    return inside[0]


def read_folder(source: Path, layout: str) -> Model:
    """The model in a folder; ``layout`` is what ``origin`` calls it.

    Raises:
        OSError: a file is missing.
        ValueError: a file of another size than ``config.ini`` says, or that no such model has.
    """
    folder = find_folder(source)
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder / CONFIG}: expected FasterTransformer's description of the model, got none")
    config = read_config(folder / CONFIG)
    args = read_args(folder / ARGS)
    said = vars(from_text(args))
    tensors, known = {}, set()
    for ours, theirs, part in all_parts(config.sizes):
        names = file_names(theirs, part, config.gpus)
        tensors[ours] = _stored(folder, names, part, config)
        known.update(names)
    if other := sorted(path.name for path in folder.glob("model.*") if path.name not in known):
        raise ValueError(f"{folder / other[0]}: expected the files of the model in {CONFIG}, got one more")
    model = gpt_model(
        config.sizes,
        tensors,
        norm_eps=config.norm_eps,
        activation=activation_of(said),
        top_k=whole_number(said, "topk", str(folder / ARGS)) or 1,
        origin={
            "layout": layout,
            "gpus": config.gpus,
            "start_id": config.start_id,
            "end_id": config.end_id,
            "args": args,
        },
    )
    model.files = {what: str(folder / name) for what, name in FILES.items() if (folder / name).is_file()}
    return model


def file_names(theirs: str, part: Part, gpus: int) -> list[str]:
    """The files of a tensor: one for each rank, or one for all."""
    return [f"model.{theirs}.{rank}.bin" for rank in range(gpus)] if part.cut else [f"model.{theirs}.bin"]


def _stored(folder: Path, names: list[str], part: Part, config: FTConfig) -> Stored:
    shapes = [tuple(piece.shape) for piece in ft_pieces(part, torch.empty(part.shape, device="meta"), config.gpus)]
    pieces = [_file(folder / name, shape, config.dtype) for name, shape in zip(names, shapes, strict=True)]
    if len(pieces) == 1 and shapes[0] == part.shape and not part.matrix:
        return pieces[0]

    def join(tensors: Any) -> Tensor:
        return ft_joined(part, tensors).contiguous()

    return mapped(pieces, join, by_rows=part.by_rows, shape=tuple(part.shape))


def _file(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Stored:
    row = torch.Size(shape[1:]).numel() * dtype.itemsize
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: expected a file of {shape[0] * row} bytes, got none of that name") from None
    if size != shape[0] * row:
        raise ValueError(f"{path}: expected {shape[0] * row} bytes, {dtype} of {shape}, got {size}")

    def fetch(a: int, b: int) -> Tensor:
        return read_bytes(path, a * row, (b - a) * row).view(dtype).view(b - a, *shape[1:])

    return Stored(shape, dtype, fetch, str(path))
