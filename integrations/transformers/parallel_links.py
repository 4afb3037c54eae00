"""Tensors of a model beside those of Hugging Face's files: whole blocks have dmoe's, everything else is as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dmoe.integrations.transformers.block_module import MoEBlock
from dmoe.integrations.transformers.blocks_weights import SAME, Weight


@dataclass(frozen=True)
class Link:
    """A parameter or saved buffer of a model, and what it is in Hugging Face's.

    Attributes:
        name: in the model.
        native: the names in Hugging Face's model.
        weight: how the shapes differ, inside a block; None for the same shape.
    """

    name: str
    native: tuple[str, ...]
    weight: Weight | None = None

    @property
    def by_expert(self) -> bool:
        """Whether the first dimension counts experts, in both forms."""
        return self.weight is not None and self.weight.ours.startswith("experts.")

    def natives(self, tensor: Tensor) -> dict[str, Tensor]:
        """A value of ours, of all or some of the experts, under native names and in native shapes."""
        if self.weight is None:
            return {self.native[0]: tensor}
        return dict(zip(self.native, self.weight.to_theirs(tensor), strict=True))

    def read(self, read: Callable[[str, tuple[slice, ...]], Tensor], box: tuple[slice, ...]) -> Tensor:
        """A part of ours.

        Args:
            read: gives the part of a native tensor that slices of its first dimensions take.
            box: a slice of each dimension of ours.
        """
        if self.weight is None:
            return read(self.native[0], box)
        first = box[:1] if self.by_expert else ()
        ours = self.weight.to_ours([read(name, first) for name in self.native])
        return ours[(slice(None), *box[1:]) if self.by_expert else box]


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers of a model by name, each once, in the order of its modules."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        saved = {n: b for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set}
        for name, tensor in (*module._parameters.items(), *saved.items()):
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                found[f"{prefix}.{name}" if prefix else name] = tensor
    return found


def links_of(model: nn.Module) -> list[Link]:
    """How each tensor of a model is called and shaped in Hugging Face's, in the order of the model.

    A block's buffers that Hugging Face's has none of (counts of the load since the last update) are left out.
    """
    of_blocks: dict[str, Link] = {}
    prefixes = []
    for name, module in model.named_modules():
        if isinstance(module, MoEBlock):
            prefix = f"{name}." if name else ""
            prefixes.append(prefix)
            for weight in module.weights:
                ours, native = f"{prefix}moe.{weight.ours}", tuple(prefix + each for each in weight.theirs)
                same = weight.layout is SAME and not weight.ours.startswith("experts.")
                of_blocks[ours] = Link(ours, native, None if same else weight)
    links = []
    for name in tensors_of(model):
        if name in of_blocks:
            links.append(of_blocks[name])
        elif not any(name.startswith(prefix) for prefix in prefixes):
            links.append(Link(name, (name,)))
    return links


def box_of(tensor: Any) -> tuple[slice, ...]:
    """Which part of a ``DTensor`` is on this rank, a slice of each dimension; of any other tensor, all of it."""
    if not hasattr(tensor, "to_local"):
        return tuple(slice(0, size) for size in tensor.shape)
    (chunk,) = tensor.__create_chunk_list__()  # as torch.distributed.checkpoint asks
    return tuple(slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True))


def here(tensor: Tensor) -> Tensor:
    """A ``DTensor``'s part on this rank; any other tensor as it is."""
    tensor = tensor.detach()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def cut_dims(tensor: Any) -> set[int]:
    """Along which of its dimensions a ``DTensor`` is cut."""
    return {placement.dim for placement in tensor.placements if not placement.is_replicate()}


def native_shapes(links: Iterable[Link], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor of Hugging Face's model by its native name, empty on ``meta``."""
    found: dict[str, Tensor] = {}
    for link in links:
        found |= link.natives(_empty(tensors[link.name]))
    return found


def _empty(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
