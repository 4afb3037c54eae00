"""Adapters of a router's linear: thin columns beside its own, in the same product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dmoe.lora.adapters import Adapter, AdapterSet, of_block
from dmoe.lora.config import LoRA
from dmoe.lora.factors import fill_a, product_of
from dmoe.ops.router_logits import router_logits


class _RouterFactors(nn.Module):
    """Parameters ``a (r, H)`` and ``b (E, r)``."""

    def __init__(self, weight: Tensor, config: LoRA, **where: Any) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(config.rank, weight.shape[1], **where))
        self.b = nn.Parameter(torch.empty(weight.shape[0], config.rank, **where))

    def extra_repr(self) -> str:
        """Shapes."""
        return f"a={tuple(self.a.shape)}, b={tuple(self.b.shape)}, {self.a.dtype}"

    def product(self, scale: float) -> Tensor:
        """``scale B A``, ``(E, H)`` in float32 (float64 of float64)."""
        return product_of(self.a.detach(), self.b.detach(), scale)


class RouterAdapter(Adapter):
    """One adapter of a router; its factors stand under ``weight``.

    Args:
        weight: the router's, ``(E, H)``.
        config: of the adapter. Its dropout is not the router's.
        device, dtype: of the parameters.
    """

    def __init__(self, weight: Tensor, config: LoRA, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__(config)
        self.weight = _RouterFactors(weight, config, device=device, dtype=dtype)
        self.reset_parameters()

    def _fill(self, seed: int) -> None:
        a, b = self.weight.a, self.weight.b
        fresh = torch.empty(a.shape, dtype=torch.float32, device="cpu")
        fill_a(fresh, self.config, torch.Generator(device="cpu").manual_seed(seed))
        a.copy_(fresh)
        b.zero_()


class RouterAdapters(AdapterSet):
    """What stands as ``lora`` beside a router's weight."""

    def logits(
        self, project: Callable[[Tensor], Tensor], weight: Tensor, dtype: torch.dtype, backend: str | None
    ) -> Tensor:
        """``x W^T + s (x A^T) B^T``, ``(T, E)``: one product of x, with W and every A, and a thin one behind it.

        Args:
            project: ``x`` (jittered, in training) times the transpose of a matrix ``(columns, H)``, in ``dtype``.
            weight: W, ``(E, H)``.
            dtype: that the router computes in, whatever autocast says.
            backend: see :class:`dmoe.MoEConfig`.
        """
        held: Any = self._modules
        chosen = self.tokens_choice()
        names = self.at_work() if chosen is None else chosen.names
        ids = None if chosen is None else chosen.ids
        working = [(number, held[name]) for number, name in enumerate(names) if name in held]
        if not working:
            return project(weight)
        ranks = [adapter.config.rank for _, adapter in working]
        wide = torch.promote_types(weight.dtype, working[0][1].weight.a.dtype)
        columns = project(torch.cat([weight.to(wide), *(adapter.weight.a.to(wide) for _, adapter in working)]))
        plain, *inner = columns.split([weight.shape[0], *ranks], 1)
        if ids is not None:
            if ids.shape[0] != plain.shape[0]:
                raise ValueError(
                    f"MoE.router: adapter_ids: expected one for each of {plain.shape[0]} tokens, got {ids.shape[0]}"
                )
            inner = [
                part * (ids == number).unsqueeze(1).to(part.dtype)
                for part, (number, _) in zip(inner, working, strict=True)
            ]
        thin = torch.cat([part * adapter.config.scale for part, (_, adapter) in zip(inner, working, strict=True)], 1)
        back = torch.cat([adapter.weight.b.to(wide) for _, adapter in working], 1)
        back = of_block(back, None if chosen is None else chosen.block)
        return plain + router_logits(thin, back, None, dtype=dtype, backend=backend)
