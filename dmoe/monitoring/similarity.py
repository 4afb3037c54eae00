"""How alike a layer's experts are: one number for all pairs, without forming a pair."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def expert_similarity(experts: Any) -> Tensor | None:
    """Mean cosine between the weights of two different experts, of those that this rank holds.

    With ``u_e = w_e / |w_e|``, where ``w_e`` is all of an expert's projections as one vector (without biases), the mean
    over the pairs ``e != f`` of ``u_e . u_f`` is ``(|sum_e u_e|^2 - E) / (E (E - 1))``: 1 for copies, near 0 for
    experts drawn apart. It reads the weights twice, and needs room for two experts in float32 (float64 for float64).

    With expert parallelism, or FSDP, the pairs are those of the experts (or of their slices) on this rank.

    Args:
        experts: a layer's ``experts``.

    Returns:
        Scalar float64; None for fewer than two experts, of different widths, as codes, or of another kind of module.
    """
    if not hasattr(experts, "weights"):
        return None
    weights = experts.weights()
    stacks = [weights.up_proj, weights.down_proj]
    if weights.ffn_sizes or not all(isinstance(each, Tensor) for each in stacks):
        return None
    count = len(stacks[0])
    if count < 2 or any(each.numel() == 0 for each in stacks):
        return None
    wide = torch.promote_types(stacks[0].dtype, torch.float32)
    squares = [torch.linalg.vector_norm(each.flatten(1), dim=1, dtype=wide).square() for each in stacks]
    inverse = (squares[0] + squares[1]).rsqrt()
    length = inverse.new_zeros((), dtype=torch.float64)
    for stack in stacks:
        total = stack.new_zeros(stack.shape[1:], dtype=wide)
        for expert in range(count):
            total.add_(stack[expert] * inverse[expert])
        length = length + torch.linalg.vector_norm(total).double().square()
    return (length - count) / (count * (count - 1))
