"""What is certified, by name, and how one subject is: :func:`certify`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from dmoe.certify import experts, far, routing
from dmoe.certify.compare import Run, judge
from dmoe.certify.draw import Draw

# Each draws a problem like the arguments of the call that asks, and what else was told beside them.
PARTS: dict[str, Callable[..., Iterator[Run]]] = {
    "moe_mlp": experts.forward,
    "moe_mlp_backward": experts.backward,
    "grouped_gemm": experts.product,
    "grouped_gemm_sum": experts.product_sum,
    "grouped_gemm_weight": experts.sums,
    "router_logits": routing.logits,
    "router_logits_backward": routing.logits_backward,
    "router_top_k": routing.choice,
    "router_top_k_backward": routing.choice_backward,
    "tile_table": routing.tiles,
    "again": routing.again,
    "compiled": routing.compiled,
}


def certify(part: str, arguments: Sequence[Any], extra: Sequence[Any], device: torch.device, *, draws: int = 1) -> str:
    """Why a subject is refused, ``""`` if it is trusted.

    Args:
        part: one of :data:`PARTS`.
        arguments: of the call: floating-point tensors as descriptions (:mod:`dmoe.certify.draw`), others as they are.
        extra: of the subject; what the part's drawing takes beside the arguments.
        device: where to run.
        draws: problems, each with its own numbers.
    """
    torch.backends.cuda.matmul.fp32_precision = extra[1] if len(extra) == 2 else "ieee"
    for seed in range(draws):
        for run in PARTS[part](arguments, Draw(device, seed), *extra):
            reason = judge(run)
            if reason:
                return reason
    if part in ("moe_mlp", "moe_mlp_backward"):
        return far.same_bits_far_away(part, arguments, device, *extra)
    return ""
