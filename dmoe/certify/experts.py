"""Checks of the experts' kernels: the whole expert MLP, and single grouped products."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dmoe.certify.compare import Run
from dmoe.certify.draw import Draw
from dmoe.ops import moe_mlp_cuda as kernels
from dmoe.ops import moe_mlp_torch as composed
from dmoe.ops._moe_mlp_call import PROJECTIONS, WEIGHTS, Call
from dmoe.ops._moe_mlp_parts import add_to_main_grads
from dmoe.ops.grouped_gemm import (
    grouped_gemm_cuda,
    grouped_gemm_ref,
    grouped_gemm_weight_cuda,
    grouped_gemm_weight_ref,
)
from dmoe.ops.grouped_gemm_sum import grouped_gemm_sum_cuda
from dmoe.ops.routing_plan import routing_plan_ref

EXPERTS = 6  # of a drawn problem, where the layer has as many
_GRADS = ("x", "gate_weights", *WEIGHTS)


def drawn_call(asked: Sequence[Any], draw: Draw, tile_rows: int) -> tuple[Call, int]:
    """A call like the one that asks, and how many rows are in use.

    Its first expert is empty and holds NaN, the second has more than two tiles, some choices are dropped, all of the
    first token's, which is NaN, and each expert's rows end in holes.
    """
    like: Any = Call(*asked)  # with descriptions for tensors
    num_experts = min(EXPERTS, like.expert_offsets.shape[0] - 1)
    by_choice = len(like.gate_weights["shape"]) == 2
    top_k: int = min(like.gate_weights["shape"][1] if by_choice else 2, num_experts)
    tokens = 3 * tile_rows + 5
    indices = draw.choices(tokens, num_experts, top_k, empty=0)
    plan = routing_plan_ref(indices, num_experts, 3, None, False, None, False, tile_rows)
    row_to_token, row_to_slot, offsets, token_rows, _, tiles, by_load = (
        torch.empty_like(tensor, device=draw.device) if draw.device.type == "meta" else tensor.to(draw.device)
        for tensor in plan
    )
    x, gates = draw.normal(like.x, tokens, scale=1.0), draw.uniform(tokens, top_k)
    weights: dict[str, Any] = {name: draw.normal(getattr(like, name), num_experts) for name in WEIGHTS}
    buffers: dict[str, Any] = {}
    for name, buffer in zip(PROJECTIONS, like.buffers, strict=True):
        if buffer is not None:
            room = draw.normal(buffer, num_experts)
            buffers[name.replace("_proj", "_main_grad")] = room
    if draw.device.type != "meta":
        x[0] = torch.nan
        for weight in weights.values():
            if weight is not None and num_experts > top_k:
                weight[0] = torch.nan
    call = like._replace(
        x=x,
        gate_weights=gates if by_choice else gates.flatten(),
        **weights,
        expert_offsets=offsets,
        row_to_token=row_to_token,
        row_to_slot=row_to_slot,
        token_offsets=torch.arange(0, tokens * top_k + 1, top_k, dtype=torch.int32, device=draw.device),
        token_rows=token_rows,
        seed=None if like.seed is None else torch.tensor(7, device=draw.device),
        residual=draw.normal(like.residual, tokens, scale=1.0),
        tiles=tiles,
        experts_by_load=by_load,
        tile_rows=tile_rows,
        **buffers,
    )
    return call, int(plan[2][-1])


def _reversed_tiles(call: Call) -> Call:
    """The same work in the other order, which no result depends on."""
    tiles = call.tiles
    assert tiles is not None
    if tiles.is_meta:
        return call
    used = int((tiles[:, 0] >= 0).sum())
    return call._replace(tiles=torch.cat([tiles[:used].flip(0), tiles[used:]]))


def forward(asked: Sequence[Any], draw: Draw, tile_rows: int, precision: str = "ieee") -> Iterator[Run]:
    """Training, inference and the pre-activation alone."""
    call, used = drawn_call(asked, draw, tile_rows)

    def training(y: Tensor, pre: Tensor) -> dict[str, Tensor]:
        return {"y": y, "pre_activation": pre[:used]}

    yield Run(
        "training",
        lambda *a: training(*kernels.moe_mlp_cuda(*a)),
        lambda *a: training(*composed.moe_mlp_torch(*a)),
        call,
    )
    yield Run(
        "training, its tiles in reverse",  # a tile that writes beyond its rows is not always written over
        lambda *a: training(*kernels.moe_mlp_cuda(*a)),
        lambda *a: training(*composed.moe_mlp_torch(*a)),
        _reversed_tiles(call),
    )
    yield Run(
        "inference",
        lambda *a: {"y": kernels.moe_mlp_inference_cuda(*a)},
        lambda *a: {"y": composed.moe_mlp_torch(*a)[0]},
        call,
    )
    yield Run(
        "pre-activation",
        lambda *a: {"pre_activation": kernels.moe_mlp_pre_activation_cuda(*a)[:used]},
        lambda *a: {"pre_activation": composed.pre_activation_torch(*a)[:used]},
        call,
    )


def backward(asked: Sequence[Any], draw: Draw, tile_rows: int, precision: str = "ieee") -> Iterator[Run]:
    """The whole backward, with frozen weights, and in two halves."""
    call, used = drawn_call(asked, draw, tile_rows)
    grad_y = torch.empty_like(call.x)
    if draw.device.type == "meta":
        pre = call.x.new_empty(call.row_to_token.shape[0], call.pre_width)
    else:
        grad_y.copy_(torch.randn(call.x.shape, generator=draw.generator))
        pre = composed.pre_activation_torch(*call)
        pre[used:] = torch.nan

    def named(names: Sequence[str], grads: Sequence[Tensor]) -> dict[str, Tensor]:
        return {f"gradient of {n}": g for n, g in zip(names, grads, strict=True) if g.numel()}

    def whole(function: Any, of_weights: bool) -> Any:
        def run(grad: Tensor, pre: Tensor, *arguments: Any) -> dict[str, Tensor]:
            own = Call(*arguments)
            own = own.with_buffers([None if buffer is None else buffer.clone() for buffer in own.buffers])
            found = named(_GRADS, function(grad, pre, of_weights, *own))
            return {
                **found,
                **{f"main_grad {n}": b for n, b in zip(PROJECTIONS, own.buffers, strict=True) if b is not None},
            }

        return run

    def into_buffers(grad: Tensor, pre: Tensor, of_weights: bool, *arguments: Any) -> tuple[Tensor, ...]:
        own = Call(*arguments)
        grads = composed.backward_torch(grad, pre, of_weights, *own.with_buffers((None, None)))
        return add_to_main_grads(own, grads)

    arguments = (grad_y, pre, *call)
    whole_backward = whole(kernels.moe_mlp_backward_cuda, True), whole(into_buffers, True)
    yield Run("backward", *whole_backward, arguments)
    yield Run("backward, its tiles in reverse", *whole_backward, (grad_y, pre, *_reversed_tiles(call)))
    if all(buffer is None for buffer in call.buffers):
        frozen = whole(kernels.moe_mlp_backward_cuda, False), whole(into_buffers, False)
        yield Run("backward of frozen experts", *frozen, arguments)

    def halves(data: Any, of_weights: Any) -> Any:
        def run(grad: Tensor, pre: Tensor, *arguments: Any) -> dict[str, Tensor]:
            own = Call(*arguments).with_buffers((None, None))
            *first, grad_pre, hidden = data(grad, pre, *own)
            return named(_GRADS, (*first, *of_weights(grad, grad_pre, hidden, *own)))

        return run

    yield Run(
        "backward in halves",
        halves(kernels.moe_mlp_backward_data_cuda, kernels.moe_mlp_backward_weights_cuda),
        halves(composed.backward_data_torch, composed.backward_weights_torch),
        arguments,
    )


def counted(offsets: Tensor, device: torch.device) -> tuple[int, int, Tensor]:
    """Experts, rows and offsets of a drawn product: an empty expert, a tail of nobody's rows."""
    experts = min(4, offsets.shape[0] - 1)
    counts = [150, 0, 1, 70][:experts]
    return experts, sum(counts) + 9, torch.tensor([0, *counts]).cumsum(0).int().to(device)


def product(asked: Sequence[Any], draw: Draw, *extra: Any) -> Iterator[Run]:
    """``grouped_gemm``."""
    a, b, offsets, trans_b = asked
    experts, rows, ends = counted(offsets, draw.device)
    yield Run(
        "product",
        lambda *arguments: {"rows": grouped_gemm_cuda(*arguments)},
        lambda *arguments: {"rows": grouped_gemm_ref(*arguments)},
        (draw.normal(a, rows, scale=1.0), draw.normal(b, experts), ends, trans_b),
    )


def product_sum(asked: Sequence[Any], draw: Draw, *extra: Any) -> Iterator[Run]:
    """``grouped_gemm_sum``."""
    a, b, a2, b2, offsets, trans_b = asked
    experts, rows, ends = counted(offsets, draw.device)

    def apart(a: Tensor, b: Tensor, a2: Tensor, b2: Tensor, *rest: Any) -> dict[str, Tensor]:
        return {"rows": grouped_gemm_ref(a, b, *rest) + grouped_gemm_ref(a2, b2, *rest)}

    drawn = [
        part
        for left, right in ((a, b), (a2, b2))
        for part in (draw.normal(left, rows, scale=1.0), draw.normal(right, experts))
    ]
    yield Run(
        "a product and a thin one",
        lambda *arguments: {"rows": grouped_gemm_sum_cuda(*arguments)},
        apart,
        (*drawn, ends, trans_b),
    )


def sums(asked: Sequence[Any], draw: Draw, *extra: Any) -> Iterator[Run]:
    """``grouped_gemm_weight``."""
    a, b, offsets, _ = asked
    experts, rows, ends = counted(offsets, draw.device)
    left, right = (draw.normal(each, rows, scale=1.0) for each in (a, b))
    yield Run(
        "sums",
        lambda *arguments: {"sums": grouped_gemm_weight_cuda(*arguments)},
        lambda *arguments: {"sums": grouped_gemm_weight_ref(*arguments)},
        (left, right, ends, experts),
    )
