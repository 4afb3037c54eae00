"""Files of ``torch.save`` read without running anything in them, and without reading tensors that nobody asks for."""

from __future__ import annotations

import argparse
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from dmoe.checkpoint.raw import read_bytes
from dmoe.checkpoint.stand_ins import StandIn, stand_ins
from dmoe.checkpoint.stored import Stored, held, in_one_piece
from dmoe.checkpoint.tree import children, is_list, rebuilt

_UNREADABLE = re.compile(r"WeightsUnpickler error:\s*(\S[^\n]*)")
_UNSUPPORTED = re.compile(r"Unsupported (?:global|class): GLOBAL (\S+)")


def read_lazily(path: str | os.PathLike[str], *, known: tuple[Any, ...] = ()) -> Any:
    """What a file of ``torch.save`` holds, with a :class:`Stored` for every tensor.

    Objects of other frameworks (``args``, random states) come as :class:`StandIn`, whether these are installed or not;
    ``argparse.Namespace`` as itself. Any other object is refused. Nothing in the file is executed.

    Args:
        path: of the file.
        known: classes that are plain data as well.

    Raises:
        OSError: no such file, or one that cannot be read.
        ValueError: a damaged file, or one with objects that are not among these: the message names the first.
    """
    path = Path(path)
    try:
        if zipfile.is_zipfile(path):
            return _read_zip(path, known)
        with open(path, "rb") as file:
            if file.read(2) == b"PK":
                raise ValueError("an archive without its end")
        return _with_stored(_read_old(path, known), path, whole=True)
    except (MemoryError, FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except Exception as error:  # bytes that are no pickle, or a part of one, end in an error of almost any type
        raise ValueError(f"{path}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    refused = _UNSUPPORTED.search(str(error)) or re.search(r"unsupported GLOBAL (\S+)", str(error))
    if refused is not None:
        return (
            f"expected tensors, plain data and objects of known frameworks, got {refused[1]}: nothing of the file was "
            "executed"
        )
    if (why := _UNREADABLE.search(str(error))) is not None:  # not the advice around it, to load the file unsafely
        return f"expected a whole file of torch.save, got: {why[1]}"
    return f"expected a whole file of torch.save, got: {(str(error).splitlines() or [type(error).__name__])[0]}"


def _read_zip(path: Path, known: tuple[Any, ...]) -> Any:
    with zipfile.ZipFile(path) as archive:
        order = next((name for name in archive.namelist() if name.endswith("/byteorder")), None)
        if order is not None and archive.read(order) != b"little":
            raise ValueError("numbers in another byte order than this machine's")
    with safe_globals([*known, *stand_ins(get_unsafe_globals_in_checkpoint(str(path)))]), FakeTensorMode():
        content = torch.load(path, map_location="cpu", weights_only=True)
    return _with_stored(content, path, whole=False)


def _read_old(path: Path, known: tuple[Any, ...]) -> Any:
    """What torch.save wrote before 1.6: no archive, and nothing to read a part of."""
    names: list[str] = []
    while True:
        try:
            with warnings.catch_warnings(), safe_globals([*known, *stand_ins(names)]):
                warnings.simplefilter("ignore")  # of the pickle's protocol: what cannot be read is an error
                return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            refused = _UNSUPPORTED.search(str(error))
            # PyTorch's message leaves out that a name is Python's own.
            name = "" if refused is None else refused[1] if "." in refused[1] else f"builtins.{refused[1]}"
            if name in names or not stand_ins([name]):
                raise
            names.append(name)


def _with_stored(node: Any, path: Path, *, whole: bool) -> Any:
    if isinstance(node, Tensor):
        return held(node, str(path)) if whole else _stored(node, path)
    if isinstance(node, Mapping) or is_list(node):
        return rebuilt(node, {key: _with_stored(value, path, whole=whole) for key, value in children(node)})
    if isinstance(node, argparse.Namespace | StandIn):
        for key, value in vars(node).items():
            vars(node)[key] = _with_stored(value, path, whole=whole)
    return node


def _stored(fake: Tensor, path: Path) -> Stored:
    """A tensor of an archive, whose storage lies there in one piece."""
    if fake.layout != torch.strided or fake.is_quantized:
        raise ValueError(f"a tensor that is {fake.layout}")
    storage = fake.untyped_storage()
    start: int | None = getattr(storage, "_checkpoint_offset", None)
    if start is None:
        raise ValueError("a tensor without numbers")
    shape, stride, dtype = tuple(fake.shape), fake.stride(), fake.dtype
    first, size, held_bytes = int(fake.storage_offset()), dtype.itemsize, int(storage.nbytes())
    last = first + sum((length - 1) * step for length, step in zip(shape, stride, strict=True))
    if fake.numel() and (last + 1) * size > held_bytes:
        raise ValueError(f"a tensor of {shape} that ends behind its storage")
    if start + held_bytes > path.stat().st_size:
        raise ValueError(f"a tensor of {shape} that ends behind the file")
    where = str(path)
    if fake.is_contiguous():

        def numbers(a: int, b: int) -> Tensor:
            return read_bytes(path, start + (first + a) * size, (b - a) * size).view(dtype)

        return in_one_piece(shape, dtype, numbers, where)

    def fetch(a: int, b: int) -> Tensor:
        return read_bytes(path, start, held_bytes).view(dtype).as_strided(shape, stride, first)[a:b].contiguous()

    return Stored(shape, dtype, fetch, where)
