"""What the layouts have in common."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from dmoe.checkpoint.model import Model
from dmoe.checkpoint.stored import Stored, cast


@dataclass(frozen=True)
class Options:
    """What the user says about a conversion. A layout reads what concerns it.

    Attributes:
        ranks: W, how many ranks' files to write; None is one, or as many as the layout has by itself.
        gpus: N, inference ranks (FasterTransformer).
        dtype: of the floating-point numbers to write; None keeps each as it is.
        vocab, merges: a tokenizer's files, to go beside the model.
        num_experts: E of a layer, where nothing in the files tells.
        family: of Hugging Face's models, as ``mixtral``; None finds it.
        settings: fields of :class:`dmoe.MoEConfig` that the user knows, for all layers.
        as_given: whether files of ranks are in order; else the numbers in their names tell.
        overwrite: whether what exists is replaced.
        progress: told the bytes that have been written, tensor by tensor.
    """

    ranks: int | None = None
    gpus: int | None = None
    dtype: torch.dtype | None = None
    vocab: Path | None = None
    merges: Path | None = None
    num_experts: int | None = None
    family: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    as_given: bool = False
    overwrite: bool = False
    progress: Callable[[int], object] = lambda count: None


DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


def as_asked(stored: Stored, options: Options) -> Stored:
    """A tensor in the dtype that the user wants floating-point numbers in."""
    return stored if options.dtype is None or stored.dtype not in DTYPES.values() else cast(stored, options.dtype)


FILES = {"vocab": "vocab.json", "merges": "merges.txt"}  # of a tokenizer, and what they are called in a folder


def files_beside(model: Model, options: Options) -> dict[str, Path]:
    """The tokenizer's files: those that the user gives, else the model's own."""
    given = {"vocab": options.vocab, "merges": options.merges}
    own = {what: Path(path) for what, path in model.files.items() if what in FILES}
    return own | {what: path for what, path in given.items() if path is not None}


def copy_files(model: Model, options: Options, folder: Path) -> None:
    """Put them into a folder."""
    for what, path in files_beside(model, options).items():
        shutil.copyfile(path, folder / FILES[what])


class Format(Protocol):
    """A layout of files."""

    @property
    def name(self) -> str:
        """On the command line."""
        ...

    @property
    def about(self) -> str:
        """What it is, in a few words."""
        ...

    def fits(self, sources: Sequence[Path]) -> bool:
        """Whether files, or a folder, look like this layout: by names and by what is inside, without reading tensors.

        Never raises for files that are something else, or damaged: whoever reads them says what is wrong.
        """
        ...

    def read(self, sources: Sequence[Path], options: Options) -> Model:
        """The model in files of this layout; tensors stay in the files.

        Args:
            sources: a folder or file; for layouts with a file for each rank all of them, in order.
            options: of the user.

        Raises:
            OSError: a file is missing, or cannot be read.
            ValueError: files that are damaged, incomplete, or do not belong together: the message names the file.
        """
        ...

    def write(self, model: Model, target: Path, options: Options) -> list[Path]:
        """Write a model in this layout: everything or nothing.

        Args:
            model: to be written.
            target: a folder or a file, as the layout has it; with ``{rank}`` in its name where ranks have files.
            options: of the user.

        Returns:
            The files or folders that a user would name.

        Raises:
            OSError: it cannot be written, or is there already.
            ValueError: a model that this layout cannot hold, with the reason.
        """
        ...
