"""What reading other packages' codes has in common: halves of a byte, and parts put together as one value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dmoe.ops.weight_formats import columns_of
from dmoe.quantized_weight import QuantizedWeight


class Parts(NamedTuple):
    """A stack of experts, as :class:`dmoe.QuantizedWeight` has them: its tensors, format and block."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    format: str
    block: tuple[int, int]


def swapped(codes: Tensor) -> Tensor:
    """Bytes whose halves lie the other way round: the even code in the high half."""
    return codes << 4 | codes >> 4


def joined(op: str, parts: Sequence[Parts], *, gated: bool, interleaved: bool) -> QuantizedWeight:
    """One or several stacks of experts as one value.

    Raises:
        ValueError: stacks of different formats or sizes, or rows that are no two halves.
    """
    first = parts[0]
    alike = {(p.format, p.block, tuple(p.codes.shape[1:]), p.scales.dtype, p.zeros is None) for p in parts}
    if len(alike) > 1:
        raise ValueError(f"{op}: tensors: expected experts of one format and size, got {sorted(map(str, alike))}")
    codes = torch.cat([p.codes for p in parts])
    scales = torch.cat([p.scales for p in parts])
    zeros = [p.zeros for p in parts if p.zeros is not None]
    experts, rows, columns = *codes.shape[:2], columns_of(codes, first.format)
    if interleaved and not gated:
        raise ValueError(f"{op}: interleaved: expected False without a gate, got True")
    if gated and rows % 2:
        raise ValueError(f"{op}: gated: expected an even number of rows, of gate and up, got {rows}")
    shape = (experts, 2, rows // 2, columns) if gated else (experts, rows, columns)
    return QuantizedWeight(
        codes, scales, first.format, shape, first.block, torch.cat(zeros) if zeros else None, interleaved
    )
