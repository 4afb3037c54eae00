"""Tensors like those of a call that asks for a certificate: its dtypes, features and layout, with other numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Described = dict[str, Any]  # of a floating-point tensor: dtype, shape, stride, aligned


class Draw:
    """Numbers for one problem."""

    def __init__(self, device: torch.device, seed: int) -> None:
        self.device, self.generator = device, torch.Generator().manual_seed(seed)

    def normal(self, like: Described | None, *shape: int, scale: float | None = None) -> Any:
        """Normal numbers in the dtype, order of memory and alignment of a description; None for None.

        Args:
            like: what to resemble.
            *shape: the first dimensions, instead of the description's.
            scale: of the numbers; None gives sums over the last dimension a scale of 1.
        """
        if like is None:
            return None
        size = (*shape, *like["shape"][len(shape) :])
        room = empty(like, size, self.device)
        if self.device.type == "meta":
            return room
        numbers = torch.randn(size, generator=self.generator) * (size[-1] ** -0.5 if scale is None else scale)
        return room.copy_(numbers)

    def uniform(self, *shape: int) -> Tensor:
        """float32 in [0.25, 1.25)."""
        if self.device.type == "meta":
            return torch.empty(shape, device=self.device)
        return (torch.rand(shape, generator=self.generator) + 0.25).to(self.device)

    def choices(self, tokens: int, experts: int, top_k: int, *, empty: int | None = None) -> Tensor:
        """Distinct experts for each token, on the CPU: the second is hot, ``empty`` gets nothing, some are dropped.

        Dropped choices have the id ``experts``; all of the first token's are.
        """
        scores = torch.rand((tokens, experts), generator=self.generator)
        scores[:, min(1, experts - 1)] += 0.6
        if empty is not None and experts > top_k:
            scores[:, empty] = -1.0
        chosen = scores.topk(top_k).indices
        dropped = torch.rand((tokens, top_k), generator=self.generator) < 0.1
        dropped[:1] = True
        return chosen.masked_fill(dropped, experts)


def empty(like: Described, size: tuple[int, ...], device: torch.device) -> Tensor:
    """Memory in the order and alignment of a description, for other first dimensions."""
    strides = list(like["stride"])
    dense = torch.empty(like["shape"], device="meta").stride() == tuple(strides)
    if dense:
        strides = list(torch.empty(size, device="meta").stride())
    shift = 0 if like["aligned"] else 1
    spans = ((length - 1) * stride for length, stride in zip(size, strides, strict=True))
    needed = 0 if 0 in size else 1 + sum(spans)
    room = torch.empty(needed + shift, dtype=like["dtype"], device=device)
    return room[shift:].as_strided(size, strides) if needed else room[:0].view(size)
