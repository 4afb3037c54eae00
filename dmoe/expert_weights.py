"""The weights of all experts as one value: shapes, checks, and cutting it into groups of experts."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from dmoe.ops._checks import check_floating, check_tensors
from dmoe.ops._moe_mlp_call import PROJECTIONS, WEIGHTS
from dmoe.ops.moe_mlp_deferred import Later, defer
from dmoe.quantized_weight import QuantizedWeight

Weight = Any  # a Tensor or a QuantizedWeight
# which of an expert's dimensions is F
F_DIM = {"up_proj": -2, "up_bias": -1, "down_proj": -1, "down_bias": None, "gate_proj": -2}


@dataclass(frozen=True)
class ExpertWeights:
    """Weights of all experts, in ``nn.Linear``'s [out, in] order.

    Projections are read as they lie in memory, as long as one of their last two dimensions is contiguous: a transposed
    view costs no copy, and its gradient comes in the same order (that of ``torch.empty_like``). MegaBlocks' weights of
    shape ``(E * F, H)``, say, are ``gate_proj=w1.view(E, F, H)``, ``up_proj=v1.view(E, F, H)`` and
    ``down_proj=w2.view(E, F, H).transpose(1, 2)``. Rows of gate and up may take turns (gate 0, up 0, gate 1 ...):
    GPT-OSS's ``w (E, H, 2 F)`` and ``b (E, 2 F)`` are ``up_proj=w.mT.unflatten(1, (F, 2)).transpose(1, 2)`` and
    ``up_bias=b.unflatten(1, (F, 2)).transpose(1, 2)``. Block-sparse products alone copy them into one piece in every
    call.

    Projections of experts of one width may each be a :class:`dmoe.QuantizedWeight` instead of a tensor: they are
    frozen, and products decode them block by block. Biases stay tensors.

    Attributes:
        up_proj: ``(E, 2, F, H)`` gate then up when ``gated``, else ``(E, F, H)``. With ``ffn_sizes`` the experts stand
            side by side: ``(2, sum F, H)`` or ``(sum F, H)``.
        down_proj: ``(E, H, F)``, or ``(H, sum F)``.
        up_bias: ``(E, 2, F)`` or ``(E, F)``, with ``ffn_sizes`` ``(2, sum F)`` or ``(sum F,)``; or None.
        down_bias: ``(E, H)``, or None.
        gated: whether there is a gate.
        ffn_sizes: each expert's width where they differ; empty for ``down_proj``'s common F.
        gate_proj: the gate apart from ``up_proj``, which then holds the other half only: ``(E, F, H)`` each, or
            ``(sum F, H)``. None where ``up_proj`` holds it.
        later: what takes the weights' gradients when these are :meth:`deferred`; None otherwise.

    Raises:
        TypeError: something that is no tensor, or no floating-point one.
        ValueError: shapes, dtypes or devices that do not fit together.
    """

    up_proj: Weight
    down_proj: Weight
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    gated: bool = True
    ffn_sizes: tuple[int, ...] = ()
    gate_proj: Weight | None = None
    later: Later | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._check_kinds()
        hidden, halves = self.up_proj.shape[-1], (2,) if self.gated else ()
        in_front: tuple[int, ...]
        if self.ffn_sizes:
            experts, in_front, width = len(self.ffn_sizes), (), sum(self.ffn_sizes)
        else:
            experts, width = self.down_proj.shape[0], self.down_proj.shape[-1]
            in_front = (experts,)
        up = (*in_front, *(halves if self.gate_proj is None else ()), width, hidden)
        expected = {
            "up_proj": (self.up_proj, up),
            "down_proj": (self.down_proj, (*in_front, hidden, width)),
            "up_bias": (self.up_bias, (*in_front, *halves, width)),
            "down_bias": (self.down_bias, (experts, hidden)),
            "gate_proj": (self.gate_proj, up),
        }
        for name, (tensor, shape) in expected.items():
            if tensor is None:
                continue
            if tuple(tensor.shape) != tuple(shape):
                raise ValueError(
                    f"ExpertWeights: {name}: expected shape {tuple(shape)} (gated={self.gated}, "
                    f"{experts} experts), got {tuple(tensor.shape)}"
                )
            dtype = self.dtype if isinstance(tensor, Tensor) else None
            if (dtype is not None and tensor.dtype != dtype) or tensor.device != self.up_proj.device:
                got = f"{tensor.dtype} on {tensor.device}" if isinstance(tensor, Tensor) else str(tensor.device)
                raise ValueError(
                    f"ExpertWeights: {name}: expected {dtype or 'codes'} on {self.up_proj.device} as up_proj, got {got}"
                )

    def _check_kinds(self) -> None:
        given = {n: t for n in WEIGHTS if (t := getattr(self, n)) is not None or n in ("up_proj", "down_proj")}
        codes = [n for n, t in given.items() if isinstance(t, QuantizedWeight) and n in PROJECTIONS]
        check_tensors("ExpertWeights", **{n: t for n, t in given.items() if n not in codes})
        if codes and self.ffn_sizes:
            raise ValueError(
                f"ExpertWeights: {codes[0]}: expected a tensor with ffn_sizes={self.ffn_sizes}, got a QuantizedWeight, "
                "which holds experts of one width"
            )
        if self.gate_proj is not None and not self.gated:
            raise ValueError(
                f"ExpertWeights: gate_proj: expected None with gated=False, got shape {tuple(self.gate_proj.shape)}"
            )
        if isinstance(self.up_proj, Tensor):
            check_floating("ExpertWeights", up_proj=self.up_proj)
        if any(not isinstance(size, int) or size < 1 for size in self.ffn_sizes):
            raise ValueError(
                f"ExpertWeights: ffn_sizes: expected integers of at least 1, one for each expert, got {self.ffn_sizes}"
            )
        form = "(H, sum F)" if self.ffn_sizes else "(E, H, F)"
        if len(self.down_proj.shape) != (2 if self.ffn_sizes else 3):
            raise ValueError(
                f"ExpertWeights: down_proj: expected {form} with ffn_sizes={self.ffn_sizes}, got shape "
                f"{tuple(self.down_proj.shape)}"
            )
        if len(self.up_proj.shape) == 0:
            raise ValueError("ExpertWeights: up_proj: expected H as the last dimension, got shape ()")

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.ffn_sizes) or self.down_proj.shape[0]

    @property
    def hidden_size(self) -> int:
        """H."""
        return self.up_proj.shape[-1]

    @property
    def dtype(self) -> torch.dtype | None:
        """Of the tensors, which x has as well; None where all are codes."""
        return next((t.dtype for name in WEIGHTS if isinstance(t := getattr(self, name), Tensor)), None)

    @property
    def is_quantized(self) -> bool:
        """Whether any projection is codes."""
        return any(isinstance(getattr(self, name), QuantizedWeight) for name in PROJECTIONS)

    def deferred(self) -> ExpertWeights:
        """The same weights, whose gradients backward computes where it comes to this call: apart from those of x.

        Called between the two halves of an exchange, before what uses the weights, it puts their gradients under the
        exchange of backward. See :mod:`dmoe.ops.moe_mlp_deferred`. Weights that are codes are as they were.
        """
        if self.is_quantized:
            return self
        tensors, later = defer(*(getattr(self, name) for name in WEIGHTS))
        given: dict[str, Any] = dict(zip(WEIGHTS, tensors, strict=True))
        return self if later is None else replace(self, **given, later=later)

    def of_expert(self, expert: int) -> dict[str, Tensor]:
        """One expert's part of each weight that there is, by its field, in the fields' order: views, or decoded."""
        found = {}
        for name in WEIGHTS:
            tensor: Any = getattr(self, name)
            f_dim = F_DIM[name]
            if tensor is None:
                continue
            if isinstance(tensor, QuantizedWeight):
                found[name] = tensor[expert : expert + 1].dequantize()[0]
                continue
            if self.ffn_sizes and f_dim is not None:
                found[name] = tensor.narrow(f_dim, sum(self.ffn_sizes[:expert]), self.ffn_sizes[expert])
            else:
                found[name] = tensor[expert]
        return found

    def parts(self, count: int) -> list[ExpertWeights]:
        """As many groups of consecutive experts as ``count``, which divides E: views, but for experts of other widths.

        All at once, so that backward puts their gradients together in one copy. None of them is deferred.
        """
        each = self.num_experts // count
        sizes = [each] * count
        if self.ffn_sizes:
            by_part = [self.ffn_sizes[first : first + each] for first in range(0, self.num_experts, each)]
            sizes = [sum(widths) for widths in by_part]
        cut: list[dict[str, Any]] = [{} for _ in range(count)]
        for name, f_dim in F_DIM.items():
            tensor: Any = getattr(self, name)
            packed = bool(self.ffn_sizes) and f_dim is not None
            lengths = sizes if packed else [each] * count
            pieces: list[Any]
            if isinstance(tensor, QuantizedWeight):
                pieces = [tensor[first : first + each] for first in range(0, self.num_experts, each)]
            else:
                pieces = [None] * count if tensor is None else tensor.split(lengths, f_dim if packed and f_dim else 0)
            for part, piece in zip(cut, pieces, strict=True):
                part[name] = piece.contiguous() if packed and piece is not None else piece
        widths_of = by_part if self.ffn_sizes else [()] * count
        return [replace(self, **part, ffn_sizes=widths_of[n], later=None) for n, part in enumerate(cut)]
