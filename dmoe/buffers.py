"""State that must stay float32 whatever the model's dtype is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Float32Buffers(nn.Module):
    """Keeps the buffers named in ``float32_buffers`` in float32 when the module is cast or loaded.

    A loss scale of 65536 is infinite in float16, and updates of 1e-3 vanish in bfloat16.
    """

    float32_buffers: tuple[str, ...] = ()

    def register_float32(
        self, name: str, value: float, *sizes: int, device: Any = None, persistent: bool = True
    ) -> None:
        """Register a buffer of ``sizes`` filled with ``value``."""
        buffer = torch.full(sizes, value, dtype=torch.float32, device=device)
        self.register_buffer(name, buffer, persistent=persistent)
        self.float32_buffers = (*self.float32_buffers, name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float32Buffers:
        before = {name: getattr(self, name) for name in self.float32_buffers}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = getattr(self, name)
            if new.dtype != torch.float32:
                exact = torch.empty_like(new, dtype=torch.float32) if old.is_meta else old.to(new.device)
                setattr(self, name, exact)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        for name in self.float32_buffers:
            setattr(self, name, getattr(self, name).float())
