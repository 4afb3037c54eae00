"""Experts in fp8, as the fine-grained quantiser of Transformers keeps them: decoded as they are needed.

Blocks of 128 by 128, which are DeepSeek's, are decoded inside the products (:class:`dmoe.QuantizedWeight`); of others
experts that somebody chose are dequantised, a few at a time.

Numbers are those of the weights, ``w * scale`` in each block, and of activations as they are: Transformers' own kernels
round activations to fp8 as well.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import dmoe
from dmoe.integrations.transformers.composed import again_in_backward
from dmoe.integrations.transformers.experts import Projections, dmoe_experts, names_of, run_experts
from dmoe.integrations.transformers.gates import gate_of
from dmoe.integrations.transformers.lora import has_own_adapters
from dmoe.integrations.transformers.versions import layout_of

_BLOCK = (128, 128)
_AT_ONCE = 2**28  # bytes of weights that are dequantised at a time


def dmoe_fp8_experts(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """:func:`dmoe.integrations.transformers.experts.dmoe_experts` for weights in fp8, which get no gradient.

    Weights in other blocks than 128 by 128 are dequantised to x's dtype, a few experts at a time, and again in
    backward.

    Raises:
        TypeError: weights that are packed in four bits.
        ValueError: adapters of ``dmoe.lora`` beside weights in other blocks.
    """
    layout, gate = layout_of(self), gate_of(self)
    names = names_of(layout)
    weights = [(getattr(self, name), getattr(self, f"{name}_scale_inv")) for name in names]
    for name, (weight, _) in zip(names, weights, strict=True):
        if weight.element_size() == 1 and not weight.is_floating_point():
            raise TypeError(
                f"dmoe: {type(self).__name__}.{name}: expected weights in fp8, got {weight.dtype}, as fp4 is packed; "
                'load the model with dequantize=True, or choose experts_implementation="eager"'
            )
    if weights[0][0].element_size() > 1:  # dequantised when they were loaded
        return dmoe_experts(self, hidden_states, top_k_index, top_k_weights)
    codes = codes_of(self) if gate is not None and not layout.post_norm else None
    if codes is not None:
        return run_experts(self, layout, gate, codes, hidden_states, top_k_index, top_k_weights)
    if has_own_adapters(self):
        raise ValueError(
            f"dmoe: {type(self).__name__}: expected fp8 weights in blocks of 128 by 128 beside adapters of dmoe.lora, "
            f"got {self.block_size}"
        )

    def part_of(experts: Tensor, x: Tensor, index: Tensor, gate_weights: Tensor) -> Tensor:
        read = (dequantised(weight[experts], scale[experts], self.block_size, x.dtype) for weight, scale in weights)
        return run_experts(self, layout, gate, Projections(*read), x, index, gate_weights)

    num_experts = weights[0][0].shape[0]
    each = sum(weight[0].numel() for weight, _ in weights) * hidden_states.element_size()
    y = torch.zeros_like(hidden_states, dtype=torch.float32)
    for experts in _chosen(top_k_index, num_experts).split(max(1, _AT_ONCE // max(each, 1))):
        place = torch.full((num_experts + 1,), experts.numel(), device=experts.device)
        place[experts] = torch.arange(experts.numel(), device=experts.device)
        given = experts, hidden_states, place[top_k_index], top_k_weights
        y = y + again_in_backward(part_of, *given)
    return y.to(hidden_states.dtype)


def codes_of(experts: Any) -> Projections | None:
    """The weights as codes that products decode; None where they are in other blocks than 128 by 128."""
    layout = layout_of(experts)
    found: list[Any] = []
    for name in names_of(layout):
        weight, scale = getattr(experts, name), getattr(experts, f"{name}_scale_inv", None)
        if scale is None or weight.dtype != torch.float8_e4m3fn or tuple(experts.block_size or ()) != _BLOCK:
            return None
        count, rows, columns = weight.shape
        if tuple(scale.shape) != (count, math.ceil(rows / _BLOCK[0]), math.ceil(columns / _BLOCK[1])):
            return None
        halves = layout.gated and name != "down_proj"
        shape = (count, 2, rows // 2, columns) if halves else (count, rows, columns)
        found.append(dmoe.QuantizedWeight(weight.detach(), scale.detach().float(), "fp8", shape, _BLOCK))
    return Projections(*found)


def _chosen(top_k_index: Tensor, num_experts: int) -> Tensor:
    """Experts that have a token, ascending; all of them for a compiler, which may not look; never none."""
    if torch.compiler.is_compiling() or top_k_index.is_meta:
        return torch.arange(num_experts, device=top_k_index.device)
    found = top_k_index.unique()
    found = found[found < num_experts]
    return found if found.numel() else found.new_zeros(1)


def dequantised(weight: Tensor, scale: Tensor, block_size: Any, dtype: torch.dtype) -> Tensor:
    """``w * scale`` of its block, in ``dtype``.

    Args:
        weight: ``(E, rows, columns)`` in fp8.
        scale: ``(E, blocks, blocks)``, one number for each block, or for all rows or columns where there is one block.
        block_size: rows and columns of a block; None where the blocks are what the scales' shape says.
        dtype: of the result.
    """
    scale = scale.to(torch.float32)
    for dim in (-2, -1):
        size, blocks = weight.shape[dim], scale.shape[dim]
        each = math.ceil(size / blocks)
        if block_size is not None and math.ceil(size / block_size[dim]) == blocks:
            each = block_size[dim]
        scale = scale.repeat_interleave(each, dim=dim).narrow(dim, 0, size)
    return (weight.to(torch.float32) * scale).to(dtype)
