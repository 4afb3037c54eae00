"""The files of a Hugging Face model folder: tensors, read lazily, and config.json. Nothing in them is executed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmoe.checkpoint.stored import Stored, total_bytes
from dmoe.checkpoint.torch_reader import read_lazily

CONFIG = "config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


@dataclass(frozen=True)
class Files:
    """What a folder holds.

    Attributes:
        tensors: by name, in the order of the files.
        where: the file that lists them, for messages.
        config: of ``config.json``; None where there is none.
        config_path: where that is, or would be.
        max_shard_bytes: of the tensors of the largest of several files; None of a single one.
    """

    tensors: Mapping[str, Stored]
    where: str
    config: dict[str, Any] | None
    config_path: Path
    max_shard_bytes: int | None = None


def model_file(path: Path) -> Path | None:
    """The file that lists a folder's tensors, or the given one itself; None for anything else."""
    if path.is_dir():
        # Where there is an index, a single file beside it may be the first of many under another name.
        return next((path / name for name in (INDEX, SINGLE, BIN_INDEX, BIN) if (path / name).is_file()), None)
    return path if path.is_file() and path.suffix in (".safetensors", ".bin") else None


def read_config(path: Path) -> dict[str, Any] | None:
    """``config.json`` of a folder, or beside a file; None where there is none.

    Raises:
        ValueError: a file that holds something else than a JSON object.
    """
    from dmoe.checkpoint.hub_folder import read_json  # which needs safetensors, as the next two do

    path = _config_path(path)
    return read_json(path) if path.is_file() else None


def open_files(path: Path) -> Files:
    """The tensors and the config of a folder, or of one file.

    Raises:
        OSError: no model there, or a part of one missing.
        ValueError: damaged files, or an index that does not fit them.
    """
    file = model_file(path)
    if file is None:
        raise FileNotFoundError(
            f"{path}: expected a folder with {SINGLE} or {BIN}, or one with their index, got "
            f"{'none of them' if path.is_dir() else 'no such folder'}"
        )
    config = read_config(path)
    if file.name == BIN_INDEX:
        tensors = _indexed(file)
    elif file.suffix == ".bin":
        tensors = _of_bin(file)
    else:
        from dmoe.checkpoint.hub_folder import stored_tensors

        tensors = stored_tensors(file.parent if file.name == INDEX else file)
    return Files(tensors, str(file), config, _config_path(path), _largest(tensors))


def _config_path(path: Path) -> Path:
    return (path if path.is_dir() else path.parent) / CONFIG


def _largest(tensors: Mapping[str, Stored]) -> int | None:
    by_file: dict[str, dict[str, Stored]] = {}
    for name, tensor in tensors.items():
        by_file.setdefault(tensor.where, {})[name] = tensor
    return max(map(total_bytes, by_file.values())) if len(by_file) > 1 else None


def _of_bin(file: Path) -> dict[str, Stored]:
    content = read_lazily(file)
    wrong = not isinstance(content, Mapping) or [name for name, each in content.items() if not isinstance(each, Stored)]
    if wrong or not content:
        got = f"{wrong[0]!r} beside them" if isinstance(wrong, list) and wrong else type(content).__name__
        raise ValueError(f"{file}: expected a state dict of tensors alone, got {got}")
    return {str(name): tensor for name, tensor in content.items()}


def _indexed(index: Path) -> dict[str, Stored]:
    from dmoe.checkpoint.hub_folder import read_json

    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: expected a weight_map of tensors and files, got {weight_map!r:.80}")
    by_file: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".bin"):
            raise ValueError(f"{index}: expected names of .bin files in the same folder, got {file!r}")
        by_file.setdefault(file, set()).add(name)
    found: dict[str, Stored] = {}
    for file, wanted in by_file.items():
        path = index.parent / file
        if not path.is_file():
            raise FileNotFoundError(f"{path}: expected this file, which {index.name} names, got none")
        tensors = _of_bin(path)
        if missing := sorted(wanted - tensors.keys()):
            raise ValueError(f"{path}: expected {missing[0]}, as {index.name} says, got no such tensor")
        found |= {name: tensor for name, tensor in tensors.items() if name in wanted}
    return found
