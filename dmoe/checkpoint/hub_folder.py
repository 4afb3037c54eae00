"""Model folders in Hugging Face's format, read lazily: a tensor, or a part of one, when it is asked for.

====================================  ==============================================================================
file                                  what it is
====================================  ==============================================================================
``model.safetensors``                 all tensors, where they fit into one file
``model-00001-of-00003.safetensors``  else a part of them, and beside the parts
``model.safetensors.index.json``      ``{"metadata": {"total_size": bytes}, "weight_map": {tensor: file}}``
====================================  ==============================================================================

Safetensors and JSON only: nothing in a file is executed, and no file outside the folder is read.
:mod:`dmoe.checkpoint.hub_writer` writes them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dmoe.checkpoint.raw import read_bytes
from dmoe.checkpoint.stored import Stored, in_one_piece

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.complex64: "C64",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.bool: "BOOL",
}


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        OSError: no such file, or one that cannot be read.
        ValueError: a file that holds something else.
    """
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected a JSON object, got: {error}") from error
    return read_json_text(text, path)


def read_json_text(text: str, where: str | os.PathLike[str]) -> dict[str, Any]:
    """A JSON object from a text.

    Raises:
        ValueError: it is none.
    """
    try:
        content = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where}: expected a JSON object, got: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(content).__name__}")
    return content


def read_index(folder: str | os.PathLike[str]) -> dict[str, str]:
    """Which file of a folder holds which tensor, ``{name: file}``; only the files' headers are read.

    Raises:
        OSError: no such folder, no safetensors file in it, or a file that the index names is missing.
        ValueError: a damaged file, an index that leads out of the folder, or names tensors that its files do not have.
    """
    folder = Path(folder)
    if not (folder / INDEX).exists():
        if (folder / SINGLE).exists():
            return dict.fromkeys(_names(folder / SINGLE), SINGLE)
        pickled = [path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth")]
        got = f"{pickled[0]} (convert it: a pickle can run code)" if pickled else "neither"
        raise FileNotFoundError(f"{folder}: expected {SINGLE} or {INDEX}, got {got}")
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{folder / INDEX}: expected a weight_map of tensors and files, got {weight_map!r:.80}")
    by_file: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str):
            raise ValueError(f"{folder / INDEX}: expected names of safetensors files, got {file!r}")
        by_file.setdefault(file, set()).add(name)
    for file, wanted in by_file.items():
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(f"{folder / INDEX}: expected names of safetensors files in the same folder, got {file!r}")
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder}: expected {file}, which {INDEX} names, got no such file")
        if missing := sorted(wanted - _names(folder / file)):
            raise ValueError(f"{folder / file}: expected {missing[0]}, as {INDEX} says, got no such tensor")
    return weight_map


def stored_tensors(folder: str | os.PathLike[str]) -> dict[str, Stored]:
    """The tensors of a folder, or of a single safetensors file, in the order in which they lie there.

    Raises:
        OSError, ValueError: as :func:`read_index`; or a dtype that PyTorch does not have.
    """
    path = Path(folder)
    if path.is_file():
        _names(path)
        return _stored(path)
    files = read_index(path)
    found: dict[str, Stored] = {}
    for file in dict.fromkeys(files.values()):
        found |= {name: tensor for name, tensor in _stored(path / file).items() if files.get(name) == file}
    return found


def metadata_of(path: Path) -> dict[str, str]:
    """The texts in the header of a safetensors file."""
    texts: dict[str, str] = _header(path)[1].get("__metadata__", {})
    return texts


def _header(path: Path) -> tuple[int, dict[str, Any]]:
    """The length and the content of the header of a file that safetensors itself has found whole."""
    length = int.from_bytes(bytes(read_bytes(path, 0, 8).tolist()), "little")
    return length, json.loads(bytes(read_bytes(path, 8, length).tolist()))


def _stored(path: Path) -> dict[str, Stored]:
    length, header = _header(path)
    header.pop("__metadata__", None)
    dtypes = {name: dtype for dtype, name in DTYPES.items()}

    def stored(dtype: torch.dtype, shape: tuple[int, ...], begin: int) -> Stored:
        start, size = 8 + length + begin, dtype.itemsize
        return in_one_piece(
            shape, dtype, lambda a, b: read_bytes(path, start + a * size, (b - a) * size).view(dtype), str(path)
        )

    found = {}
    for name, told in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if told["dtype"] not in dtypes:
            raise ValueError(f"{path}: {name}: expected one of {', '.join(dtypes)}, got {told['dtype']}")
        found[name] = stored(dtypes[told["dtype"]], tuple(told["shape"]), told["data_offsets"][0])
    return found


def local_folder(model: str | os.PathLike[str]) -> Path:
    """The folder of a model: itself, or that of an id of the hub in the hub's cache. Nothing is fetched.

    Raises:
        FileNotFoundError: neither is there.
    """
    if os.path.isdir(model):
        return Path(model)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(model), local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError) as error:
        raise FileNotFoundError(
            f"{model}: expected a folder, or a model that is in the hub's cache (hf download {model}), got neither"
        ) from error


class HubFolder:
    """The tensors of a folder by name, each read when it is asked for. A context manager, which closes the files.

    What :meth:`read` returns may lie in the mapped file: it is good while the folder is open, and not to be written to.

    Args:
        folder: with ``config.json`` beside the tensors, or without.

    Attributes:
        folder: where it is.
        files: ``{tensor: file}``, see :func:`read_index`, which says what raises.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder, self.files = Path(folder), read_index(folder)
        self._open: dict[str, Any] = {}

    def __contains__(self, name: object) -> bool:
        return name in self.files

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def __enter__(self) -> HubFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the files."""
        for handle in self._open.values():
            handle.__exit__(None, None, None)
        self._open.clear()

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, from the file's header."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """A tensor's dtype; no more than its first number is read."""
        return self.read(name).dtype if self.shape(name) == () else self.read(name, slice(0, 0)).dtype

    def read(self, name: str, *index: slice) -> Tensor:
        """A tensor on the CPU, or the part of it that ``index`` takes: of each dimension in turn, without a step."""
        if not index:
            return self._handle(name).get_tensor(name)
        return self._slice(name)[index]

    def _slice(self, name: str) -> Any:
        return self._handle(name).get_slice(name)

    def _handle(self, name: str) -> Any:
        if name not in self.files:
            raise ValueError(f"{self.folder}: expected a tensor {name}, got none of that name")
        file = self.files[name]
        if file not in self._open:
            self._open[file] = _opened(self.folder / file)
        return self._open[file]


def _names(path: Path) -> set[str]:
    handle = _opened(path)
    names = set(handle.keys())
    handle.__exit__(None, None, None)
    return names


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a safetensors file, got: {error}") from error
