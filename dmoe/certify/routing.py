"""Checks of the router's kernels, of the tile table, and of operations on block structures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dmoe.certify.compare import Run
from dmoe.certify.draw import Draw
from dmoe.ops import _library
from dmoe.ops._trust import guards
from dmoe.ops.router_logits import (
    router_logits_backward_cuda,
    router_logits_backward_ref,
    router_logits_cuda,
    router_logits_ref,
)
from dmoe.ops.router_top_k import (
    router_top_k_backward_cuda,
    router_top_k_backward_ref,
    router_top_k_cuda,
    router_top_k_ref,
)
from dmoe.ops.routing_plan import routing_plan_ref
from dmoe.ops.tile_table import tile_table_cuda, tile_table_ref

TOKENS = 261  # two tiles and a tail of any launch shape


def logits(asked: Sequence[Any], draw: Draw) -> Iterator[Run]:
    """Router logits of float32 from bfloat16 tokens."""
    x, weight, bias, dtype, jitter, _ = asked
    arguments = (
        draw.normal(x, TOKENS, scale=1.0),
        draw.normal(weight),
        draw.normal(bias),
        dtype,
        jitter,
        None,
    )

    def exact(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, *rest: Any) -> dict[str, Tensor]:
        wide = torch.float64 if x.dtype == torch.float64 else dtype
        return {"logits": router_logits_ref(x, weight, bias, wide, *rest)}

    yield Run("router_logits", lambda *a: {"logits": router_logits_cuda(*a)}, exact, arguments)


def logits_backward(asked: Sequence[Any], draw: Draw) -> Iterator[Run]:
    """Its gradients."""
    grad, x, weight, jitter, _ = asked
    arguments = (
        draw.normal(grad, TOKENS, scale=1.0),
        draw.normal(x, TOKENS, scale=1.0),
        draw.normal(weight),
        jitter,
        None,
    )

    def named(function: Any) -> Any:
        return lambda *a: dict(zip(("gradient of x", "gradient of weight"), function(*a), strict=True))

    yield Run(
        "router_logits_backward",
        named(router_logits_backward_cuda),
        named(router_logits_backward_ref),
        arguments,
    )


def choice(asked: Sequence[Any], draw: Draw) -> Iterator[Run]:
    """Scores, choices and gate weights: on a coarse grid with many ties, so that no rounding decides a choice."""
    like, selection_bias, token_mask, given, with_log_z, count_first, *rule = asked
    experts, top_k = like["shape"][1], rule[0]
    grid = torch.randint(-24, 24, (TOKENS, experts), generator=draw.generator) / 8
    values = grid.to(like["dtype"]).to(draw.device)
    steps = torch.randint(-4, 5, (experts,), generator=draw.generator)
    bias = None if selection_bias is None else (steps * 4.0).to(draw.device)  # further apart than any two scores
    mask = None if token_mask is None else (torch.rand(TOKENS, generator=draw.generator) < 0.8).to(draw.device)
    replayed = None
    if given is not None:
        replayed = draw.choices(TOKENS, experts, top_k).to(given.dtype).to(draw.device)

    def named(function: Any) -> Any:
        def run(*arguments: Any) -> dict[str, Tensor]:
            names = ("scores", "log_z", "expert_indices", "gate_weights", "first_choices_per_expert")
            return {n: result for n, result in zip(names, function(*arguments), strict=True) if result.numel()}

        return run

    arguments = (values, bias, mask, replayed, with_log_z, count_first, *rule)
    yield Run("router_top_k", named(router_top_k_cuda), named(router_top_k_ref), arguments)


def choice_backward(asked: Sequence[Any], draw: Draw) -> Iterator[Run]:
    """The gradient of the logits."""
    grads, scores, logits, indices, *rule = asked[:3], asked[3], asked[4], asked[5], *asked[6:]
    experts, top_k = scores["shape"][1], indices.shape[1]
    values = draw.normal(scores, TOKENS, scale=1.0)
    made = values.softmax(1) if rule[0] == "softmax" else values.sigmoid()
    chosen = draw.choices(TOKENS, experts, top_k).to(indices.dtype).to(draw.device)
    drawn = [None if grad is None else draw.normal(grad, TOKENS, scale=1.0) for grad in grads]
    arguments = (*drawn, made, None if logits is None else values, chosen, *rule)
    yield Run(
        "router_top_k_backward",
        lambda *a: {"gradient of logits": router_top_k_backward_cuda(*a)},
        lambda *a: {"gradient of logits": router_top_k_backward_ref(*a)},
        arguments,
    )


def tiles(asked: Sequence[Any], draw: Draw) -> Iterator[Run]:
    """The tile table: empty experts, equal ones, one that takes most."""
    _, _, tile_rows = asked
    counts = torch.tensor([0, 5, 1000, 0, 5, 129, 128, 1, *([3] * 1500)])
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int().to(draw.device)

    def named(function: Any) -> Any:
        return lambda *a: dict(zip(("tiles", "experts_by_load"), function(*a), strict=True))

    arguments = (offsets, int(counts.sum()) + 7, tile_rows)
    yield Run("tile_table", named(tile_table_cuda), named(tile_table_ref), arguments)


def again(asked: Sequence[Any], draw: Draw, *_: Any) -> Iterator[Run]:
    """Any operation on the very integers of the call that asks, with numbers of its own: structures come from users."""
    name, *given = asked
    arguments = tuple(
        draw.normal(value) if isinstance(value, dict) else value.to(draw.device) if isinstance(value, Tensor) else value
        for value in given
    )

    def named(function: Any) -> Any:
        def run(*arguments: Any) -> dict[str, Tensor]:
            found = function(*arguments)
            results = (found,) if isinstance(found, Tensor) else tuple(found)
            return {f"result {i}": result for i, result in enumerate(results) if result is not None and result.numel()}

        return run

    yield Run(name, named(guards[name].kernel), named(guards[name].composition), arguments)


def compiled(asked: Sequence[Any], draw: Draw) -> Iterator[Run]:
    """The operations of csrc/ for this device, beside their plain-PyTorch meaning: integers exactly."""
    for name, arguments in _compiled_calls(draw):
        if name in _library.probation:
            operation = getattr(torch.ops.dmoe, name)
            yield Run(name, _numbered(operation), _numbered(_library.probation[name]), arguments)


def _numbered(function: Any) -> Any:
    def run(*arguments: Any) -> dict[str, Tensor]:
        found = function(*arguments)
        return {f"result {i}": r for i, r in enumerate((found,) if isinstance(found, Tensor) else found)}

    return run


def _compiled_calls(draw: Draw) -> Iterator[tuple[str, tuple[Any, ...]]]:
    device = draw.device

    def integers(high: int, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.randint(0, high, shape, generator=draw.generator).to(dtype).to(device)

    for length in (0, 1, 4097, 70_001):
        yield "sort", (integers(500, length), 9)
        yield "histogram", (integers(500, length), 500)
        yield "inclusive_cumsum", (integers(5, length), 0)
        yield "exclusive_cumsum", (integers(5, length), 0)
    yield "exclusive_cumsum", (integers(5, 37, 129), 1)
    for experts, k in ((5, 3), (33, 8), (512, 16)):
        yield "topk_indices", (torch.randint(-9, 9, (67, experts), generator=draw.generator).float().to(device), k)
    offsets = torch.tensor([0, 256, 256, 384], device=device, dtype=torch.int32)
    yield "topology", (offsets, 128, 3, 5)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        bins = torch.tensor([0, 3, 3, 40], device=device, dtype=torch.int32)
        values = torch.randn(3, 4, generator=draw.generator).to(dtype).to(device)
        yield "replicate", (values, bins, 45)
        spread = torch.randn(3, 45, generator=draw.generator).to(dtype).to(device)
        yield "replicate_backward", (spread, bins)
    for experts, k in ((3, 2), (127, 8), (512, 4)):
        chosen = draw.choices(700, experts, k, empty=0).to(device)
        for block, capacity, choice_major, binned in (
            (1, None, False, False),
            (16, None, True, False),
            (1, 3, True, True),
        ):
            yield "routing_plan", (chosen, experts, block, capacity, choice_major, None, binned, 0 if binned else 32)
    chosen = draw.choices(301, 6, 2, empty=0)
    plan = routing_plan_ref(chosen, 6, 4, None, False, None, False, 0)
    to_token, to_slot, ends, token_rows = (tensor.to(device) for tensor in plan[:4])
    token_offsets = torch.arange(0, 603, 2, dtype=torch.int32, device=device)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for width in (1, 33, 264):
            x = torch.randn(301, width, generator=draw.generator).to(dtype).to(device)
            rows = torch.randn(to_token.shape[0], width, generator=draw.generator).to(dtype).to(device)
            gates = torch.rand(602, generator=draw.generator).to(device)
            yield "permute", (x, to_token, token_offsets, token_rows)
            yield "unpermute", (rows, gates, to_token, to_slot, token_offsets, token_rows)
            yield "unpermute_backward", (x, rows, gates, to_token, to_slot, token_offsets, token_rows)
        a, b = (torch.randn(*size, generator=draw.generator).to(dtype).to(device) for size in ((95, 33), (6, 17, 33)))
        yield "grouped_gemm_portable", (a, b, ends.clamp(max=90), True)
        c = torch.randn(95, 17, generator=draw.generator).to(dtype).to(device)
        yield "grouped_gemm_weight_portable", (a, c, ends.clamp(max=90), 6)
