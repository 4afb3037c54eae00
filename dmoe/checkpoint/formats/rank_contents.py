"""What is in the files of ranks: a state dict, maybe under a key, and what stands beside it; and which files."""

from __future__ import annotations

import os
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmoe.checkpoint.files import in_rank_order, plain_classes
from dmoe.checkpoint.stored import Stored
from dmoe.checkpoint.torch_reader import read_lazily

CHUNKS = re.compile(r"model\d+")  # of Megatron's virtual pipeline
SHARED = " of all ranks"  # of a file's content, where that was apart: a key that no file has
ENDINGS = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")  # of files that hold a state dict
# States of optimizers and the like: of other parameters, or shapes, than the converted ones.
OPTIMIZERS = ("optimizer", "optimizer_state", "last_optimizer_state", "opt_param_scheduler", "lr_scheduler", "scaler")
CONTAINERS = ("model", "module", "state_dict")


@dataclass(frozen=True)
class Content:
    """What one rank's file holds.

    Attributes:
        states: the model's state dict by the key under which it lies; "" where the file is that dict.
        beside: everything else at the top of the file.
    """

    states: dict[str, Mapping[str, Any]]
    beside: dict[str, Any]

    @classmethod
    def of(cls, path: Path) -> Content:
        """Of a file.

        Raises:
            OSError, ValueError: see :func:`read_lazily`; or a file without a state dict.
        """
        if path.suffix == ".safetensors":
            from dmoe.checkpoint.hub_folder import metadata_of, read_json_text, stored_tensors

            tensors, texts = stored_tensors(path), metadata_of(path)
            return cls({"": tensors}, {"dmoe": read_json_text(texts["dmoe"], path)} if "dmoe" in texts else {})
        content = _remembered(path)
        if not isinstance(content, Mapping):
            raise ValueError(f"{path}: expected a state dict, or a dict around one, got {type(content).__name__}")
        keys = [key for key in content if key in CONTAINERS or (isinstance(key, str) and CHUNKS.fullmatch(key))]
        keys = [key for key in keys if isinstance(content[key], Mapping)]
        if not keys or any(isinstance(value, Stored) and "." in str(key) for key, value in content.items()):
            return cls({"": content}, {})
        chunks = [key for key in keys if CHUNKS.fullmatch(key)] or keys[:1]
        return cls(
            {key: content[key] for key in chunks},
            {key: value for key, value in content.items() if key not in chunks},
        )

    def tensors(self) -> dict[str, Stored]:
        """The model's tensors by name; of several chunks with their key and a slash before."""
        return {
            self.prefix(key) + name: value
            for key, state in self.states.items()
            for name, value in state.items()
            if isinstance(value, Stored) and isinstance(name, str)
        }

    def prefix(self, key: str) -> str:
        """Of names in one of the state dicts."""
        return f"{key}/" if len(self.states) > 1 else ""


def nested(
    state: Mapping[str, Any], values: Mapping[str, Any], containers: Sequence[str], beside: Mapping[str, Any]
) -> dict[str, Any]:
    """A file's content from a state dict, under the key or keys that it lay under."""
    state = {**state, **values}
    if len(containers) > 1:
        chunks: dict[str, dict[str, Any]] = {key: {} for key in containers}
        for name, value in state.items():
            key, _, own = name.partition("/")
            chunks[key][own] = value
        return {**beside, **chunks}
    return {**beside, containers[0]: dict(state)} if containers[0] else {**beside, **state}


_recent: OrderedDict[Any, Any] = OrderedDict()  # what files hold besides numbers, of those that were read last
_REMEMBERED = 64


def _remembered(path: Path) -> Any:
    """What a file holds: every layout looks at it, one after the other."""
    stat = path.stat()
    key = (os.path.realpath(path), stat.st_mtime_ns, stat.st_size, stat.st_ino)
    if key not in _recent:
        _recent[key] = read_lazily(path, known=plain_classes())
        if len(_recent) > _REMEMBERED:
            _recent.popitem(last=False)
    return _recent[key]


def values_of(content: Content) -> dict[str, Any]:
    """What a state dict holds besides tensors."""
    return {
        content.prefix(key) + name: value
        for key, state in content.states.items()
        for name, value in state.items()
        if not isinstance(value, Stored) and isinstance(name, str) and "_extra_state" not in name
    }


_RANK = re.compile(r"\{rank(?::0(\d+)d?)?\}")


def filled(pattern: str, rank: int) -> str:
    """A name with a rank's number for ``{rank}``, or ``{rank:02}``."""
    return _RANK.sub(lambda match: f"{rank:0{match[1] or 1}}", pattern)


def expanded(source: Path) -> list[Path]:
    """The files that a name stands for: of all ranks where it has ``{rank}``, of a folder those of ``torch.save``."""
    if _RANK.search(str(source)):
        return _of_ranks(source)
    if source.is_dir():
        return sorted(file for file in source.iterdir() if file.suffix in ENDINGS or ".pth.rank" in file.name)
    return [source]


def _of_ranks(pattern: Path) -> list[Path]:
    """The files of ranks 0, 1, ... up to the last that there is.

    Raises:
        FileNotFoundError: one is missing.
    """
    parts = pattern.parts
    first = next(n for n, part in enumerate(parts) if _RANK.search(part))
    number = re.compile(_RANK.sub(r"(\\d+)", re.escape(parts[first]).replace(r"\{", "{").replace(r"\}", "}"), count=1))
    folder = Path(*parts[:first])
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    ranks = [int(match[1]) for name in names if (match := number.fullmatch(name))]
    files = [Path(filled(str(pattern), rank)) for rank in range(max(ranks, default=0) + 1)]
    for rank, file in enumerate(files):
        if not file.exists():
            raise FileNotFoundError(f"{file}: expected the file of rank {rank}, got none")
    return files


def in_order_of_ranks(files: Sequence[Path]) -> list[Path]:
    """Files in the order of the numbers in their names; see :func:`dmoe.checkpoint.files.in_rank_order`.

    Raises:
        ValueError: one is missing, or the next lies beside them: of some layouts nothing else would tell that a file
            is missing.
    """
    ordered = [Path(file) for file in in_rank_order([str(file) for file in files])]
    if len(ordered) > 1:
        last, before = (re.split(r"(\d+)", str(file)) for file in (ordered[-1], ordered[-2]))
        varying = [n for n in range(1, len(last), 2) if len(last) == len(before) and last[n] != before[n]]
        if len(varying) == 1:
            digits = last[varying[0]]
            number = str(int(digits) + 1).zfill(len(digits) if digits.startswith("0") else 1)
            following = Path("".join([*last[: varying[0]], number, *last[varying[0] + 1 :]]))
            if following.exists():
                raise ValueError(
                    f"{following}: expected the files of all ranks, got {len(ordered)} without this one, which lies "
                    "beside them"
                )
    return ordered
