"""Files of ``torch.save`` read without running anything in them, and without reading tensors that nobody asks for."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, _weights_only_unpickler
from torch.serialization import add_safe_globals, clear_safe_globals, get_safe_globals

from dmoe.checkpoint.raw import read_bytes, start_of_entry
from dmoe.checkpoint.stand_ins import StandIn, stand_ins
from dmoe.checkpoint.stored import Stored, held, in_one_piece, mapped
from dmoe.checkpoint.tree import children, is_list, rebuilt

_UNREADABLE = re.compile(r"WeightsUnpickler error:\s*(\S[^\n]*)")
_UNSUPPORTED = re.compile(r"Unsupported (?:global|class): GLOBAL (\S+)")


class RefusedError(ValueError):
    """A file names something that is not made here."""


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
    except Exception as error:  # bytes that are no pickle, or a part of one, end in an error of almost any type
        if isinstance(error, MemoryError) or getattr(error, "filename", None) is not None:  # no such file, say
            raise
        if (name := _refused(error)) is not None:
            raise RefusedError(
                f"{path}: expected tensors, plain data and objects of known frameworks, got {name}: nothing of the "
                "file was executed"
            ) from error
        raise ValueError(f"{path}: expected a whole file of torch.save, got: {_reason(error)}") from error


def _refused(error: Exception) -> str | None:
    """The name that PyTorch's reader did not know, if it is that."""
    refused = _UNSUPPORTED.search(str(error)) or re.search(r"unsupported GLOBAL (\S+)", str(error))
    return None if refused is None else refused[1]


def _reason(error: Exception) -> str:
    if (why := _UNREADABLE.search(str(error))) is not None:  # not the advice around it, to load the file unsafely
        return why[1]
    return (str(error).splitlines() or [type(error).__name__])[0]


def _read_zip(path: Path, known: tuple[Any, ...]) -> Any:
    with zipfile.ZipFile(path) as archive:
        records = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        if packed := next((info for info in archive.infolist() if info.compress_type != zipfile.ZIP_STORED), None):
            raise ValueError(f"{packed.filename} compressed, as torch.save does not; load and save the file once more")
        if "byteorder" in records and archive.read(records["byteorder"]) != b"little":
            raise ValueError("numbers in another byte order than this machine's")
        if "data.pkl" not in records:
            raise ValueError("an archive without data.pkl")
        pickled = archive.read(records["data.pkl"])
    names = _weights_only_unpickler.get_globals_in_pkl(io.BytesIO(pickled))
    storages: dict[Any, Any] = {}
    end = path.stat().st_size

    def storage(saved: Any) -> Any:
        """A storage without numbers that knows where in the file they are."""
        kind, storage_type, key, _, count = saved
        if kind != "storage":
            raise ValueError(f"a reference to {kind!r:.80}")
        dtype = torch.uint8 if storage_type is torch.UntypedStorage else storage_type.dtype
        if key not in storages:
            info = records.get(f"data/{key}")
            size = int(count) * dtype.itemsize
            if info is None or not 0 <= size <= info.file_size:
                got = "none" if info is None else info.file_size
                raise ValueError(f"data/{key}: expected {size} bytes, got {got}")
            start = start_of_entry(path, info)
            if start + size > end:
                raise ValueError(f"data/{key}: expected {size} bytes at {start}, got a file of {end}")
            made = torch.UntypedStorage(size, device="meta")
            made._offset_in_file = start  # type: ignore[attr-defined]
            storages[key] = made
        return torch.storage.TypedStorage(wrap_storage=storages[key], dtype=dtype, _internal=True)

    with _only([*known, *stand_ins(names)]):
        unpickler: Any = _weights_only_unpickler.Unpickler(io.BytesIO(pickled), encoding="utf-8")
        unpickler.persistent_load = storage
        content = unpickler.load()
    return _with_stored(content, path, whole=False)


@contextmanager
def _only(allowed: list[Any]) -> Iterator[None]:
    """Let PyTorch's reader make objects of these classes alone: a framework that is imported may have added its own."""
    before = get_safe_globals()
    clear_safe_globals()
    try:
        add_safe_globals(allowed)
        yield
    finally:
        clear_safe_globals()
        add_safe_globals(before)


def _read_old(path: Path, known: tuple[Any, ...]) -> Any:
    """What torch.save wrote before 1.6: no archive, and nothing to read a part of."""
    names: list[str] = []
    while True:
        try:
            with warnings.catch_warnings(), _only([*known, *stand_ins(names)]):
                warnings.simplefilter("ignore")  # of the pickle's protocol: what cannot be read is an error
                return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            refused = _UNSUPPORTED.search(str(error))
            # PyTorch's message leaves out that a name is Python's own.
            name = "" if refused is None else refused[1] if "." in refused[1] else f"builtins.{refused[1]}"
            if name in names or not stand_ins([name]):
                raise
            names.append(name)


def _with_stored(node: Any, path: Path, *, whole: bool, seen: dict[int, Any] | None = None) -> Any:
    """The same, with a :class:`Stored` for each tensor; what stands at several places is made once."""
    seen = {} if seen is None else seen
    if id(node) in seen:
        return seen[id(node)]
    made = node
    if isinstance(node, Tensor):
        made = held(node, str(path)) if whole else _stored(node, path)
    elif isinstance(node, torch.Size):
        pass
    elif isinstance(node, Mapping) or is_list(node):
        made = rebuilt(node, {key: _with_stored(value, path, whole=whole, seen=seen) for key, value in children(node)})
    elif isinstance(node, argparse.Namespace | StandIn):
        seen[id(node)] = node
        for key, value in vars(node).items():
            vars(node)[key] = _with_stored(value, path, whole=whole, seen=seen)
    seen[id(node)] = made
    return made


def _stored(meta: Tensor, path: Path) -> Stored:
    """A tensor of an archive, whose storage lies there in one piece."""
    if meta.layout != torch.strided or meta.is_quantized:
        raise ValueError(f"a tensor that is {meta.layout}")
    storage = meta.untyped_storage()
    start: int | None = getattr(storage, "_offset_in_file", None)
    if start is None:
        raise ValueError("a tensor without numbers")
    shape, stride, dtype = tuple(meta.shape), meta.stride(), meta.dtype
    first, size, length = int(meta.storage_offset()), dtype.itemsize, int(storage.nbytes())
    last = first + sum((count - 1) * step for count, step in zip(shape, stride, strict=True))
    if meta.numel() and (min(first, last) < 0 or (last + 1) * size > length):
        raise ValueError(f"a tensor of {shape} that ends behind its storage")
    where = str(path)
    if meta.is_contiguous():

        def numbers(a: int, b: int) -> Tensor:
            return read_bytes(path, start + (first + a) * size, (b - a) * size).view(dtype)

        made = in_one_piece(shape, dtype, numbers, where)
    else:

        def fetch(a: int, b: int) -> Tensor:
            return read_bytes(path, start, length).view(dtype).as_strided(shape, stride, first)[a:b].contiguous()

        made = Stored(shape, dtype, fetch, where)
    if meta.is_conj():
        made = mapped([made], lambda tensors: tensors[0].conj().resolve_conj(), by_rows=True)
    return mapped([made], lambda tensors: -tensors[0], by_rows=True) if meta.is_neg() else made
