"""Safetensors files that several processes fill: each writes the parts that it has where they belong.

What a file holds, and where, follows from names, shapes and dtypes alone, so that everybody knows it beforehand and no
tensor has to be anywhere as a whole. The files are the same whoever wrote which part.

A file is the length of its header (8 bytes, little endian), the header in JSON, and the tensors in its order, each in
C order, little endian.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from dmoe.checkpoint.hub_folder import DTYPES
from dmoe.checkpoint.hub_writer import MAX_SHARD_BYTES, shard_names, write_index
from dmoe.checkpoint.stored import Stored


class SharedFiles:
    """The files of one model, the same for every process that writes some of it.

    Args:
        tensors: all of them, in the order of the files; shapes and dtypes only are looked at.
        max_shard_bytes: of the tensors of one file; a larger tensor gets a file of its own.

    Attributes:
        names: of the files.

    Raises:
        ValueError: a dtype that the format does not have, no tensors, or a machine that is not little endian.
    """

    def __init__(self, tensors: Mapping[str, Tensor], max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        if sys.byteorder != "little":
            raise ValueError(f"safetensors: expected a little-endian machine, got {sys.byteorder}")
        if not tensors or max_shard_bytes < 1:
            raise ValueError(f"safetensors: expected tensors and at least 1 byte a file, got {max_shard_bytes}")
        cut: list[dict[str, Tensor]] = [{}]
        held = 0  # bytes of the last
        for name, tensor in tensors.items():
            if cut[-1] and held + tensor.nbytes > max_shard_bytes:
                cut.append({})
                held = 0
            cut[-1][name] = tensor
            held += tensor.nbytes
        self.names = shard_names(len(cut))
        self._headers: dict[str, bytes] = {}
        self._sizes: dict[str, int] = {}
        self._places: dict[str, tuple[str, int, Tensor]] = {}
        for file, its in zip(self.names, cut, strict=True):
            self._plan(file, its)

    def _plan(self, file: str, tensors: Mapping[str, Tensor]) -> None:
        self._headers[file] = header_of(tensors)
        start = len(self._headers[file])
        for name, tensor in tensors.items():
            self._places[name] = (file, start, tensor)
            start += tensor.nbytes
        self._sizes[file] = start

    def create(self, folder: Path) -> None:
        """Make the files, with their headers, at their sizes, and the index; one process does."""
        for file, header in self._headers.items():
            with open(folder / file, "xb") as stream:
                stream.write(header)
                stream.truncate(self._sizes[file])
        if len(self.names) > 1:
            weight_map = {name: file for name, (file, _, _) in self._places.items()}
            write_index(folder, weight_map, sum(tensor.nbytes for _, _, tensor in self._places.values()))

    def writer(self, folder: Path) -> PartWriter:
        """What writes parts into the files, once they are there."""
        return PartWriter(folder, self._places)


def header_of(tensors: Mapping[str, Tensor | Stored], metadata: Mapping[str, str] | None = None) -> bytes:
    """What a file begins with: the length of its header, and the header, with texts of one's own.

    Raises:
        ValueError: a dtype that the format does not have.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    position = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise ValueError(f"safetensors: {name}: expected a dtype of safetensors, got {tensor.dtype}")
        ends = [position, position + tensor.nbytes]
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": ends}
        position = ends[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_safetensors(
    file: BinaryIO,
    tensors: Mapping[str, Stored],
    progress: Callable[[int], object] = lambda count: None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a file of its own, one tensor in memory at a time.

    Args:
        file: open for writing.
        tensors: by name.
        progress: told the bytes of each tensor.
        metadata: texts that go into the header.

    Raises:
        OSError: it cannot be written.
        ValueError: a dtype that the format does not have.
    """
    file.write(header_of(tensors, metadata))
    for stored in tensors.values():
        file.write(_bytes_of(stored.read()))
        progress(stored.nbytes)


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


class PartWriter:
    """Writes parts of tensors into files that :meth:`SharedFiles.create` made. A context manager: what is written is on
    the disk when it is left without an error.

    Args:
        folder: with the files.
        places: of each tensor its file, where it begins there, and its shape and dtype.
    """

    def __init__(self, folder: Path, places: Mapping[str, tuple[str, int, Tensor]]) -> None:
        self._folder, self._places = folder, places
        self._open: dict[str, int] = {}

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            for descriptor in self._open.values() if kind is None else ():
                os.fsync(descriptor)
        finally:
            for descriptor in self._open.values():
                os.close(descriptor)
            self._open.clear()

    def write(self, name: str, row: int, part: Tensor) -> None:
        """Write consecutive rows of a tensor, or all of it.

        Args:
            name: of the tensor.
            row: the first row, in the first dimension.
            part: in the shape of the tensor, but for the first dimension.

        Raises:
            ValueError: a part that is none of this tensor.
            OSError: the disk is full, and the like.
        """
        file, start, whole = self._places[name]
        fits = part.dim() == whole.dim() and part.shape[1:] == whole.shape[1:] and part.dtype == whole.dtype
        if not fits or (whole.dim() and row + part.shape[0] > whole.shape[0]):
            raise ValueError(
                f"safetensors: {name}: expected rows of {tuple(whole.shape)} {whole.dtype} from {row} on, got "
                f"{tuple(part.shape)} {part.dtype}"
            )
        if part.numel() == 0:
            return
        if file not in self._open:
            self._open[file] = os.open(self._folder / file, os.O_WRONLY)
        position = start + (row * (whole.nbytes // whole.shape[0]) if whole.dim() else 0)
        content = _bytes_of(part)
        while content:
            done = os.pwrite(self._open[file], content[: 1 << 28], position)
            content, position = content[done:], position + done
