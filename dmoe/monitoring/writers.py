"""Where records go: a folder, TensorBoard, Weights & Biases, or any function. Rank 0 writes."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from dmoe.monitoring.heat_map import heat_map
from dmoe.monitoring.records import StepRecord, as_json
from dmoe.monitoring.token_counts import TokenTable

METRICS, TOKENS = "metrics.jsonl", "tokens.json"


class Writer(Protocol):
    """What a monitor hands its records to."""

    def write(self, record: StepRecord) -> None:
        """A step."""
        ...

    def write_tokens(self, table: TokenTable) -> None:
        """The table of tokens as it is now."""
        ...

    def close(self) -> None:
        """Nothing more comes."""
        ...


class FolderWriter:
    """``metrics.jsonl``, a line for each record, and ``tokens.json`` in a folder, which is made.

    Each line is written at once: a run that is killed leaves whole lines, and at most one half. A run that goes on
    appends; of two lines about one step the later holds.

    Args:
        folder: where.
        about: what the first line says of the run.
    """

    def __init__(self, folder: str | os.PathLike[str], about: Mapping[str, Any]) -> None:
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / METRICS
        half = False
        if path.exists() and path.stat().st_size:
            with open(path, "rb") as before:
                before.seek(-1, os.SEEK_END)
                half = before.read() != b"\n"
        self._file = open(path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115 - until close
        if half:  # what a killed run left does not spoil the first line of this one
            self._file.write("\n")
        self._line({"kind": "run", **about})

    def _line(self, value: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(value, separators=(",", ":"), allow_nan=False) + "\n")

    def write(self, record: StepRecord) -> None:
        """A line."""
        self._line(as_json(record))

    def write_tokens(self, table: TokenTable) -> None:
        """The file anew; whoever looks finds the old one or the new one, whole."""
        path = self._folder / TOKENS
        partial = path.with_suffix(".partial")
        document = {"kind": "tokens", "step": table.step, "ids": table.ids, "layers": table.layers}
        partial.write_text(json.dumps(document, separators=(",", ":")), encoding="utf-8")
        os.replace(partial, path)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def scalars(record: StepRecord) -> Iterator[tuple[str, float]]:
    """A record's numbers by name, as curves have them: ``moe/LAYER/entropy``, ``moe/seconds/forward``."""
    yield "moe/step_seconds", record.seconds
    yield "moe/tokens", record.tokens
    for part, seconds in record.parts.items():
        yield f"moe/seconds/{part}", seconds
    for name, layer in record.layers.items():
        yield f"moe/{name}/max_load", max(layer.load)
        for field in (
            "entropy",
            "dropped_share",
            "dead_experts",
            "router_logits_rms",
            "router_logits_max",
            "expert_similarity",
            "bytes_sent",
        ):
            value = getattr(layer, field)
            if value is not None:
                yield f"moe/{name}/{field}", value
        for part, seconds in layer.seconds.items():
            yield f"moe/{name}/seconds/{part}", seconds


def add_load_image(board: Any, record: StepRecord) -> None:
    """The load of all layers as an image of a ``SummaryWriter``.

    Raises:
        ImportError: Pillow is not installed.
    """
    try:
        board.add_image("moe/load", heat_map(record), record.step, dataformats="HWC")
    except ImportError as error:  # TensorBoard's writer encodes images with it
        raise ImportError(
            "monitor: to: expected Pillow for TensorBoard's images, got none: pip install pillow"
        ) from error


class TensorBoardWriter:
    """A ``torch.utils.tensorboard.SummaryWriter``: scalars, and the load of all layers as an image.

    Args:
        board: the writer, which its owner closes.
        image_every: records between two images.
    """

    def __init__(self, board: Any, image_every: int = 50) -> None:
        self._board, self._image_every, self._count = board, image_every, 0

    def write(self, record: StepRecord) -> None:
        """Scalars, and the image when it is due."""
        for name, value in scalars(record):
            self._board.add_scalar(name, value, record.step)
        if record.layers and self._count % self._image_every == 0:
            add_load_image(self._board, record)
        self._count += 1

    def write_tokens(self, table: TokenTable) -> None:
        """Not for TensorBoard."""

    def close(self) -> None:
        """The board is its owner's."""
        self._board.flush()


class WandbWriter:
    """A run of Weights & Biases, or anything with its ``log(values, step=)``; images where ``wandb`` is installed.

    Args:
        run: the run, which its owner finishes.
        image_every: records between two images.
    """

    def __init__(self, run: Any, image_every: int = 50) -> None:
        self._run, self._image_every, self._count = run, image_every, 0
        self._image: Any = None
        with contextlib.suppress(ImportError):
            from wandb import Image

            self._image = Image

    def write(self, record: StepRecord) -> None:
        """All of a step in one call."""
        values: dict[str, Any] = dict(scalars(record))
        if record.layers and self._image is not None and self._count % self._image_every == 0:
            values["moe/load"] = self._image(heat_map(record).numpy())
        self._run.log(values, step=record.step)
        self._count += 1

    def write_tokens(self, table: TokenTable) -> None:
        """Not for Weights & Biases."""

    def close(self) -> None:
        """The run is its owner's."""


class FunctionWriter:
    """Any function that takes a :class:`StepRecord`.

    Args:
        function: it.
    """

    def __init__(self, function: Any) -> None:
        self.write = function

    def write_tokens(self, table: TokenTable) -> None:
        """``Monitor.tokens`` has it."""

    def close(self) -> None:
        """Nothing is held."""


def writers_of(to: Any) -> list[Callable[[Mapping[str, Any]], Writer]]:
    """What makes a writer, given what a run's first line says, for each of ``to``: one of them or a list, or None.

    Raises:
        TypeError: something that is none of them.
    """
    if to is None:
        return []
    if isinstance(to, list | tuple):
        return [make for each in to for make in writers_of(each)]
    if isinstance(to, str | os.PathLike):
        return [lambda about: FolderWriter(to, about)]
    if hasattr(to, "add_scalar"):
        return [lambda about: TensorBoardWriter(to)]
    if hasattr(to, "log"):
        return [lambda about: WandbWriter(to)]
    if callable(to):
        return [lambda about: FunctionWriter(to)]
    raise TypeError(
        "monitor: to: expected a folder's path, a SummaryWriter, a W&B run, a function of a StepRecord, or a list of "
        f"them, got {type(to).__name__}"
    )
