"""What :mod:`kernel_table` compiles: by name, calls of the operations' CUDA functions on ``meta`` tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch

from dmoe.ops.router_logits import router_logits_backward_cuda, router_logits_cuda
from dmoe.ops.router_top_k import TopKRule, router_top_k_backward_cuda, router_top_k_cuda
from dmoe.ops.tile_table import tile_table_cuda

CASES: dict[str, Callable[[], None]] = {}


def case(name: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Register a case."""

    def register(run: Callable[[], None]) -> Callable[[], None]:
        assert name not in CASES, name
        CASES[name] = run
        return run

    return register


@case("tile_table")
def _() -> None:
    tile_table_cuda(torch.empty(129, dtype=torch.int32, device="meta"), 65536, 128)
    tile_table_cuda(torch.empty(1501, dtype=torch.int32, device="meta"), 65536, 16)


def _route(
    num_experts: int, rule: TopKRule, *, biased: bool = False, replayed: bool = False, losses: bool = False
) -> None:
    """Both directions of the router's tail for 4096 tokens."""
    logits, (tokens, top_k) = torch.empty(4096, num_experts, device="meta"), (4096, rule.top_k)
    indices = torch.empty(tokens, top_k, dtype=torch.int64, device="meta")
    router_top_k_cuda(
        logits,
        torch.empty(num_experts, device="meta") if biased else None,
        torch.empty(tokens, dtype=torch.bool, device="meta") if biased else None,
        indices if replayed else None,
        losses,
        losses,
        *rule,
    )
    router_top_k_backward_cuda(
        logits if losses else None,
        logits[:, 0] if losses else None,
        torch.empty(tokens, top_k, device="meta"),
        logits,
        logits if rule.score_function == "sigmoid" and losses else None,
        indices,
        rule.score_function,
        rule.normalization,
        rule.scale,
    )


@case("router_top_k, softmax, 8 of 128")
def _() -> None:
    _route(128, TopKRule(8, normalization=1.0))


@case("router_top_k, sigmoid in groups, bias, mask, losses, 8 of 256")
def _() -> None:
    rule = TopKRule(8, "sigmoid", num_groups=8, top_k_groups=4, normalization=2.0, scale=2.5)
    _route(256, rule, biased=True, losses=True)


@case("router_top_k, replayed, any norm, 3 of 1000")
def _() -> None:
    _route(1000, TopKRule(3, normalization=1.5), replayed=True, losses=True)


@case("router_top_k, 22 of 4096")
def _() -> None:
    _route(4096, TopKRule(22))


@case("router_logits, float32 weight, 128 experts")
def _() -> None:
    x, weight = torch.empty(8192, 2048, dtype=torch.bfloat16, device="meta"), torch.empty(128, 2048, device="meta")
    router_logits_cuda(x, weight, None, torch.float32, 0.0, None)
    router_logits_backward_cuda(torch.empty(8192, 128, device="meta"), x, weight, 0.0, None)


@case("router_logits, bfloat16 weight and bias, 8 experts")
def _() -> None:
    x, weight = (torch.empty(n, 4096, dtype=torch.bfloat16, device="meta") for n in (8192, 8))
    router_logits_cuda(x, weight, weight[:, 0], torch.float32, 0.0, None)
    router_logits_backward_cuda(torch.empty(8192, 8, device="meta"), x, weight, 0.0, None)
