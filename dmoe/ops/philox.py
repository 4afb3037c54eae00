"""Counter-based random numbers: a mask is a function of (seed, row, column), so backward makes it again.

Philox4x32-10 (Salmon et al. 2011), the generator behind cuRAND and Triton. ``csrc/philox.h`` is its twin for the CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Streams: the same seed serves all of them independently.
ACTIVATION_DROPOUT, EXPERT_DROPOUT, INPUT_JITTER, UP_ADAPTER_DROPOUT, DOWN_ADAPTER_DROPOUT = range(5)

_MASK = 0xFFFFFFFF


def draw_seed(device: torch.device) -> Tensor:
    """A fresh seed from PyTorch's generator of ``device``: scalar int64, never read by the host."""
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device)


def random_bits(seed: Tensor, rows: Tensor, width: int, stream: int) -> Tensor:
    """Uniform 32-bit integers for every (row, column).

    Args:
        seed: scalar int64.
        rows: row numbers, ``(R,)`` integer in [0, 2**32).
        width: number of columns.
        stream: which of the independent streams.

    Returns:
        ``(R, width)`` int64 in [0, 2**32).
    """
    quads = torch.arange((width + 3) // 4, device=rows.device, dtype=torch.int64)
    shape = (rows.shape[0], quads.shape[0])
    c0, c1 = quads.expand(shape), rows.to(torch.int64).unsqueeze(1).expand(shape)
    c2, c3 = torch.full_like(c0, stream), torch.zeros_like(c0)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        # The signed product wraps modulo 2**64, so both halves of the unsigned one can be read off it.
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _MASK) ^ c1 ^ k0,
            product1 & _MASK,
            ((product0 >> 32) & _MASK) ^ c3 ^ k1,
            product0 & _MASK,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return torch.stack((c0, c1, c2, c3), dim=-1).flatten(1)[:, :width]


def dropout_scale(seed: Tensor, rows: Tensor, width: int, stream: int, p: float, dtype: torch.dtype) -> Tensor:
    """``(R, width)`` of 0 with probability p, else 1 / (1 - p)."""
    keep = random_bits(seed, rows, width, stream) >= round(p * 2**32)
    return keep.to(dtype) * (1.0 / (1.0 - p))


def jitter_scale(seed: Tensor, num_rows: int, width: int, amount: float, dtype: torch.dtype) -> Tensor:
    """``(num_rows, width)`` uniform in [1 - amount, 1 + amount)."""
    rows = torch.arange(num_rows, device=seed.device)
    unit = random_bits(seed, rows, width, INPUT_JITTER).to(torch.float64) * 2.0**-32
    return (1.0 + amount * (2.0 * unit - 1.0)).to(dtype)
