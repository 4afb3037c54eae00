"""Model folders in Hugging Face's format, written so that a reader finds all of one or nothing of it.

The files are those of :mod:`dmoe.checkpoint.hub_folder`.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dmoe.checkpoint.hub_folder import INDEX, SINGLE
from dmoe.checkpoint.new_folder import sync

MAX_SHARD_BYTES = 4 * 2**30


class ShardWriter:
    """Writes tensors into safetensors files of a bounded size, as they come: no more than one file's are in memory.

    Files lie under hidden names until :meth:`finish`, which names them and writes the index last; leaving the context
    finishes, or removes them where there was an error. Several processes can write one folder's shards: each leaves
    its own with :meth:`close`, and one names them all with :func:`name_shards`.

    Args:
        folder: an existing one.
        max_shard_bytes: of the tensors of one file; a larger tensor gets a file of its own.
    """

    def __init__(self, folder: str | os.PathLike[str], max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        if max_shard_bytes < 1:
            raise ValueError(f"ShardWriter: max_shard_bytes: expected at least 1, got {max_shard_bytes}")
        self.folder, self.max_shard_bytes = Path(folder), max_shard_bytes
        self.parts: dict[str, dict[str, int]] = {}
        self._names: set[str] = set()
        self._held: dict[str, Tensor] = {}
        self._bytes = 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if kind is None:
            self.finish()
        else:
            self.discard()

    def add(self, name: str, tensor: Tensor) -> None:
        """Write a tensor, soon: its values must not change before the writer is closed.

        Raises:
            ValueError: a second tensor of this name.
            OSError: the disk is full, and the like.
        """
        if name in self._names:
            raise ValueError(f"ShardWriter: {name}: expected one tensor of this name, got a second")
        self._names.add(name)
        tensor = tensor.detach().to("cpu").contiguous()
        if self._held and self._bytes + tensor.nbytes > self.max_shard_bytes:
            self._flush()
        if any(_overlap(tensor, held) for held in self._held.values() if _storage(held) == _storage(tensor)):
            tensor = tensor.clone()  # the format holds no tensor twice, and would refuse it
        self._held[name] = tensor
        self._bytes += tensor.nbytes

    def close(self) -> dict[str, dict[str, int]]:
        """Write what is left; returns ``{hidden file: {tensor: bytes}}``, for :func:`name_shards`."""
        if self._held:
            self._flush()
        return self.parts

    def finish(self) -> list[str]:
        """Write what is left, name the files, write the index; returns the files' names."""
        try:
            return name_shards(self.folder, self.close())
        except BaseException:
            self.discard()
            raise

    def discard(self) -> None:
        """Remove what was written."""
        self._held.clear()
        for part in self.parts:
            (self.folder / part).unlink(missing_ok=True)

    def _flush(self) -> None:
        part = f".{secrets.token_hex(8)}.safetensors.part"
        self.parts[part] = {name: tensor.nbytes for name, tensor in self._held.items()}
        try:
            save_file(self._held, self.folder / part, metadata={"format": "pt"})
        except SafetensorError as error:  # which does not say that it is about a file
            raise OSError(f"{self.folder}: expected to write a file of {self._bytes} bytes, got: {error}") from error
        sync(self.folder / part)
        self._held, self._bytes = {}, 0


def name_shards(folder: str | os.PathLike[str], parts: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Give the hidden files of :meth:`ShardWriter.close` their names, in this order, and write their index last.

    Args:
        folder: theirs.
        parts: ``{hidden file: {tensor: bytes}}``, of all writers.

    Returns:
        The files' names.

    Raises:
        FileExistsError: there is a model in the folder, of which a killed process would leave a mixture.
        ValueError: a tensor in two files, or no files.
        OSError: the folder cannot be written.
    """
    folder = Path(folder)
    for file in (SINGLE, INDEX):
        if (folder / file).exists():
            raise FileExistsError(f"{folder / file}: expected a folder without a model, got one with this file")
    names = shard_names(len(parts))
    weight_map: dict[str, str] = {}
    for name, tensors in zip(names, parts.values(), strict=True):
        if twice := weight_map.keys() & tensors:
            raise ValueError(f"{folder}: expected each tensor in one file, got {min(twice)} in two")
        weight_map |= dict.fromkeys(tensors, name)
    if not weight_map:
        raise ValueError(f"{folder}: expected tensors to write, got none")
    for part, name in zip(parts, names, strict=True):
        os.replace(folder / part, folder / name)
    if len(names) > 1:
        total = sum(size for tensors in parts.values() for size in tensors.values())
        write_index(folder, weight_map, total)
    sync(folder)
    return names


def shard_names(count: int) -> list[str]:
    """Of a model's safetensors files."""
    if count == 1:
        return [SINGLE]
    return [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]


def write_index(folder: Path, weight_map: Mapping[str, str], total_bytes: int) -> None:
    """Say in which of several files each tensor is."""
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / INDEX, index)


def write_json(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Write a JSON object so that a crash leaves the old file or the new one, whole."""
    path = Path(path)
    part = path.with_name(f".{secrets.token_hex(8)}.{path.name}.part")
    try:
        part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        sync(part)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _overlap(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() < b.data_ptr() + b.nbytes and b.data_ptr() < a.data_ptr() + a.nbytes
