"""Files of ``numpy.savez``, read array by array and written so: nothing in them is executed, no object is unpickled."""

from __future__ import annotations

import os
import secrets
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmoe.checkpoint.new_folder import sync
from dmoe.checkpoint.raw import read_bytes, start_of_entry
from dmoe.checkpoint.stored import Stored, in_one_piece

_DTYPES = {
    "<f2": torch.float16,
    "<f4": torch.float32,
    "<f8": torch.float64,
    "|i1": torch.int8,
    "<i2": torch.int16,
    "<i4": torch.int32,
    "<i8": torch.int64,
    "|u1": torch.uint8,
    "|b1": torch.bool,
    "<u2": torch.uint16,
    "<u4": torch.uint32,
    "<u8": torch.uint64,
}
# What numpy makes of JAX's bfloat16, whose name it does not know: two bytes of something.
_BFLOAT16 = ("|V2", "<V2")


def read_npz(path: Path) -> dict[str, Stored]:
    """The arrays of a file, by name, in its order; their numbers are read when they are asked for.

    Two bytes of no type are bfloat16, as which JAX leaves its arrays to numpy.

    Raises:
        OSError: no such file, or one that cannot be read.
        ValueError: a damaged file, or arrays of objects, or of a type that PyTorch does not have.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            wrong = next((each.filename for each in entries if not each.filename.endswith(".npy")), None)
            if wrong is not None:
                raise ValueError(f"expected arrays (.npy) alone, got {wrong}")
            return {each.filename.removesuffix(".npy"): _array(path, archive, each) for each in entries}
    except (ValueError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise ValueError(f"{path}: expected a file of numpy.savez, got: {error}") from error


def _array(path: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Stored:
    from numpy.lib import format as npy

    with archive.open(entry) as file:
        version = npy.read_magic(file)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, fortran, kind = read(file)
        start = file.tell()
    name = entry.filename.removesuffix(".npy")
    if kind.hasobject:
        raise ValueError(f"{name} holds Python objects, which would have to be unpickled: nothing of it was executed")
    dtype = torch.bfloat16 if kind.str in _BFLOAT16 else _DTYPES.get(kind.str)
    if dtype is None:
        raise ValueError(f"{name} of dtype {kind.str}, which PyTorch does not have (one of {', '.join(_DTYPES)})")
    shape = tuple(int(each) for each in shape)
    size = torch.Size(shape).numel() * dtype.itemsize
    if entry.file_size != start + size:
        raise ValueError(f"{name} of {shape}, {kind.str}, in {entry.file_size - start} bytes instead of {size}")
    whole = _reader(path, entry, start, size)
    if entry.compress_type == zipfile.ZIP_STORED and not fortran:
        place = start_of_entry(path, entry) + start
        bytes_of = lambda a, b: read_bytes(path, place + a, b - a)  # noqa: E731
        return in_one_piece(shape, dtype, _numbers(bytes_of, dtype), str(path))

    def fetch(first: int, last: int) -> Tensor:
        numbers = whole().view(dtype)
        array = numbers.view(shape[::-1]).permute(*range(len(shape) - 1, -1, -1)) if fortran else numbers.view(shape)
        return array[first:last].contiguous() if shape else array

    return Stored(shape, dtype, fetch, str(path))


def _numbers(bytes_of: Callable[[int, int], Tensor], dtype: torch.dtype) -> Callable[[int, int], Tensor]:
    return lambda a, b: bytes_of(a * dtype.itemsize, b * dtype.itemsize).view(dtype)


def _reader(path: Path, entry: zipfile.ZipInfo, start: int, size: int) -> Callable[[], Tensor]:
    def whole() -> Tensor:
        try:
            with zipfile.ZipFile(path) as archive, archive.open(entry) as file:
                file.read(start)
                content = bytearray(file.read(size))
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
            raise ValueError(f"{path}: expected a whole {entry.filename}, got: {error}") from error
        return torch.frombuffer(content, dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)

    return whole


def write_npz(
    path: Path,
    tensors: Mapping[str, Stored],
    *,
    overwrite: bool = False,
    progress: Callable[[int], object] = lambda count: None,
) -> None:
    """Write arrays under their names, one at a time: the whole file or none.

    bfloat16 is written as two bytes of no type, as JAX does.

    Raises:
        FileExistsError: there is something of that name, and ``overwrite`` is not set; or no file.
        OSError: it cannot be written.
        ValueError: a dtype that numpy does not have.
    """
    if os.path.lexists(path) and not (overwrite and path.is_file()):
        raise FileExistsError(f"{path}: expected nothing of that name, got something; overwrite replaces a file")
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    try:
        with open(part, "xb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for name, tensor in tensors.items():
                with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as entry:
                    _write_array(entry, name, tensor)
                progress(tensor.nbytes)
        sync(part)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync(path.parent)


def _write_array(file: Any, name: str, tensor: Stored) -> None:
    from numpy.lib import format as npy

    names = {dtype: kind for kind, dtype in _DTYPES.items()} | {torch.bfloat16: "<V2"}
    if tensor.dtype not in names:
        raise ValueError(f"{name}: expected a dtype that numpy has, got {tensor.dtype}")
    npy.write_array_header_1_0(file, {"descr": names[tensor.dtype], "fortran_order": False, "shape": tensor.shape})
    numbers = tensor.read().contiguous().reshape(-1).view(torch.uint8)
    file.write(memoryview(numbers.numpy()))  # type: ignore[arg-type]
