"""The two factors beside one projection of all experts: their shapes, their initial values, one expert's part."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dmoe.expert_init import expert_generator
from dmoe.expert_slice import ExpertSlice, local_part
from dmoe.lora.config import LoRA
from dmoe.ops.activation import accumulate_dtype


@dataclass(frozen=True)
class ProjectionShape:
    """A projection of all experts that live here, as :class:`dmoe.ExpertWeights` has it.

    Attributes:
        up: whether it is the one from H to F, with its gate if there is one; else the one back.
        shape: ``(E, 2, F, H)``, ``(E, F, H)`` or ``(E, H, F)``; with ``widths`` ``(2, sum F, H)``, ``(sum F, H)`` or
            ``(H, sum F)``.
        widths: each expert's F, where they differ; else empty.
    """

    up: bool
    shape: tuple[int, ...]
    widths: tuple[int, ...] = ()

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.widths) or self.shape[0]

    @property
    def half(self) -> str:
        """``up`` or ``down``."""
        return "up" if self.up else "down"

    def check_shared(self, config: LoRA, operation: str) -> None:
        """Experts can share the factors that they are to share.

        Raises:
            ValueError: their widths differ, and the factor has that width.
        """
        for name, shared, of_width in (("a", config.share_a, not self.up), ("b", config.share_b, self.up)):
            if shared and self.widths and of_width:
                raise ValueError(
                    f"{operation}: share_{name}: expected False beside the {self.half} projection of experts of "
                    f"different widths {self.widths}, got True"
                )

    def factor_shapes(self, config: LoRA) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of ``a`` and ``b``, as :class:`dmoe.LowRank` takes them.

        Raises:
            ValueError: see :meth:`check_shared`.
        """
        self.check_shared(config, "LoRA")
        experts, rank = self.num_experts, config.rank
        *out, columns = self.shape
        a: tuple[int, ...] = (rank, columns) if self.widths and not self.up else (experts, rank, columns)
        if self.widths:
            out = [*out] if self.up else [experts, *out]
        b = (*out, rank)
        return (1, *a[1:]) if config.share_a else a, (1, *b[1:]) if config.share_b else b

    def of_expert(self, factor: Tensor, expert: int, *, is_a: bool) -> Tensor:
        """One expert's part of a factor, counted among those here: a view ``(r, in)`` or ``(..., out, r)``."""
        packed = self.widths and is_a is not self.up  # the factor that has F as a dimension
        if not packed:
            return factor[min(expert, factor.shape[0] - 1)]
        start, width = sum(self.widths[:expert]), self.widths[expert]
        return factor.narrow(-1 if is_a else -2, start, width)


class LoRAFactors(nn.Module):
    """Parameters ``a`` and ``b`` beside one projection.

    Args:
        projection: what they stand beside.
        config: of the adapter.
        where: which experts live here; parameters are ``DTensor`` where the experts' are.
        device, dtype: of the parameters.
    """

    a: nn.Parameter
    b: nn.Parameter

    def __init__(
        self, projection: ProjectionShape, config: LoRA, where: ExpertSlice, *, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        self.projection = projection
        for name, shape in zip("ab", projection.factor_shapes(config), strict=True):
            local = torch.empty(shape, device=device, dtype=dtype)
            self.register_parameter(name, nn.Parameter(where.distributed(local, None)))

    @torch.no_grad()
    def fill(self, config: LoRA, experts: Sequence[int], generators: Sequence[torch.Generator]) -> None:
        """Fresh values; each expert draws from its own generator, and what is shared is expert 0's."""
        a, b = local_part(self.a), local_part(self.b)
        b.zero_()
        for position, generator in zip(range(len(experts)), generators, strict=True):
            of_expert = self.projection.of_expert(a, position, is_a=True)
            fresh = torch.empty(of_expert.shape, dtype=torch.float32, device="cpu")
            fill_a(fresh, config, generator)
            if position == 0 or not config.share_a:
                of_expert.copy_(fresh)

    def product(self, expert: int, scale: float) -> Tensor:
        """``scale B A`` of one expert, counted among those here: ``(..., out, in)`` in float32 (float64 of float64)."""
        a, b = (
            self.projection.of_expert(local_part(factor.detach()), expert, is_a=is_a)
            for factor, is_a in ((self.a, True), (self.b, False))
        )
        return product_of(a, b, scale)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """What ``assign=True`` brings is marked as what was here."""
        before = {name: vars(parameter) for name, parameter in self.named_parameters()}
        super()._load_from_state_dict(*args, **kwargs)
        for name, parameter in self.named_parameters():
            vars(parameter).update(before[name])

    def extra_repr(self) -> str:
        """Shapes."""
        return f"a={tuple(self.a.shape)}, b={tuple(self.b.shape)}, {self.a.dtype}"


def product_of(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """``scale b a`` of ``a (r, in)`` and ``b (..., out, r)``: ``(..., out, in)`` in float32 (float64 of float64)."""
    wide = accumulate_dtype(a.dtype)
    return (b.to(wide).flatten(0, -2) @ a.to(wide)).mul_(scale).view(*b.shape[:-1], a.shape[-1])


def fill_a(a: Tensor, config: LoRA, generator: torch.Generator | None) -> None:
    """Fresh values for one ``A``, ``(r, in)`` float32 on the CPU."""
    if config.init == "gaussian":
        a.normal_(0, 1 / config.rank, generator=generator)
    else:
        bound = 1 / math.sqrt(a.shape[-1])
        a.uniform_(-bound, bound, generator=generator)


def generators_of(where: ExpertSlice, seed: int) -> list[torch.Generator]:
    """One for each expert that lives here, in the state that it has on one rank."""
    return [expert_generator(seed, expert) for expert in where.experts]
