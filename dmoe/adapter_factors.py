"""Adapters as the operation takes them: factors for every expert, or for every expert and adapter."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dmoe.adapters import Adapters, LowRank
from dmoe.expert_weights import ExpertWeights
from dmoe.ops._moe_mlp_parts import stack_widths
from dmoe.ops.activation import accumulate_dtype
from dmoe.ops.projection import Factors
from dmoe.strides import in_memory_order

Pair = tuple[Tensor, Tensor, float, float]  # a (E, r, in), b (E, out, r), scale, dropout


def factors_of(adapters: Adapters, weights: ExpertWeights, interleaved: bool) -> tuple[Factors | None, Factors | None]:
    """Of both projections, for every expert.

    ``interleaved``: products with the up projection have their columns by turns, of gate and of up.
    """
    up, down = _pairs(adapters, weights, interleaved)
    return None if up is None else Factors(*up), None if down is None else Factors(*down)


def factors_of_several(
    adapters: Sequence[Adapters], weights: ExpertWeights, interleaved: bool
) -> tuple[Factors | None, Factors | None]:
    """The same for every expert and adapter, expert by expert, and behind an expert's adapters zeros for none.

    Ranks are padded to the largest. Scales that differ are multiplied into ``a``, which is rounded once more by that.
    """

    pairs = [_pairs(each, weights, interleaved) for each in adapters]
    return _joined([up for up, _ in pairs]), _joined([down for _, down in pairs])


def _joined(pairs: Sequence[Pair | None]) -> Factors | None:
    there = [pair for pair in pairs if pair is not None]
    if not there:
        return None
    (a_like, b_like, _, dropout), rank = there[0], max(pair[0].shape[1] for pair in there)
    scales = {pair[2] for pair in there}
    common = scales.pop() if len(scales) == 1 else None
    each_a, each_b = [], []
    for pair in (*pairs, None):
        if pair is None:
            each_a.append(a_like.new_zeros(1, 1, 1).expand(a_like.shape[0], rank, a_like.shape[2]))
            each_b.append(b_like.new_zeros(1, 1, 1).expand(b_like.shape[0], b_like.shape[1], rank))
            continue
        a, b, scale, _ = pair
        a = a if common is not None else (a.to(accumulate_dtype(a.dtype)) * scale).to(a.dtype)
        each_a.append(F.pad(a, (0, 0, 0, rank - a.shape[1])))
        each_b.append(F.pad(b, (0, rank - b.shape[2])))
    a, b = (torch.stack(each, 1).flatten(0, 1) for each in (each_a, each_b))
    return Factors(a, b, 1.0 if common is None else common, dropout)


def _pairs(adapters: Adapters, weights: ExpertWeights, interleaved: bool) -> tuple[Pair | None, Pair | None]:
    """Of up and down, for every expert, results in the order in which products with the weights have them."""
    up, down = adapters.up, adapters.down
    return (
        None if up is None else _pair(up, up.a, _up_columns(up.b, weights, interleaved), weights),
        None if down is None else _pair(down, _of_widths(down.a, weights, -1), down.b, weights),
    )


def _pair(low: LowRank, a: Tensor, b: Tensor, weights: ExpertWeights) -> Pair:
    a, b = (factor.expand(weights.num_experts, -1, -1) for factor in (a, b))
    return a, b, float(low.scale), float(low.dropout)


def _of_widths(factor: Tensor, weights: ExpertWeights, dim: int) -> Tensor:
    """Experts of different widths stacked, as products take them."""
    return stack_widths(factor, weights.ffn_sizes, dim) if weights.ffn_sizes else factor


def _up_columns(b: Tensor, weights: ExpertWeights, interleaved: bool) -> Tensor:
    return in_memory_order(b) if interleaved else _of_widths(b, weights, -2).flatten(1, -2)
