"""The operations on indices: sort, histogram, running sums, replicate, topology, and three small helpers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dmoe.ops import cumsum as _cumsum
from dmoe.ops.histogram import histogram as _histogram
from dmoe.ops.replicate import replicate as _replicate
from dmoe.ops.sort import sort as _sort
from dmoe.ops.topology import topology as _topology

_BITS = {torch.int16: 16, torch.int32: 32, torch.int64: 64}


def sort(x: Tensor, end_bit: int | None = None) -> tuple[Tensor, Tensor]:
    """Sort keys, equal ones in the order in which they came.

    Args:
        x: ``(N,)`` int16, int32 or int64.
        end_bit: only the low ``end_bit`` bits decide the order. None, or all bits: the signed value does.

    Returns:
        the sorted keys, and their positions in ``x``, both ``(N,)`` of x's dtype; positions that an int16 cannot hold
        (N above 32768) come as int32.

    Raises:
        TypeError, ValueError: another dtype, more than one dimension, or ``end_bit`` below 1.
        RuntimeError: a negative key with fewer than all bits, on the CPU.
    """
    if x.dim() == 1 and x.dtype in _BITS and (end_bit is None or end_bit >= _BITS[x.dtype]):
        keys, positions = torch.sort(x, stable=True)  # negative keys first
    else:
        keys, positions = _sort(x, end_bit)
    wraps = x.dtype == torch.int16 and x.shape[0] > 2**15
    return keys, positions.to(torch.int32 if wraps else x.dtype)


def histogram(x: Tensor, max_val: int) -> Tensor:
    """Count how often each of 0 .. max_val - 1 occurs.

    Args:
        x: ``(N,)``, or ``(B, N)`` for one histogram a row; int16, int32 or int64.
        max_val: number of bins, at least 1.

    Returns:
        int32 counts, ``(max_val,)`` or ``(B, max_val)``.

    Raises:
        TypeError, ValueError: another dtype or number of dimensions, or no bin.
        RuntimeError: a value outside the bins, on the CPU. On CUDA it is not counted.
    """
    if x.dim() != 2:
        return _histogram(x, max_val)
    counts = [_histogram(row, max_val) for row in x]
    return torch.stack(counts) if counts else torch.zeros(0, max_val, dtype=torch.int32, device=x.device)


def inclusive_cumsum(x: Tensor, dim: int) -> Tensor:
    """``out[i] = x[0] + ... + x[i]`` along ``dim``, in x's dtype: int16, int32 or int64, one or two dimensions.

    The shape is x's, also where that is ``(1,)``: there MegaBlocks returns a scalar.
    """
    return _cumsum.inclusive_cumsum(x, dim)


def exclusive_cumsum(x: Tensor, dim: int) -> Tensor:
    """``out[i] = x[0] + ... + x[i - 1]``, 0 first; otherwise as :func:`inclusive_cumsum`."""
    return _cumsum.exclusive_cumsum(x, dim)


def replicate(x: Tensor, bins: Tensor, num_outputs: int) -> Tensor:
    """Repeat each bin's value over its positions: ``out[b, i] = x[b, e]`` for ``bins[e - 1] <= i < bins[e]``.

    Args:
        x: ``(B, E)``, a float dtype (differentiable) or int16, int32, int64.
        bins: ``(E,)`` int32 or int64, where each bin ends.
        num_outputs: columns of the result.

    Returns:
        ``(B, num_outputs)`` of x's dtype; 0 behind the last bin.
    """
    return _replicate(x, bins, num_outputs)


def topology(padded_bins: Tensor, block_size: int, output_block_rows: int, output_block_columns: int) -> Tensor:
    """Column indices of the non-zero blocks of a block-sparse activation.

    Args:
        padded_bins: where each expert's padded rows end, ``(E,)`` int32 or int64, multiples of ``block_size``.
        block_size: rows and columns of a block.
        output_block_rows: row blocks of the activation, ``padded_bins[-1] / block_size``.
        output_block_columns: column blocks of one expert.

    Returns:
        ``(output_block_rows * output_block_columns,)``, row block after row block. int16 where every column and row
        index fits in it, else int32: 32768 row blocks, or ``E * output_block_columns`` above 32768.

    Raises:
        TypeError, ValueError: a wrong dtype, shape or size.
        RuntimeError: bins that fall, are no multiples, or pass the end, on the CPU.
    """
    offsets = torch.cat([padded_bins.new_zeros(1), padded_bins])
    columns = _topology(offsets, block_size, output_block_columns, output_block_rows)
    fits = max(padded_bins.shape[0] * output_block_columns, output_block_rows) <= 2**15
    return columns.to(torch.int16) if fits else columns


def repeat(x: Tensor, tiling: Sequence[int]) -> Tensor:
    """``x.repeat(*tiling)``; x itself where that changes nothing."""
    return x if all(times == 1 for times in tiling) else x.repeat(*tiling)


def round_up(x: Tensor, value: int) -> Tensor:
    """The next multiple of ``value`` at or above each integer, in x's dtype.

    Raises:
        TypeError: x holds no integers.
        ValueError: ``value`` is below 1.
    """
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"round_up: x: expected an integer dtype, got {x.dtype}")
    if value < 1:
        raise ValueError(f"round_up: value: expected at least 1, got {value}")
    return torch.div(x + (value - 1), value, rounding_mode="trunc") * value


def sum(x: Tensor, dim: int = 0) -> Tensor:
    """``x.sum(dim)``; without a copy where there is one term."""
    return x.squeeze(dim) if x.shape[dim] == 1 else x.sum(dim)
