"""Low-rank adapters of all experts as values: factors that are multiplied one after the other, never together.

``W + scale * B A`` (LoRA, Hu et al. 2021, eq. 3) for each expert's matrix; :func:`dmoe.run_experts` and
:func:`dmoe.functional.moe_mlp` take them beside :class:`dmoe.ExpertWeights`, and compute
``x W^T + scale * (x A^T) B^T``. Neither the sum of ``W`` and the product, nor a gradient of its size, ever exists.
Several of them may stand beside the same weights, one of them chosen by each token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dmoe.expert_slice import scaled
from dmoe.ops._checks import check_integer, check_tensors

if TYPE_CHECKING:
    from dmoe.expert_weights import ExpertWeights


def check_dropout(where: str, given: Any) -> None:
    """Raises ValueError, which begins with ``where``, for what is no probability below 1."""
    if not isinstance(given, int | float) or not 0 <= given < 1:
        raise ValueError(f"{where}: expected 0 <= p < 1, got {given!r:.40}")


@dataclass(frozen=True)
class LowRank:
    """One factored matrix per expert, ``scale * b[e] @ a[e]``.

    Attributes:
        a: ``(E, r, in)``: from a row to r numbers; ``(1, r, in)`` where all experts share it. Beside the ``down_proj``
            of experts of different widths ``(r, sum F)``.
        b: ``(E, ..., r)``: from there to the columns of the projection it belongs to, in that projection's shape:
            ``(E, 2, F, r)`` (gate, then up) or ``(E, F, r)`` beside ``up_proj``, ``(E, H, r)`` beside ``down_proj``;
            with 1 for E where all share it. Of experts of different widths ``(2, sum F, r)`` or ``(sum F, r)`` beside
            ``up_proj``.
        scale: alpha / r, or what else multiplies the product.
        dropout: probability that a number of the adapter's input is dropped (the base's is not); masks are drawn anew
            in each call, made again in backward, and not kept.

    Raises:
        TypeError: something that is no tensor, or factors of different dtypes.
        ValueError: shapes that do not fit together, or a probability outside [0, 1).
    """

    a: Tensor
    b: Tensor
    scale: float = 1.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_tensors("LowRank", a=self.a, b=self.b)
        fits = self.a.dim() in (2, 3) and self.b.dim() in (2, 3, 4) and self.a.shape[-2] == self.b.shape[-1]
        if fits and self.a.dim() == 3 and self.b.dim() == 4:
            fits = self.a.shape[0] == self.b.shape[0] or 1 in (self.a.shape[0], self.b.shape[0])
        if not fits:
            raise ValueError(
                "LowRank: expected a (E, r, in) and b (E, ..., r) of the same E, or 1, and r, got shapes "
                f"{tuple(self.a.shape)} and {tuple(self.b.shape)}"
            )
        if self.a.dtype != self.b.dtype:
            raise TypeError(f"LowRank: expected factors of one dtype, got {self.a.dtype} and {self.b.dtype}")
        check_dropout("LowRank: dropout", self.dropout)

    @property
    def rank(self) -> int:
        """r."""
        return self.b.shape[-1]


@dataclass(frozen=True)
class Adapters:
    """Of both projections; None leaves one as it is.

    Attributes:
        up: beside ``up_proj`` (and ``gate_proj``); of gated experts for both halves at once.
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

    def with_grad_scale(self, scale: float) -> Adapters:
        """The same, whose gradients backward multiplies by ``scale``."""

        def of(low: LowRank | None) -> LowRank | None:
            if low is None:
                return None
            return replace(low, a=scaled(low.a, 1.0, scale), b=scaled(low.b, 1.0, scale))

        return Adapters(of(self.up), of(self.down))


def check_adapters(adapters: Any, adapter_ids: Tensor | None, weights: ExpertWeights, leading: Sequence[int]) -> None:
    """They fit the weights that they belong to, and are chosen by every token where there are several.

    Raises:
        TypeError: no Adapters, factors of another dtype, or ids that are no integers.
        ValueError: other shapes or devices, several of them without ids, or ids without several.
        RuntimeError: on the CPU, an id outside [-1, N).
    """
    if isinstance(adapters, list | tuple):
        given = {f"adapters[{n}]": each for n, each in enumerate(adapters)}
        if not given:
            raise ValueError("moe_mlp: adapters: expected at least one of them, got an empty list")
        if adapter_ids is None:
            raise ValueError(
                f"moe_mlp: adapter_ids: expected shape {tuple(leading)} beside a list of adapters, got None"
            )
        _check_ids(adapter_ids, len(given), weights, leading)
    else:
        given = {"adapters": adapters}
        if adapter_ids is not None:
            raise ValueError("moe_mlp: adapter_ids: expected a list of adapters beside them, got one or none")
    for name, each in given.items():
        if not isinstance(each, Adapters):
            raise TypeError(f"moe_mlp: {name}: expected dmoe.Adapters or None, got {type(each).__name__}")
        for projection in ("up", "down"):
            if (factors := getattr(each, projection)) is not None:
                _check_factors(f"{name}.{projection}", factors, projection, weights)
    for projection in ("up", "down"):
        there = [low for low in (getattr(each, projection) for each in given.values()) if low is not None]
        dropouts = {low.dropout for low in there}
        if len(dropouts) > 1:
            raise ValueError(
                f"moe_mlp: adapters: expected one dropout for all that are chosen from, got {sorted(dropouts)} for "
                f"{projection}"
            )


def _check_factors(name: str, factors: LowRank, projection: str, weights: ExpertWeights) -> None:
    experts, hidden, rank = weights.num_experts, weights.hidden_size, factors.rank
    halves = (2,) if weights.gated else ()
    in_front = () if weights.ffn_sizes else (experts,)
    width = sum(weights.ffn_sizes) if weights.ffn_sizes else weights.down_proj.shape[-1]
    if projection == "up":
        expected: tuple[tuple[int, ...], ...] = (experts, rank, hidden), (*in_front, *halves, width, rank)
    else:
        expected = (*in_front, rank, width), (experts, hidden, rank)
    stacked = (True, not weights.ffn_sizes) if projection == "up" else (not weights.ffn_sizes, True)  # expert by expert
    shared = [(1, *shape[1:]) if first else shape for shape, first in zip(expected, stacked, strict=True)]
    got = (tuple(factors.a.shape), tuple(factors.b.shape))
    if any(shape not in allowed for shape, *allowed in zip(got, expected, shared, strict=True)):
        raise ValueError(
            f"moe_mlp: {name}: expected a {expected[0]} and b {expected[1]} beside {projection}_proj (or 1 for "
            f"{experts} experts), got {got[0]} and {got[1]}"
        )
    dtype = weights.dtype if isinstance(weights.up_proj, Tensor) else None
    if (dtype is not None and factors.a.dtype != dtype) or factors.a.device != weights.up_proj.device:
        raise TypeError(
            f"moe_mlp: {name}: expected {dtype or 'factors'} on {weights.up_proj.device} as {projection}_proj, got "
            f"{factors.a.dtype} on {factors.a.device}"
        )


def _check_ids(ids: Any, count: int, weights: ExpertWeights, leading: Sequence[int]) -> None:
    check_tensors("moe_mlp", adapter_ids=ids)
    check_integer("moe_mlp", adapter_ids=ids)
    if tuple(ids.shape) != tuple(leading) or ids.device != weights.up_proj.device:
        raise ValueError(
            f"moe_mlp: adapter_ids: expected one for each token, shape {tuple(leading)} on {weights.up_proj.device}, "
            f"got {tuple(ids.shape)} on {ids.device}"
        )
    if ids.device.type == "cpu" and ids.numel() and not torch.compiler.is_compiling():
        least, most = (int(value) for value in ids.aminmax())
        if least < -1 or most >= count:
            raise RuntimeError(
                f"moe_mlp: adapter_ids: expected numbers of {count} adapters, or -1 for none, got {least} to {most}"
            )
