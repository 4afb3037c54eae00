"""Causal self-attention, over one piece of text or over a cache, and rotary positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmoe.models.cache import KeyValueCache
from dmoe.models.config import MoEGPTConfig


class Rotary(nn.Module):
    """Cosines and sines of Su et al. 2021, eq. 34, with base 10000: constants, no buffers, float64 where it counts.

    Not saved, since the config says them; as buffers ``to_empty`` would leave them unwritten and a cast would round
    them. They follow the module's device.
    """

    def __init__(self, length: int, head_size: int, device: Any = None) -> None:
        super().__init__()
        where: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
        frequency = 10_000.0 ** (-torch.arange(0, head_size, 2, **where) / head_size)
        angle = torch.arange(length, **where)[:, None] * frequency
        self.exact = angle.cos(), angle.sin()
        self.cos, self.sin = (part.float() for part in self.exact)
        if device is not None and torch.device(device).type != "meta":
            self._follow(torch.device(device), torch.float32)

    def _follow(self, device: torch.device, dtype: torch.dtype) -> None:
        if (self.cos.device, self.cos.dtype) != (device, dtype):
            self.cos, self.sin = (part.to(dtype).to(device) for part in self.exact)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rotary:
        super()._apply(fn, recurse)
        like = fn(torch.empty(0, dtype=self.cos.dtype, device=self.cos.device))
        if like.device.type != "meta":
            self._follow(like.device, torch.promote_types(like.dtype, torch.float32))
        return self

    def forward(self, positions: Tensor | None, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines in at least float32, ``(S, D / 2)``, or ``(B, 1, S, D / 2)`` at ``positions (B, S)``."""
        if not like.is_meta:
            self._follow(like.device, torch.promote_types(like.dtype, torch.float32))
        cos, sin = (part.to(like.device) for part in (self.cos, self.sin))
        if positions is None:
            return cos[:width], sin[:width]
        return cos[positions][:, None], sin[positions][:, None]


class Reading(NamedTuple):
    """What attention has to know of a forward: the same in every block."""

    positions: Tensor | None
    """``(B, S)`` int64; None: 0 to S - 1 in each sequence."""
    turn: tuple[Tensor, Tensor] | None
    """Rotary's cosines and sines; None without it."""
    token_mask: Tensor | None
    """``(B, S)`` bool, False for tokens that nobody may see."""
    cache: KeyValueCache | None
    visible: Tensor | None
    """``(B, 1, S, reach)`` bool: the slots of the cache that each token sees; None where it holds nothing yet."""


class Attention(nn.Module):
    """Softmax of ``q k^T / sqrt(D)`` over what stands before, times v.

    Rows of ``qkv.weight (3 H, H)`` are all heads' queries, then all keys, then all values.
    """

    def __init__(self, config: MoEGPTConfig, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.heads, self.qk_norm = config.num_heads, config.qk_norm
        H = config.hidden_size
        self.qkv = nn.Linear(H, 3 * H, bias=config.bias, device=device, dtype=dtype)
        self.out = nn.Linear(H, H, bias=config.bias, device=device, dtype=dtype)

    def forward(self, x: Tensor, reading: Reading, layer: int) -> Tensor:
        """``(B, S, H)`` to the same; ``layer`` is the number of this block in the cache."""
        B, S, H = x.shape
        q, k, v = self.qkv(x).view(B, S, 3, self.heads, H // self.heads).permute(2, 0, 3, 1, 4)
        q, k = (self._placed(part, reading).to(v.dtype) for part in (q, k))
        cache = reading.cache
        if reading.token_mask is not None:
            # What nobody sees has a weight of 0, and 0 times what is not finite is NaN.
            unseen = ~reading.token_mask[:, None, :, None]
            k, v = k.masked_fill(unseen, 0), v.masked_fill(unseen, 0)
        if cache is not None:
            assert reading.positions is not None
            cache.write(layer, k.transpose(1, 2), v.transpose(1, 2), reading.positions)
        if cache is None or reading.visible is None:
            # Padding stands behind what counts, so the causal mask hides it.
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            k, v = (part.to(q.dtype) for part in cache.read(layer, reading.visible.shape[-1]))
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=reading.visible)
        return self.out(mixed.transpose(1, 2).reshape(B, S, H))

    def _placed(self, part: Tensor, reading: Reading) -> Tensor:
        """Queries or keys ``(B, heads, S, D)``, normalised and turned; in at least float32 where there is either."""
        if self.qk_norm or reading.turn is not None:
            part = part.to(torch.promote_types(part.dtype, torch.float32))
        if self.qk_norm:
            part = F.rms_norm(part, part.shape[-1:])
        if reading.turn is None:
            return part
        cos, sin = reading.turn
        first, second = part.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)
