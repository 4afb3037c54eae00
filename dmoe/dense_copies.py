"""What experts that begin as a dense FFN are made of: pure functions of its tensors, with the papers they come from.

Shapes: F is the dense FFN's width, H the model's. An FFN is its up projections, ``(F, H)`` each (the gate first, where
there is one), and ``down (H, F)``; its F columns are independent of each other, so it is a sum over parts of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def generator_of(seed: int, *where: object) -> torch.Generator:
    """Random numbers of one thing, as ``generator_of(0, "layer", 3, "router")``: always the same, and no other's."""
    digest = hashlib.sha256("/".join(map(str, (seed, *where))).encode()).digest()
    return torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def perturb(weight: Tensor, scale: float, generator: torch.Generator, *, relative: bool = False) -> Tensor:
    """A weight with Gaussian noise n: ``w + scale * std(w) * n``, or with ``relative``: ``w * (1 + scale * n)``.

    Args:
        weight: any shape and floating dtype.
        scale: at least 0, dimensionless.
        generator: of the CPU.
        relative: noise in proportion to each number instead of to all of them.

    Returns:
        A new tensor of the same shape and dtype.
    """
    noise = torch.randn(weight.shape, generator=generator, device="cpu", dtype=torch.float32)
    if relative:
        return weight * (1 + scale * noise).to(weight.device, weight.dtype)
    exact = weight.float()
    return (exact + scale * exact.std(correction=0) * noise.to(weight.device)).to(weight.dtype)


def redraw(
    ups: Sequence[Tensor], down: Tensor, share: float, generator: torch.Generator
) -> tuple[list[Tensor], Tensor]:
    """A share of an FFN's columns drawn anew, the same in all projections (Nakamura et al. 2025, "Drop-Upcycling").

    What is drawn is normal, with each projection's own mean and standard deviation.

    Args:
        ups: up projections, ``(F, H)`` each.
        down: ``(H, F)``.
        share: r in [0, 1]: round(r F) columns.
        generator: of the CPU.

    Returns:
        New tensors, with the other columns as they were.
    """
    width = down.shape[1]
    columns = torch.randperm(width, generator=generator)[: round(share * width)]

    def drawn(weight: Tensor, dim: int) -> Tensor:
        exact = weight.float()
        shape = [columns.numel() if d == dim else size for d, size in enumerate(weight.shape)]
        fresh = torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32).to(weight.device)
        fresh = exact.mean() + exact.std(correction=0) * fresh
        return weight.index_copy(dim, columns.to(weight.device), fresh.to(weight.dtype))

    return [drawn(up, 0) for up in ups], drawn(down, 1)


def segments(ups: Sequence[Tensor], down: Tensor, granularity: int) -> list[tuple[list[Tensor], Tensor]]:
    """An FFN cut along F into G experts of F / G, whose outputs' mean it is (He et al. 2024, arXiv 2410.07524).

    Gate weights that sum to 1 over K chosen FFNs give each of their K G segments a G-th of its FFN's weight; so every
    segment's down projection is G times its part of the FFN's.

    Args:
        ups: up projections, ``(F, H)`` each.
        down: ``(H, F)``.
        granularity: G, a divisor of F. 1 gives the FFN itself.

    Returns:
        G times ``(ups (F / G, H), down (H, F / G))``.

    Raises:
        ValueError: F is no multiple of G.
    """
    width = down.shape[1]
    if granularity < 1 or width % granularity:
        raise ValueError(f"granularity: expected a divisor of the FFN's width {width}, got {granularity}")
    step = width // granularity
    return [
        ([up[start : start + step] for up in ups], down[:, start : start + step] * granularity)
        for start in range(0, width, step)
    ]


def router_rows(num_ffns: int, granularity: int, hidden_size: int, std: float, generator: torch.Generator) -> Tensor:
    """A router's weight under which the segments of an FFN are chosen together ("virtual groups", arXiv 2410.07524).

    Args:
        num_ffns: E copies of the dense FFN.
        granularity: G, into how many experts each is cut; theirs follow each other.
        hidden_size: H.
        std: of the normal distribution.
        generator: of the CPU.

    Returns:
        ``(E * G, H)`` float32: rows e G to e G + G - 1 are one row.
    """
    rows = torch.randn(num_ffns, hidden_size, generator=generator, device="cpu", dtype=torch.float32) * std
    return rows.repeat_interleave(granularity, 0)
