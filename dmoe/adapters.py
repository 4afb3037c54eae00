"""Low-rank adapters of all experts as values: factors that are multiplied one after the other, never together.

``W + scale * B A`` (LoRA, Hu et al. 2021, eq. 3) for each expert's matrix; :func:`dmoe.run_experts` and
:func:`dmoe.functional.moe_mlp` take them beside :class:`dmoe.ExpertWeights`, and compute
``x W^T + scale * (x A^T) B^T``. Neither the sum of ``W`` and the product, nor a gradient of its size, ever exists.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from dmoe.ops._checks import check_tensors

if TYPE_CHECKING:
    from dmoe.expert_weights import ExpertWeights


@dataclass(frozen=True)
class LowRank:
    """One factored matrix per expert, ``scale * b[e] @ a[e]``.

    Attributes:
        a: ``(E, r, in)``: from a row to r numbers.
        b: ``(E, ..., r)``: from there to the columns of the projection it belongs to, in that projection's shape:
            ``(E, 2, F, r)`` (gate, then up) or ``(E, F, r)`` beside ``up_proj``, ``(E, H, r)`` beside ``down_proj``.
        scale: alpha / r, or what else multiplies the product.

    Raises:
        TypeError: something that is no tensor, or factors of different dtypes.
        ValueError: shapes that do not fit together.
    """

    a: Tensor
    b: Tensor
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_tensors("LowRank", a=self.a, b=self.b)
        fits = self.a.dim() == 3 and self.b.dim() in (3, 4)
        if not fits or (self.a.shape[0], self.a.shape[1]) != (self.b.shape[0], self.b.shape[-1]):
            raise ValueError(
                "LowRank: expected a (E, r, in) and b (E, ..., r) of the same E and r, got shapes "
                f"{tuple(self.a.shape)} and {tuple(self.b.shape)}"
            )
        if self.a.dtype != self.b.dtype:
            raise TypeError(f"LowRank: expected factors of one dtype, got {self.a.dtype} and {self.b.dtype}")


@dataclass(frozen=True)
class Adapters:
    """Of both projections; None leaves one as it is.

    Attributes:
        up: beside ``up_proj``; of gated experts for both halves at once.
        down: beside ``down_proj``.

    Raises:
        TypeError: something that is no LowRank.
    """

    up: LowRank | None = None
    down: LowRank | None = None

    def __post_init__(self) -> None:
        for name, factors in (("up", self.up), ("down", self.down)):
            if factors is not None and not isinstance(factors, LowRank):
                raise TypeError(f"Adapters: {name}: expected LowRank or None, got {type(factors).__name__}")


def check_adapters(adapters: Adapters, weights: ExpertWeights) -> None:
    """They fit the weights that they belong to.

    Raises:
        TypeError: no Adapters, or factors of another dtype.
        ValueError: experts of different widths, a gate that lies apart, or other shapes.
    """
    if not isinstance(adapters, Adapters):
        raise TypeError(f"moe_mlp: adapters: expected dmoe.Adapters or None, got {type(adapters).__name__}")
    if weights.ffn_sizes or weights.gate_proj is not None:
        field = "ffn_sizes" if weights.ffn_sizes else "gate_proj"
        raise ValueError(f"moe_mlp: adapters: expected weights without {field}, which adapters do not know")
    projections = (("up", adapters.up, weights.up_proj), ("down", adapters.down, weights.down_proj))
    for name, factors, weight in projections:
        if factors is None:
            continue
        rank, into = factors.a.shape[1], weight.shape[-1]
        expected = ((weight.shape[0], rank, into), (*weight.shape[:-1], rank))
        if (tuple(factors.a.shape), tuple(factors.b.shape)) != expected:
            raise ValueError(
                f"moe_mlp: adapters.{name}: expected a {expected[0]} and b {expected[1]} beside {name}_proj, got "
                f"{tuple(factors.a.shape)} and {tuple(factors.b.shape)}"
            )
        if factors.a.dtype != weight.dtype or factors.a.device != weight.device:
            raise TypeError(
                f"moe_mlp: adapters.{name}: expected {weight.dtype} on {weight.device} as {name}_proj, got "
                f"{factors.a.dtype} on {factors.a.device}"
            )
