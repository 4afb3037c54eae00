"""``sort``: a stable radix sort of non-negative integers, together with the permutation that sorts."""

from __future__ import annotations

import torch
from torch import Tensor

from dmoe.ops._checks import known
from dmoe.ops._library import define

_BITS = {torch.int16: 15, torch.int32: 31, torch.int64: 63}


def sort_ref(keys: Tensor, end_bit: int) -> tuple[Tensor, Tensor]:
    """What :func:`sort` computes, in plain PyTorch."""
    if keys.device.type == "cpu" and (keys < 0).any():
        position = int((keys < 0).nonzero()[0])
        raise RuntimeError(f"dmoe::sort: keys[{position}]: expected at least 0, got {int(keys[position])}")
    permutation = torch.sort(keys & ((1 << end_bit) - 1), stable=True).indices
    return keys[permutation], permutation.int()


def _fake(keys: Tensor, end_bit: int) -> tuple[Tensor, Tensor]:
    return keys.new_empty(keys.shape), keys.new_empty(keys.shape, dtype=torch.int32)


_sort = define("sort(Tensor keys, int end_bit) -> (Tensor sorted_keys, Tensor permutation)", sort_ref, fake=_fake)


def sort(keys: Tensor, end_bit: int | None = None) -> tuple[Tensor, Tensor]:
    """Sort keys, equal ones in the order in which they came, by least-significant-digit radix sort.

    Args:
        keys: ``(N,)`` int16, int32 or int64, not negative, N below 2**31.
        end_bit: only the low ``end_bit`` bits decide the order: fewer bits are fewer passes over the keys.
            ``num_experts.bit_length()`` serves ids in [0, num_experts]. None is every bit but the sign.

    Returns:
        the keys in order, ``(N,)`` of their dtype, and ``permutation (N,)`` int32 with
        ``sorted_keys == keys[permutation]``.

    Raises:
        TypeError: another dtype.
        ValueError: ``keys`` is not 1-D, is too long, or ``end_bit`` is not in 1 .. bits without the sign.
        RuntimeError: a negative key, on the CPU. On CUDA such a key is ordered by its low bits.
    """
    if keys.dtype not in _BITS:
        raise TypeError(f"sort: keys: expected dtype int16, int32 or int64, got {keys.dtype}")
    if keys.dim() != 1:
        raise ValueError(f"sort: keys: expected one dimension, got shape {tuple(keys.shape)}")
    if known(keys.shape[0] >= 2**31):
        raise ValueError(f"sort: keys: expected fewer than 2**31 (the permutation is int32), got {keys.shape[0]}")
    bits = _BITS[keys.dtype]
    if end_bit is None:
        end_bit = bits
    if not 1 <= end_bit <= bits:
        raise ValueError(f"sort: end_bit: expected 1 .. {bits} for {keys.dtype}, got {end_bit}")
    return _sort(keys, end_bit)
