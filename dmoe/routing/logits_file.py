"""Router logits from a file that somebody else may have made: numbers are read, nothing is run."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def read_logits(path: Path) -> Tensor:
    """``(T, E)`` float32 from a ``.pt`` (a tensor, read with ``weights_only=True``), a ``.csv`` or a ``.json`` of rows.

    Raises:
        OSError: no such file, or one that cannot be read.
        ValueError: no such numbers in it, or NaN, or infinity.
    """
    readers = {".pt": _tensor, ".csv": _csv, ".json": _json}
    if path.suffix not in readers:
        raise ValueError(f"{path}: expected a file named *.pt, *.csv or *.json, got {path.suffix or 'no suffix'}")
    try:
        logits = readers[path.suffix](path)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a damaged file ends in an error of almost any type
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        kind = "a tensor of torch.save" if path.suffix == ".pt" else "rows of as many numbers each"
        raise ValueError(f"{path}: expected {kind}, got: {reason}") from error
    if logits.dim() != 2 or 0 in logits.shape:
        raise ValueError(f"{path}: expected (T, E) numbers, got shape {tuple(logits.shape)}")
    if not torch.isfinite(logits).all():
        row = int((~torch.isfinite(logits).all(1)).nonzero()[0])
        raise ValueError(f"{path}: expected finite numbers, got {logits[row].tolist()} in row {row}")
    return logits


def _tensor(path: Path) -> Tensor:
    content: Any = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, Tensor):
        raise ValueError(type(content).__name__)
    if content.is_complex() or content.dtype == torch.bool:
        raise ValueError(str(content.dtype))
    return content.detach().to_dense().float()


def _csv(path: Path) -> Tensor:
    with path.open(newline="") as lines:
        return _rows([row for row in csv.reader(lines) if row])


def _json(path: Path) -> Tensor:
    content = json.loads(path.read_text())
    if not isinstance(content, list) or not all(isinstance(row, list) for row in content):
        raise ValueError("no list of lists")
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for row in content for value in row):
        raise ValueError("something that is no number")
    return _rows(content)


def _rows(rows: list[list[Any]]) -> Tensor:
    widths = {len(row) for row in rows}
    if len(widths) > 1:
        raise ValueError(f"rows of {min(widths)} to {max(widths)}")
    return torch.tensor([[float(value) for value in row] for row in rows], dtype=torch.float32, device="cpu")
