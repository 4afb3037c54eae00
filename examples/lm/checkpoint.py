"""Checkpoints: one file with all runs in it, replaced as a whole or not at all."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dmoe.checkpoint import write_together

from .data import Corpus
from .settings import Settings, UsageError
from .training import Run

FORMAT = 1
FILE = "checkpoint.pt"


def save(folder: Path, settings: Settings, corpus: Corpus, runs: Sequence[Run]) -> Path:
    """Writes ``folder/checkpoint.pt`` so that a crash at any moment leaves the old file or the new one, whole.

    All ranks call this; rank 0 writes, and the others wait until it has.

    Raises:
        UsageError: on all ranks: it cannot be written, as on a full disk.
    """
    ranks = runs[0].ranks
    content = {
        "format": FORMAT,
        "settings": settings.to_dict(),
        "text": corpus.fingerprint,
        "teacher": None if runs[0].teacher is None else runs[0].teacher.facts,
        "runs": {run.name: run.state_dict() for run in runs},
    }
    target = folder / FILE
    try:
        write_together(target, {target: content} if ranks.first else {}, group=ranks.control, overwrite=True)
    except OSError as error:
        raise UsageError(f"--out {folder}: expected to write {FILE}, got: {error}") from error
    return target


def load(folder: Path, flag: str = "--resume") -> dict[str, Any]:
    """The content of ``folder/checkpoint.pt``, on the CPU: tensors and plain values, nothing that runs when it is read.

    Args:
        folder: of a run.
        flag: what the user named it with, for errors.

    Raises:
        UsageError: there is none, or it is no checkpoint of this program.
    """
    path = folder / FILE
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UsageError(f"{flag}: {path} does not exist. Start a run with --out {folder}") from None
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UsageError(f"{flag}: {path} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UsageError(f"{flag}: {path} is no checkpoint of this program in format {FORMAT}")
    return content


def restore(content: dict[str, Any], corpus: Corpus, runs: Sequence[Run]) -> None:
    """Puts the runs where the checkpoint left them.

    Raises:
        UsageError: the text is not the one that the checkpoint was trained on.
    """
    if content["text"] != corpus.fingerprint:
        raise UsageError(
            f"--resume: the text of {corpus.name} is not the one that the checkpoint was trained on "
            f"({len(corpus.train):,} + {len(corpus.held_out):,} bytes now); the run could not go on as it began"
        )
    for run in runs:
        run.load_state_dict(content["runs"][run.name])


def progress(folder: Path) -> tuple[int, int] | None:
    """How far the run in ``folder`` is, as (steps made, steps wanted) of its slowest model; None without one."""
    if not (folder / FILE).exists():
        return None
    content = load(folder)
    return min(run["step"] for run in content["runs"].values()), content["settings"]["steps"]
