"""From a folder in Hugging Face's format into a model that is spread over ranks: each reads what it holds."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from dmoe.checkpoint.hub_folder import HubFolder
from dmoe.integrations.transformers.files_names import Found, Source, class_name, find_sources
from dmoe.integrations.transformers.parallel_links import Link, box_of, here, links_of, native_shapes, tensors_of


class CountedFolder(HubFolder):
    """A folder that counts what is read of it.

    Attributes:
        bytes_read: of tensors, headers not among them.
        by_name: the same for each tensor.
    """

    def __init__(self, folder: Any) -> None:
        super().__init__(folder)
        self.by_name: dict[str, int] = {}

    @property
    def bytes_read(self) -> int:
        """Of all tensors."""
        return sum(self.by_name.values())

    def read(self, name: str, *index: slice) -> Tensor:
        """As :class:`HubFolder` does."""
        tensor = super().read(name, *index)
        self.by_name[name] = self.by_name.get(name, 0) + tensor.nbytes
        return tensor


@torch.no_grad()
def load(
    model: Any,
    links: Iterable[Link],
    tensors: Mapping[str, Tensor],
    files: HubFolder,
    *,
    tied: Mapping[str, str] | None = None,
    may_lack: Callable[[str], bool] = lambda name: False,
    may_have_more: bool = False,
    progress: bool = False,
    what: str = "weights",
) -> Found:
    """Fill tensors, plain or parts of a ``DTensor``, with what a folder has of them, cast to their dtypes.

    Args:
        model: Hugging Face's, with blocks of dmoe's.
        links: what the tensors are called.
        tensors: by the links' names.
        files: the folder; read lazily, the experts of this rank only.
        tied: native names of tensors that are others' under a second name, with the first.
        may_lack: whether the files may lack a native name, whose tensor is then left alone.
        may_have_more: whether files may hold what is nobody's without a word.
        progress: show a bar.
        what: is loaded, for the bar.

    Returns:
        What was found in the files.

    Raises:
        ValueError: a tensor is missing, or has another shape.
        OSError: a file cannot be read.
    """
    links, tied = list(links), tied or {}
    native = native_shapes(links, tensors)
    told = find_sources(model, files, native | {second: native[first] for second, first in tied.items()})
    found = told.sources
    for second, first in tied.items():
        if second in found:
            found.setdefault(first, found[second])
    missing = [name for name in native if name not in found and not may_lack(name)]
    if missing:
        more = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
        raise ValueError(
            f"{files.folder}: expected {missing[0]} {tuple(native[missing[0]].shape)} for {class_name(model)}, got "
            f"no such tensor{more}"
        )
    if not may_have_more:
        _tell_unknown(told.unknown, model, files)
    for link in tqdm(links, desc=f"Loading {what}", disable=not progress, unit="tensor"):
        if all(name in found for name in link.native):
            target = tensors[link.name]
            _fill(link, target, found, native, files, model)
    return told


def fill(model: Any, files: HubFolder, *, progress: bool) -> None:
    """Load all of a model that :func:`dmoe.integrations.transformers.to_dmoe` went over; see :func:`load`."""
    tensors = tensors_of(model)
    names = {id(tensor): name for name, tensor in tensors.items()}
    every = model.named_parameters(remove_duplicate=False)
    tied = {name: names[id(tensor)] for name, tensor in every if names[id(tensor)] != name}
    patterns = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()

    def may_lack(name: str) -> bool:
        return any(re.search(pattern, name) for pattern in patterns)

    told = load(model, links_of(model), tensors, files, tied=tied, may_lack=may_lack, progress=progress)
    model._weight_conversions = told.conversions


def _tell_unknown(keys: Iterable[str], model: Any, files: HubFolder) -> None:
    patterns = [*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()), r"rotary_emb\.inv_freq"]
    left = [key for key in keys if not any(re.search(pattern, key) for pattern in patterns)]
    if left:
        warnings.warn(
            f"{files.folder}: {len(left)} tensors are none of {class_name(model)}'s, and left out: "
            f"{', '.join(left[:3])}{', ...' if len(left) > 3 else ''}",
            stacklevel=2,
        )


def _fill(
    link: Link,
    target: Tensor,
    found: Mapping[str, Source],
    native: Mapping[str, Tensor],
    files: HubFolder,
    model: Any,
) -> None:
    box = box_of(target)
    if any(part.start == part.stop for part in box):  # more ranks than rows
        return

    for name in link.native:
        _check_shape(found[name], native[name], files)

    def read(name: str, index: tuple[slice, ...]) -> Tensor:
        expected = [len(range(*part.indices(size))) for part, size in zip(index, native[name].shape)]  # noqa: B905
        expected += native[name].shape[len(index) :]
        tensor = found[name].read(files, name, index, model)
        if list(tensor.shape) != expected:
            raise ValueError(f"{files.folder}: {name}: expected shape {tuple(expected)}, got {tuple(tensor.shape)}")
        return tensor

    local = here(target)
    if not link.by_expert or not all(found[name].takes_rows for name in link.native):
        local.copy_(link.read(read, box))
        return
    for n, expert in enumerate(range(box[0].start, box[0].stop)):  # one by one, so that no more is held beside them
        local[n : n + 1].copy_(link.read(read, (slice(expert, expert + 1), *box[1:])))


def _check_shape(source: Source, expected: Tensor, files: HubFolder) -> None:
    """Whether the files' tensors have the shapes that they should, before any of them is read."""
    if source.converter is None:
        (key,) = source.keys[""]
        if files.shape(key) != tuple(expected.shape):
            raise ValueError(f"{files.folder}: {key}: expected shape {tuple(expected.shape)}, got {files.shape(key)}")
        return
    if source.by_expert:  # each expert's like the first one's; what the first ones make is compared when it is made
        for keys in source.keys.values():
            first = files.shape(keys[0])
            for key in keys:
                if files.shape(key) != first:
                    raise ValueError(
                        f"{files.folder}: {key}: expected shape {first} as {keys[0]}, got {files.shape(key)}"
                    )
