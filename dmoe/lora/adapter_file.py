"""An adapter that is no model's yet: low-rank updates by the names of Hugging Face's modules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dmoe.checkpoint.stored import Stored, held, mapped
from dmoe.ops.activation import accumulate_dtype

PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")  # as an experts module lists them


@dataclass(frozen=True)
class Update:
    """``scale * b a``, added to a weight, or to each expert's.

    Attributes:
        a: ``(r, in)``, of experts ``(E, r, in)``; 1 for E where all share it.
        b: ``(out, r)``, of experts ``(E, out, r)``; likewise. Rows are those of the module's own parameter: gates,
            then ups, or by turns.
        scale: what multiplies the product.
    """

    a: Stored
    b: Stored
    scale: float

    @property
    def rank(self) -> int:
        """r."""
        return self.b.shape[-1]

    @property
    def num_experts(self) -> int:
        """E; 1 of a single weight."""
        return max(self.a.shape[0], self.b.shape[0]) if len(self.a.shape) == 3 else 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what it is added to, ``(out, in)`` or ``(E, out, in)``."""
        return (*((self.num_experts,) if len(self.a.shape) == 3 else ()), self.b.shape[-2], self.a.shape[-1])

    def padded(self, rank: int) -> Update:
        """The same update with zeros up to a rank."""
        more = rank - self.rank
        if more == 0:
            return self
        a = mapped([self.a], lambda t: F.pad(t[0], (0, 0, 0, more)), by_rows=len(self.a.shape) == 3)
        return replace(self, a=a, b=mapped([self.b], lambda t: F.pad(t[0], (0, more)), by_rows=True))

    def with_scale(self, scale: float) -> Update:
        """The same update under another scale: ``b`` is multiplied, in float32, and rounded where that has to be."""
        if scale == self.scale:
            return self
        ratio = self.scale / scale
        b = mapped([self.b], lambda t: (t[0].to(accumulate_dtype(t[0].dtype)) * ratio).to(t[0].dtype), by_rows=True)
        return replace(self, b=b, scale=scale)

    def expanded(self) -> Update:
        """Factors that experts share, once for each of them."""
        count = self.num_experts

        def of(factor: Stored) -> Stored:
            if len(factor.shape) < 3 or factor.shape[0] == count:
                return factor
            return mapped([factor], lambda t: t[0].expand(count, -1, -1))

        return replace(self, a=of(self.a), b=of(self.b))


@dataclass(frozen=True)
class AdapterFile:
    """An adapter's updates.

    Attributes:
        linear: by the module's name, as ``model.layers.0.self_attn.q_proj``.
        experts: by the name of the experts' module, as ``model.layers.0.mlp.experts``, and projection: ``gate_up_proj``
            or ``up_proj``, and ``down_proj``.
        config: of the file that it was read from.
        where: that file.
        model_type: of the model that it belongs to; None where nobody says.
        dropout: probability that a number of a module's input is dropped in training.
    """

    linear: Mapping[str, Update] = field(default_factory=dict)
    experts: Mapping[str, Mapping[str, Update]] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""
    model_type: str | None = None
    dropout: float = 0.0


def merged_rows(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """``weight + scale * b a`` in float32 (float64 of such numbers), rounded once."""
    wide = accumulate_dtype(weight.dtype)
    return (weight.to(wide) + scale * (b.to(wide) @ a.to(wide))).to(weight.dtype)


def joined(gate: Update | None, up: Update | None, where: str) -> Update:
    """Updates of gate and up projections that are apart, as one of both: the gate's rows, then up's.

    Of the same rank where they share ``a``, number for number; else of the sum of both ranks, with zeros for what one
    half takes of the other's: the same update, exactly.

    Raises:
        ValueError: they are not of the same experts.
    """
    one = up if gate is None else gate
    assert one is not None
    by_rows = len(one.b.shape) == 3  # experts, and not the rows of a single weight
    if gate is None or up is None:
        zeros = [True, False] if gate is None else [False, True]
        return replace(
            one, b=mapped([one.b], lambda t: torch.cat([_or_zeros(t[0], z) for z in zeros], -2), by_rows=by_rows)
        )
    inputs = [(*each.a.shape[:-2], each.a.shape[-1]) for each in (gate, up)]
    if inputs[0] != inputs[1] or gate.b.shape[:-1] != up.b.shape[:-1]:
        raise ValueError(
            f"{where}: expected gate and up projections of the same experts, got updates of {gate.shape} and {up.shape}"
        )
    up = up.with_scale(gate.scale)
    a_gate, a_up = gate.a.read(), up.a.read()
    if torch.equal(a_gate, a_up):
        b = mapped([gate.b, up.b], lambda t: torch.cat([t[0], t[1]], -2), by_rows=by_rows)
        return replace(gate, b=b)
    r_gate, r_up = gate.rank, up.rank
    b = mapped(
        [gate.b, up.b], lambda t: torch.cat([F.pad(t[0], (0, r_up)), F.pad(t[1], (r_gate, 0))], -2), by_rows=by_rows
    )
    return replace(gate, a=held(torch.cat([a_gate, a_up], -2), gate.a.where), b=b)


def apart(update: Update) -> tuple[Update, Update]:
    """The way back of :func:`joined`: of gate and of up. Rows are the gate's, then up's."""
    width = update.b.shape[-2] // 2
    a, b = update.a.read(), update.b.read()
    gate, up = b[..., :width, :], b[..., width:, :]
    half = update.rank // 2
    if update.rank % 2 == 0 and not gate[..., half:].any() and not up[..., :half].any():
        gate_a, up_a, gate, up = a[..., :half, :], a[..., half:, :], gate[..., :half], up[..., half:]
    else:
        gate_a, up_a = a, a
    return replace(update, a=held(gate_a), b=held(gate)), replace(update, a=held(up_a), b=held(up))


def uniform(
    linear: Mapping[str, Update], experts: Mapping[str, Mapping[str, Update]]
) -> tuple[dict[str, Update], dict[str, dict[str, Update]]]:
    """Updates of one rank and one scale, for readers that know no patterns of ranks."""
    updates = [*linear.values(), *(each for projections in experts.values() for each in projections.values())]
    rank, scale = max(each.rank for each in updates), updates[-1].scale

    def of(some: Mapping[str, Update]) -> dict[str, Update]:
        return {name: each.padded(rank).with_scale(scale) for name, each in some.items()}

    return of(linear), {module: of(projections) for module, projections in experts.items()}


def _or_zeros(tensor: Tensor, zeros: bool) -> Tensor:
    return torch.zeros_like(tensor) if zeros else tensor
