"""State beside the parameters that must stay float32, and exact, whatever is done to the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Float32Buffers(nn.Module):
    """A module's float32 state: saved with the model as a buffer, or not saved and no buffer.

    A loss scale of 65536 is infinite in float16, updates of 1e-3 vanish in bfloat16, and it counts to 256. So buffers
    are made float32 again after a cast. What is not saved is kept from everything that frameworks do to buffers: DDP
    sends rank 0's to all ranks, ``to_empty`` leaves them unwritten, loading onto ``meta`` with ``assign=True`` leaves
    them there. It follows the module's device, but never to ``meta``: it would lose its values.

    Read both kinds by :meth:`float32`.
    """

    float32_saved: tuple[str, ...] = ()
    float32_unsaved: tuple[str, ...] = ()

    def register_float32(
        self, name: str, value: float, *sizes: int, device: Any = None, persistent: bool = True
    ) -> None:
        """Register state of ``sizes`` filled with ``value``; ``persistent``: whether it is saved with the model."""
        tensor = torch.full(sizes, value, dtype=torch.float32, device=device)
        if persistent:
            self.register_buffer(name, tensor)
            self.float32_saved = (*self.float32_saved, name)
        else:
            real = torch.full(sizes, value, dtype=torch.float32, device="cpu") if tensor.is_meta else tensor
            setattr(self, name, real)
            self.float32_unsaved = (*self.float32_unsaved, name)

    def float32(self, name: str, device: torch.device) -> Tensor:
        """The state of this name, in float32; and, where it is not saved, on the device that it is needed on.

        FSDP1 casts buffers where they lie, unseen by :meth:`_apply`, and frameworks that move parameters and buffers
        do not know about the rest.
        """
        tensor = getattr(self, name)
        if name in self.float32_unsaved and tensor.device != device:
            if device.type == "meta":
                return tensor.to(device)
            setattr(self, name, tensor.to(device, non_blocking=True))
        elif tensor.dtype != torch.float32:
            setattr(self, name, tensor.float())
        return getattr(self, name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float32Buffers:
        before = {name: getattr(self, name) for name in self.float32_saved}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = getattr(self, name)
            if new.dtype != torch.float32:
                exact = torch.empty_like(new, dtype=torch.float32) if old.is_meta else old.to(new.device)
                setattr(self, name, exact)
        for name in self.float32_unsaved:
            old = getattr(self, name)
            device = fn(old).device  # where it puts a tensor; what it makes of the values is not wanted
            if device.type != "meta":
                setattr(self, name, old.to(device))
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        for name in self.float32_saved:
            setattr(self, name, getattr(self, name).float())
