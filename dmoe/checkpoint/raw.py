"""Bytes of files, as tensors."""

from __future__ import annotations

import os
import zipfile

import torch
from torch import Tensor


def start_of_entry(path: str | os.PathLike[str], entry: zipfile.ZipInfo) -> int:
    """Where in an archive an entry's own bytes begin: its header there may be longer than the list at the end says."""
    with open(path, "rb") as file:
        file.seek(entry.header_offset + 26)
        lengths = file.read(4)
    return entry.header_offset + 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")


def read_bytes(path: str | os.PathLike[str], start: int, length: int) -> Tensor:
    """Some bytes of a file, ``(length,)`` uint8.

    Raises:
        OSError: it cannot be read.
        ValueError: it is shorter than that.
    """
    made = torch.empty(length, dtype=torch.uint8)
    if not length:
        return made
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        view, done = memoryview(made.numpy()), 0  # type: ignore[arg-type]
        while done < length:
            got = file.readinto(view[done:])
            if not got:
                raise ValueError(f"{path}: expected {length} bytes at {start}, got {done}: the file is cut off")
            done += got
    return made
