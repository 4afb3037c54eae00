"""Keys and values of what a batch of sequences has read so far."""

from __future__ import annotations

import torch
from torch import Tensor

from dmoe.models.config import MoEGPTConfig


class KeyValueCache:
    """Keys and values of B sequences, each at its own length, in memory that is taken once.

    A token's slot is its position, so a shorter sequence leaves no gap: what lies behind its length is never seen, and
    is written over by what it reads next.

    Args:
        config: of the model: layers, heads, channels.
        batch_size: B.
        capacity: the most tokens of one sequence, at most ``max_positions``.
        device, dtype: those of the model's keys; under autocast its type.

    Attributes:
        keys, values: ``(layers, B, capacity, heads, D)``.
        lengths: ``(B,)`` int64, tokens that each sequence has read.
        reach: no sequence is longer; kept on the host, which so need not ask the device.

    Raises:
        ValueError: a capacity beyond ``max_positions``.
    """

    def __init__(
        self,
        config: MoEGPTConfig,
        batch_size: int,
        capacity: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not 0 <= capacity <= config.max_positions:
            raise ValueError(
                f"KeyValueCache: capacity: expected at most max_positions = {config.max_positions}, got {capacity}"
            )
        shape = (config.num_layers, batch_size, capacity, config.num_heads, config.head_size)
        # Zeros, not whatever lies there: a weight of 0 times NaN would be NaN.
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros_like(self.keys)
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.reach = 0

    @property
    def capacity(self) -> int:
        """The most tokens of one sequence."""
        return self.keys.shape[2]

    def positions(self, width: int) -> Tensor:
        """Where the next ``width`` tokens of each sequence stand, ``(B, width)`` int64.

        Raises:
            ValueError: they do not fit.
        """
        if self.reach + width > self.capacity:
            raise ValueError(
                f"KeyValueCache: expected at most {self.capacity} tokens of a sequence, its capacity, got "
                f"{self.reach} and {width} more"
            )
        return self.lengths[:, None] + torch.arange(width, device=self.lengths.device)

    def write(self, layer: int, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """Keep ``(B, S, heads, D)`` keys and values of tokens at ``positions (B, S)``."""
        rows = torch.arange(len(positions), device=positions.device)[:, None]
        self.keys[layer][rows, positions] = keys.to(self.keys.dtype)
        self.values[layer][rows, positions] = values.to(self.values.dtype)

    def read(self, layer: int, reach: int) -> tuple[Tensor, Tensor]:
        """The first ``reach`` slots of keys and values, each ``(B, heads, reach, D)``, as views."""
        return self.keys[layer, :, :reach].transpose(1, 2), self.values[layer, :, :reach].transpose(1, 2)

    def advance(self, width: int, token_mask: Tensor | None) -> None:
        """All layers have written ``width`` tokens of each sequence, of which ``token_mask (B, width)`` counts some."""
        self.lengths = self.lengths + (width if token_mask is None else token_mask.sum(1))
        self.reach += width
