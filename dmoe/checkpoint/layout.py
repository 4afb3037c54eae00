"""How the experts of one layer lie in a state dict, and how they are cut into the parts of ranks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Parameters of dmoe.experts.Experts: the dimension of F where all experts have one width; dimension 0 counts experts.
FFN_DIM: dict[str, int | None] = {
    "gate_up_proj": 2,
    "up_proj": 1,
    "down_proj": 2,
    "gate_up_bias": 2,
    "up_bias": 1,
    "down_bias": None,
}
_DIMS = {"gate_up_proj": 4, "up_proj": 3, "down_proj": 3, "gate_up_bias": 3, "up_bias": 2, "down_bias": 2}
_EXPERT_KEY = re.compile(rf"((?:.*\.)?experts)\.({'|'.join(FFN_DIM)})")


def expert_key(key: object) -> tuple[str, str] | None:
    """The layer and the field that a state dict's key names, as ``blocks.0.ffn.experts`` and ``down_proj``.

    None for every other key: a shared expert's are ``shared_expert.mlp.down_proj`` and are on all ranks alike.
    """
    found = _EXPERT_KEY.fullmatch(key) if isinstance(key, str) else None
    return None if found is None else (found[1], found[2])


def is_packed(field: str, tensor: Tensor) -> bool:
    """Whether a parameter holds experts of widths that differ, side by side instead of along a dimension of their own.

    Never for ``down_bias``, whose shape does not tell.
    """
    return field != "down_bias" and tensor.dim() == _DIMS[field] - 1


@dataclass(frozen=True)
class Partition:
    """Which part of one layer's experts each rank holds.

    Every ``shards`` consecutive ranks form a block; a block holds ``E / blocks`` consecutive experts, and each of its
    ranks a slice of every such expert's F.

    Attributes:
        widths: F of each of the E experts.
        packed: whether the experts stand side by side, ``(2, sum F, H)`` and ``(H, sum F)``, as widths that differ do.
        ranks: files, or processes.
        shards: slices of F.

    Raises:
        ValueError: experts or widths that cannot be divided evenly.
    """

    widths: tuple[int, ...]
    packed: bool
    ranks: int
    shards: int = 1

    def __post_init__(self) -> None:
        for name in ("ranks", "shards"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}: expected an integer of at least 1, got {value!r}")
        if self.ranks % self.shards:
            raise ValueError(f"ranks: expected a multiple of shards = {self.shards}, got {self.ranks}")
        if self.num_experts % self.blocks:
            raise ValueError(
                f"expected a number of experts that {self.blocks} blocks of ranks can share evenly ({self.ranks} "
                f"ranks, {self.shards} shards), got {self.num_experts}"
            )
        odd = next((width for width in self.widths if width % self.shards), None)
        if odd is not None:
            raise ValueError(f"expected widths that {self.shards} shards can share evenly, got {odd}")

    @property
    def num_experts(self) -> int:
        """E, over all ranks."""
        return len(self.widths)

    @property
    def blocks(self) -> int:
        """Groups of ranks that hold experts of their own."""
        return self.ranks // self.shards

    def experts_of(self, rank: int) -> range:
        """The experts of which a rank holds its slice."""
        each = self.num_experts // self.blocks
        block = rank // self.shards
        return range(block * each, (block + 1) * each)

    def widths_of(self, rank: int) -> tuple[int, ...]:
        """How wide a rank's slices of its experts are."""
        experts = self.experts_of(rank)
        return tuple(width // self.shards for width in self.widths[experts.start : experts.stop])

    def shape(self, field: str, hidden_size: int, rank: int) -> tuple[int, ...]:
        """The shape of a parameter on a rank; that of the whole is the one on rank 0 of a single rank."""
        widths = self.widths_of(rank)
        if field == "down_bias":
            return len(widths), hidden_size
        ffn = (sum(widths),) if self.packed else (widths[0],)
        experts = () if self.packed else (len(widths),)
        if field == "down_proj":
            return *experts, hidden_size, *ffn
        halves = (2,) if field.startswith("gate") else ()
        return *experts, *halves, *ffn, *((hidden_size,) if field.endswith("proj") else ())

    def part(self, field: str, tensor: Tensor, rank: int) -> Tensor:
        """A rank's part of a whole parameter, with memory of its own."""
        experts, shard, dim = self.experts_of(rank), rank % self.shards, FFN_DIM[field]
        if dim is None or not self.packed:
            mine = tensor.narrow(0, experts.start, len(experts))
            if dim is not None:
                width = self.widths[0] // self.shards
                mine = mine.narrow(dim, shard * width, width)
            return mine.clone(memory_format=torch.contiguous_format)
        starts = [sum(self.widths[:expert]) for expert in experts]
        pieces = [
            tensor.narrow(dim - 1, start + shard * width, width)
            for start, width in zip(starts, self.widths_of(rank), strict=True)
        ]
        return torch.cat(pieces, dim - 1)

    def whole(self, field: str, parts: Sequence[Tensor]) -> Tensor:
        """The whole parameter from the parts of all ranks, in their order, on the device of the first.

        What shards hold alike is taken from the first of a block: compare them before.
        """
        home, dim = parts[0].device, FFN_DIM[field]
        parts = [part.to(home) for part in parts]
        blocks = [parts[first : first + self.shards] for first in range(0, self.ranks, self.shards)]
        if dim is None:
            return torch.cat([block[0] for block in blocks])
        if not self.packed:
            return torch.cat([torch.cat(block, dim) for block in blocks])
        pieces = []
        for number, block in enumerate(blocks):
            widths = self.widths_of(number * self.shards)
            by_shard = [part.split(widths, dim - 1) for part in block]
            pieces += [shard[expert] for expert in range(len(widths)) for shard in by_shard]
        return torch.cat(pieces, dim - 1)
