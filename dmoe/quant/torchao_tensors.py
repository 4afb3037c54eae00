"""torchao's quantised tensors as :class:`dmoe.QuantizedWeight`: known by their class's name, and read by attributes.

Of torchao 0.18: ``Int8Tensor``, ``IntxUnpackedToInt8Tensor`` (of 4 and of 8 bits), ``Int4Tensor``, ``NF4Tensor`` and
``Float8Tensor``. torchao is not imported.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dmoe.ops.weight_formats import FORMATS, packed, scales_shape
from dmoe.quant.packing import Parts, joined, swapped
from dmoe.quantized_weight import QuantizedWeight


def from_torchao(tensors: Any, *, gated: bool = False, interleaved: bool = False) -> QuantizedWeight:
    """What torchao holds, as it is: codes are not quantised anew.

    Args:
        tensors: one tensor ``(E, N, K)``, or E of ``(N, K)``: an ``Int8Tensor`` with a scale for each row, or for all;
            an ``IntxUnpackedToInt8Tensor`` of ``int8`` like that or of ``int4`` in groups of 32, 64 or 128; an
            ``Int4Tensor`` in such groups; an ``NF4Tensor`` in blocks of 64 (its own quantiles are rounded to four
            digits, so that values differ by up to 5e-5 of a block's largest); a ``Float8Tensor`` of e4m3 with a scale
            for each 128 by 128 numbers, or for all.
        gated: whether rows are gate and up, and the value's shape ``(E, 2, N / 2, K)``.
        interleaved: whether gate's rows and up's take turns.

    Raises:
        TypeError: another kind of tensor.
        ValueError: a granularity, or an extra (``act_pre_scale``, zero points of 8 bits), that no format of dmoe has.
    """
    each = list(tensors) if isinstance(tensors, list | tuple) else [tensors]
    kinds = {type(tensor).__name__ for tensor in each}
    name = next(iter(kinds)) if len(kinds) == 1 else " and ".join(sorted(kinds))
    if name not in _READERS:
        raise TypeError(f"from_torchao: tensors: expected one of {', '.join(_READERS)}, got {name or 'none'}")
    for tensor in each:
        if getattr(tensor, "act_pre_scale", None) is not None:
            raise ValueError(f"from_torchao: act_pre_scale: expected None, got one: {name} scales its inputs with it")
    parts = [_READERS[name](tensor) for tensor in each]
    return joined("from_torchao", parts, gated=gated, interleaved=interleaved)


def _stacked(tensor: Tensor) -> Tensor:
    return tensor if tensor.dim() == 3 else tensor.unsqueeze(0)


def _block(tensor: Any, codes: Tensor) -> tuple[int, int]:
    """Rows and columns that share a scale, of codes ``(E, N, K)``."""
    given = [size if size > 0 else codes.shape[dim] for dim, size in zip((-2, -1), tensor.block_size[-2:], strict=True)]
    return given[0], given[1]


def _by_row(op: str, scales: Tensor, codes: Tensor) -> Tensor:
    """A scale for each row, of those that there are."""
    experts, rows, _ = codes.shape
    if scales.numel() not in (1, experts, experts * rows):
        raise ValueError(f"from_torchao: {op}: expected a scale for each row, or for all, got {scales.numel()}")
    return scales.reshape(-1, 1, 1).expand(experts, rows, 1) if scales.numel() <= experts else scales.view(-1, rows, 1)


def _int8(tensor: Any) -> Parts:
    if getattr(tensor, "zero_point", None) is not None and tensor.zero_point.any():
        raise ValueError(f"from_torchao: {type(tensor).__name__}: expected no zero points in 8 bits, got some")
    codes = _stacked(tensor.qdata)
    return Parts(codes, _by_row(type(tensor).__name__, tensor.scale, codes), None, "int8", (1, codes.shape[-1]))


def _intx(tensor: Any) -> Parts:
    if str(tensor.target_dtype) != "torch.int4":
        if tensor.target_dtype != torch.int8:
            raise ValueError(f"from_torchao: target_dtype: expected int4 or int8, got {tensor.target_dtype}")
        return _int8(tensor)
    codes = _stacked(tensor.qdata)
    zeros = _stacked(tensor.zero_point).float() + 8
    packed_codes = packed((codes + 8).view(torch.uint8))
    return Parts(packed_codes, _stacked(tensor.scale), zeros, "int4", _block(tensor, codes))


def _int4(tensor: Any) -> Parts:
    # A value is q * scale + zero_point with q from -8 to 7, scales (K / group, N) of a matrix (N, K); the even column
    # is in the low half.
    codes, scales, shift = (_stacked(each) for each in (tensor.qdata, tensor.scale, tensor.zero_point))
    scales, shift = scales.mT.contiguous(), shift.mT.float().contiguous()
    zeros = 8 - shift / scales.float()
    return Parts(codes.view(torch.uint8) ^ 0x88, scales, zeros, "int4", (1, int(tensor.block_size[-1])))


def _nf4(tensor: Any) -> Parts:
    rows, columns = tensor.shape
    if tensor.block_size != 64 or columns % 64:
        raise ValueError(
            f"from_torchao: NF4Tensor: expected blocks of 64 in rows of a multiple of 64, got blocks of "
            f"{tensor.block_size} in rows of {columns}"
        )
    factors = tensor.quantization_factor.float().repeat_interleave(tensor.scaler_block_size)
    scales = tensor.quantized_scalers.float() / factors + tensor.scaler_mean.float()
    codes = swapped(tensor.quantized_data).view(1, rows, columns // 2)
    return Parts(codes, scales.view(1, rows, columns // 64), None, "nf4", (1, 64))


def _fp8(tensor: Any) -> Parts:
    codes, scales = _stacked(tensor.qdata), tensor.scale
    if codes.dtype != torch.float8_e4m3fn:
        raise ValueError(f"from_torchao: Float8Tensor: expected float8_e4m3fn, got {codes.dtype}")
    block = FORMATS["fp8"].block(codes.shape[2])
    grid = scales_shape(codes.shape, block)
    if scales.numel() in (1, codes.shape[0]):
        scales = scales.reshape(-1, 1, 1).expand(grid)
    elif _block(tensor, codes) == block:
        scales = scales.view(grid)
    else:
        raise ValueError(
            f"from_torchao: Float8Tensor: expected a scale for each {block[0]} by {block[1]} numbers, or for all, got "
            f"blocks of {tuple(tensor.block_size)}"
        )
    return Parts(codes, scales, None, "fp8", block)


_READERS: dict[str, Callable[[Any], Parts]] = {
    "Int8Tensor": _int8,
    "IntxUnpackedToInt8Tensor": _intx,
    "Int4Tensor": _int4,
    "NF4Tensor": _nf4,
    "Float8Tensor": _fp8,
}
