"""Tensors of Hugging Face's files that are packed: MXFP4 is unpacked, exactly; others are refused with what to do.

MXFP4 (OCP Microscaling Formats 1.0): 32 numbers share a scale 2^(s - 127), s one byte, and each is a sign, two bits of
exponent and one of mantissa, two to a byte, the first in the low half. All of them are bfloat16 numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dmoe.checkpoint.stored import Stored, mapped

_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_BLOCKS, _SCALES = "_blocks", "_scales"


def unpacked(tensors: Mapping[str, Stored], where: str) -> tuple[dict[str, Stored], int]:
    """Tensors in which ``NAME_blocks (E, Y, X / 32, 16)`` and ``NAME_scales (E, Y, X / 32)`` became ``NAME (E, X, Y)``.

    Args:
        tensors: by name.
        where: their file, for messages.

    Returns:
        All tensors, and how many of them were packed; those are bfloat16 now.

    Raises:
        ValueError: one without its other half, shapes that do not fit, or numbers of 8 bits.
    """
    found: dict[str, Stored] = {}
    count = 0
    for name, tensor in tensors.items():
        if name.endswith("_scale_inv") or tensor.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
            raise ValueError(
                f"{tensor.where or where}: {name}: expected numbers of 16 bits or more, got {tensor.dtype} with scales "
                "beside: load the model with quantization_config=FineGrainedFP8Config(dequantize=True) of Transformers "
                "and save it again"
            )
        if name.endswith(_BLOCKS) and tensor.dtype == torch.uint8:
            bare = name.removesuffix(_BLOCKS)
            if bare + _SCALES not in tensors or bare in tensors:
                problem = "both" if bare in tensors else f"no {bare + _SCALES}"
                raise ValueError(f"{tensor.where or where}: {bare}: expected it packed with its scales, got {problem}")
            found[bare] = _of_mxfp4(tensor, tensors[bare + _SCALES], f"{tensor.where or where}: {bare}")
            count += 1
        elif not (name.endswith(_SCALES) and name.removesuffix(_SCALES) + _BLOCKS in tensors):
            found[name] = tensor
    return found, count


def _of_mxfp4(blocks: Stored, scales: Stored, where: str) -> Stored:
    fits = len(blocks.shape) == 4 and blocks.shape[-1] == 16 and blocks.shape[:-1] == scales.shape
    if not fits or scales.dtype != torch.uint8:
        raise ValueError(
            f"{where}: expected blocks (E, Y, X / 32, 16) and scales (E, Y, X / 32), both of bytes, got {blocks.shape} "
            f"and {scales.shape} {scales.dtype}"
        )
    return mapped([blocks, scales], _values, by_rows=True)


def _values(parts: Sequence[Tensor]) -> Tensor:
    blocks, scales = parts
    table = torch.tensor([*_POSITIVE, *(-value for value in _POSITIVE)], device=blocks.device)
    two = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2)  # (E, Y, X / 32, 32)
    numbers = torch.ldexp(table[two.int()], scales.int().unsqueeze(-1) - 127)
    return numbers.flatten(2).mT.to(torch.bfloat16)
