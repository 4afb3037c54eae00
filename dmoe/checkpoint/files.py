"""Reading and writing checkpoint files, and the order of ranks that their names tell."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dmoe.activations import ClampedSwiGLU, SoftcappedSwiGLU
from dmoe.checkpoint.together import finish_writing, write_together
from dmoe.config import MoEConfig
from dmoe.router_family import registered


def read_file(path: str | os.PathLike[str], *, mapped: bool = False) -> dict[str, Any]:
    """A checkpoint, on the CPU.

    Only plain data is loaded (``weights_only=True``), and :class:`dmoe.MoEConfig` with a router of a registered family.
    What a killed process had made valid in the file's folder is put in place first: see
    :func:`dmoe.checkpoint.finish_writing`.

    Args:
        path: of the file.
        mapped: leave tensors in the file, and read them when they are used: for a look at what is there, and for data
            that goes into other files. They change with the file where a program writes over it in place, and end
            the process where it gets shorter, so nothing of them may be kept: not in an optimizer, which keeps what
            ``load_state_dict`` gets.

    Raises:
        OSError: no such file, or one that cannot be read.
        ValueError: a file that is no checkpoint, or damaged.
        TypeError: a checkpoint of DTensors, or of objects that are no plain data.
    """
    finish_writing(Path(path).parent)
    try:
        with torch.serialization.safe_globals(list(plain_classes())):
            try:
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
            except RuntimeError as error:
                if "mmap can only be used" not in str(error):
                    raise
                content = torch.load(path, map_location="cpu", weights_only=True)  # as torch.save wrote before 1.6
    except pickle.UnpicklingError as error:
        if "DTensor" in str(error) or "ShardedTensor" in str(error):
            raise TypeError(
                f"{path}: expected plain tensors, got DTensors: files of those are read and written by "
                "torch.distributed.checkpoint, which knows their parts; or save value.to_local()"
            ) from error
        refused = re.search(
            r"(?:Unsupported (?:global|class): .*?|unsupported GLOBAL \S+)(?=\s*was not| whose|\s*$)",
            str(error),
            re.MULTILINE,
        )
        no_pickle = re.search(r"Unsupported operand.*", str(error))  # a byte that stands for nothing there
        reason = (refused or no_pickle or [str(error).splitlines()[0]])[0]
        plain = "" if no_pickle else " with plain data only"
        raise ValueError(f"{path}: expected a file of torch.save{plain}, got: {reason}") from error
    except Exception as error:  # bytes that are no pickle, or a part of one, end in an error of almost any type
        if isinstance(error, MemoryError) or getattr(error, "filename", None) is not None:  # no such file, say
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path}: expected a file of torch.save, got: {reason}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: expected a state dict, or a dict around one, got {type(content).__name__}")
    return dict(content) if type(content) is dict else content  # type: ignore[return-value]


def plain_classes() -> tuple[type, ...]:
    """dmoe's own classes that a file may hold: a layer's config, and what is in one."""
    return MoEConfig, ClampedSwiGLU, SoftcappedSwiGLU, *registered()


def write_file(path: str | os.PathLike[str], content: Mapping[str, Any], *, overwrite: bool = False) -> None:
    """Write a checkpoint so that a crash at any moment leaves the old file or the new one, whole.

    Raises:
        FileExistsError: there is one, and ``overwrite`` is not set.
        OSError: the folder is missing, the disk is full, and the like.
    """
    write_together(path, {path: content}, overwrite=overwrite)


def in_rank_order(paths: Sequence[str]) -> list[str]:
    """Files by the number of the rank in their names, as ``rank10.pt`` after ``rank2.pt``.

    Names that differ in one number only are ordered by it, and their numbers must be 0 to W - 1; of several numbers
    that differ, one after ``rank`` counts. Other names stay as given.

    Raises:
        ValueError: a file twice, a rank missing, or names in which any of several numbers could be the rank.
    """
    real = [os.path.realpath(path) for path in paths]
    for path, resolved in zip(paths, real, strict=True):
        if real.count(resolved) > 1:
            raise ValueError(f"{path}: expected each rank's file once, got it {real.count(resolved)} times")
    pieces = [re.split(r"(\d+)", path) for path in paths]
    if len(paths) < 2 or len({tuple(piece[::2]) for piece in pieces}) > 1:
        return list(paths)
    varying = [n for n in range(1, len(pieces[0]), 2) if len({int(piece[n]) for piece in pieces}) > 1]
    if len(varying) > 1:
        named = [n for n in varying if re.search(r"rank[^a-z0-9]*$", pieces[0][n - 1], re.IGNORECASE)]
        if len(named) != 1:
            raise ValueError(
                f"{paths[0]}, ...: expected names that differ in one number, the rank, got {len(varying)} numbers that "
                "differ; give the files in the order of the ranks, with --as-given"
            )
        varying = named
    ranks = [int(piece[varying[0]]) for piece in pieces]
    missing = sorted(set(range(max(ranks) + 1)) - set(ranks))
    if missing:
        raise ValueError(
            f"{paths[0]}, ...: expected files of ranks 0 to {max(ranks)}, got none of rank "
            f"{', '.join(map(str, missing))}; if the numbers are no ranks, use --as-given"
        )
    if len(set(ranks)) < len(ranks):
        twice = next(rank for rank in ranks if ranks.count(rank) > 1)
        raise ValueError(f"{paths[0]}, ...: expected one file of each rank, got {ranks.count(twice)} of rank {twice}")
    return [path for _, path in sorted(zip(ranks, paths, strict=True))]
