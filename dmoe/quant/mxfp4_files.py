"""MXFP4 as GPT-OSS's files have it: ``_blocks`` and ``_scales``, taken as they are.

Sixteen bytes hold the 32 numbers of a block, the first of two in the low half of a byte, and a block's scale is
2^(s - 127) (OCP Microscaling Formats 1.0): codes and scales of :mod:`dmoe.ops.weight_formats`, but for a dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmoe.quantized_weight import QuantizedWeight


def from_mxfp4(
    blocks: Tensor, scales: Tensor, *, gated: bool = False, interleaved: bool | None = None
) -> QuantizedWeight:
    """The value that two tensors of a file are, without decoding them: views of their memory.

    Args:
        blocks: ``(E, N, G, 16)`` uint8, of ``K = 32 G`` inputs.
        scales: ``(E, N, G)`` uint8.
        gated: whether rows are gate and up, and the value's shape ``(E, 2, N / 2, K)``.
        interleaved: whether gate's rows and up's take turns; None: they do where ``gated``, as in GPT-OSS.

    Raises:
        TypeError: other dtypes.
        ValueError: other shapes, or rows that are not two halves.
    """
    for name, tensor in (("blocks", blocks), ("scales", scales)):
        if not isinstance(tensor, Tensor) or tensor.dtype != torch.uint8:
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"from_mxfp4: {name}: expected a uint8 tensor, got {got}")
    if blocks.dim() != 4 or blocks.shape[-1] != 16 or tuple(blocks.shape[:-1]) != tuple(scales.shape):
        raise ValueError(
            f"from_mxfp4: expected blocks (E, N, G, 16) and scales (E, N, G), got {tuple(blocks.shape)} and "
            f"{tuple(scales.shape)}"
        )
    experts, rows, groups, _ = blocks.shape
    if gated and rows % 2:
        raise ValueError(f"from_mxfp4: blocks: expected an even number of rows, of gate and up, got {rows}")
    shape = (experts, 2, rows // 2, 32 * groups) if gated else (experts, rows, 32 * groups)
    turns = gated if interleaved is None else interleaved
    return QuantizedWeight(blocks.flatten(2), scales, "mxfp4", shape, (1, 32), None, turns)
