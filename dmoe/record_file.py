"""Integer tensors in a file that executes nothing when read, and that says so when it is damaged.

The layout is safetensors': eight bytes with the length of a JSON header, the header, and the bytes of the tensors, one
behind the other; any reader of it opens the file. The header's metadata holds a SHA-256 of these bytes and of the rest
of the header, as the format itself would not see a flipped one.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import os
import secrets
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

_PathLike: TypeAlias = str | os.PathLike[str]
DTYPES = {"U8": torch.uint8, "I16": torch.int16, "I32": torch.int32}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MOST_HEADER = 100_000_000  # bytes, as the format's own readers have it


def write_tensors(path: _PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors, whole or not at all: to a hidden file beside the path, which then takes its place.

    Args:
        path: the file, which is replaced where there is one.
        tensors: by name, of a dtype of :data:`DTYPES`.
        metadata: text beside them.
    """
    blocks, header, offset = [], {}, 0
    for name, tensor in tensors.items():
        here = tensor.detach().cpu().contiguous()
        data = ctypes.string_at(here.data_ptr(), here.nbytes) if here.numel() else b""
        place = {"dtype": _NAMES[here.dtype], "shape": list(here.shape), "data_offsets": [offset, offset + len(data)]}
        header[name] = place
        blocks.append(_little_endian(data, here.element_size()))
        offset += len(data)
    digest = _digest({"__metadata__": dict(metadata), **header}, blocks)
    head = json.dumps({"__metadata__": {**metadata, "sha256": digest}, **header}).encode()
    head += b" " * (-len(head) % 8)
    final = Path(path)
    part = final.with_name(f".{final.name}.{secrets.token_hex(4)}.part")
    try:
        with part.open("wb") as file:
            file.write(len(head).to_bytes(8, "little"))
            file.write(head)
            for block in blocks:
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, final)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise


def read_tensors(path: _PathLike, what: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What :func:`write_tensors` wrote.

    Args:
        path: the file.
        what: the operation's name, for errors.

    Returns:
        The tensors, and the metadata.

    Raises:
        ValueError: the file is no such file, or is damaged; with the path, what was expected and what was found.
        OSError: it cannot be read.
    """
    with Path(path).open("rb") as file:
        data = file.read()
    try:
        return _parse(data)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
        raise ValueError(
            f"{what}: {os.fspath(path)}: expected a whole file that RoutingRecord.save wrote, got {len(data)} bytes "
            f"that are not ({error})"
        ) from None


def _parse(data: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or not 2 <= length <= min(len(data) - 8, _MOST_HEADER):
        raise ValueError(f"a header of {length} bytes")
    header, body = json.loads(data[8 : 8 + length]), memoryview(data)[8 + length :]
    written, found = header["__metadata__"].pop("sha256"), _digest(header, [body])
    if written != found:
        raise ValueError(f"a SHA-256 of {written!r:.18} in the header, {found:.16} of what is there")
    metadata = header.pop("__metadata__")
    return {name: _tensor(place, body) for name, place in header.items()}, metadata


def _digest(header: dict[str, Any], blocks: Iterable[bytes | memoryview]) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for block in blocks:
        digest.update(block)
    return digest.hexdigest()


def _tensor(place: Any, body: memoryview) -> Tensor:
    dtype, shape, (begin, end) = DTYPES[place["dtype"]], place["shape"], place["data_offsets"]
    if not all(isinstance(size, int) and size >= 0 for size in (*shape, begin, end)):
        raise ValueError(f"a tensor of shape {shape} at bytes {begin} to {end}")
    if end - begin != math.prod(shape) * dtype.itemsize or end > len(body):
        raise ValueError(f"a tensor of shape {shape} in {end - begin} bytes, {len(body)} bytes of all tensors")
    if begin == end:
        return torch.empty(shape, dtype=dtype, device="cpu")
    block = bytearray(_little_endian(bytes(body[begin:end]), dtype.itemsize))
    return torch.frombuffer(block, dtype=dtype).view(shape)


def _little_endian(data: bytes, size: int) -> bytes:
    if sys.byteorder == "little" or size == 1:
        return data
    return b"".join(data[first : first + size][::-1] for first in range(0, len(data), size))
