"""``moe_inference``: a layer without gradients on the CPU in one operation: router, plan, experts and metrics.

It is :func:`router_logits`, :func:`router_top_k`, :func:`routing_plan` and :func:`moe_mlp` one after the other, without
what stands between them: twenty calls from Python, which cost as much as the experts of a dozen tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dmoe.ops._library import define, has_kernel
from dmoe.ops.moe_mlp import moe_mlp
from dmoe.ops.router_logits import router_logits_ref
from dmoe.ops.router_top_k import router_top_k_ref
from dmoe.ops.routing_plan import routing_plan

_NUMBER_OF_RULE = 7  # fields of TopKRule


def moe_inference_ref(
    x: Tensor,
    router_weight: Tensor,
    router_bias: Tensor | None,
    selection_bias: Tensor | None,
    router_dtype: torch.dtype,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operation's meaning: y ``(T, H)``, assignments of each expert ``(E,)`` int32, the mean entropy, a scalar.

    ``rest`` is a :class:`dmoe.ops.router_top_k.TopKRule` and what the experts take.
    """
    rule, experts = rest[:_NUMBER_OF_RULE], rest[_NUMBER_OF_RULE:]
    up_proj, down_proj, up_bias, down_bias, activation, gated, gate_weight_on, residual = experts
    logits = router_logits_ref(x, router_weight, router_bias, router_dtype, 0.0, None)
    scores, _, chosen, weights, _ = router_top_k_ref(logits, selection_bias, None, None, False, False, *rule)
    rows, slots, offsets, token_rows, counts, _, _ = routing_plan(chosen, router_weight.shape[0])
    per_token = chosen.shape[1]
    token_offsets = torch.arange(0, chosen.numel() + 1, per_token, dtype=torch.int32, device=x.device)
    plan = (offsets, rows, slots, token_offsets, token_rows)
    options = (None, None, activation, gated, gate_weight_on, 0.0, 0.0, residual)
    y = moe_mlp(x, weights, up_proj, down_proj, up_bias, down_bias, *plan, *options)
    tiny = torch.finfo(scores.dtype).tiny
    probs = scores if rule[1] == "softmax" else scores / (scores.sum(-1, keepdim=True) + tiny)
    return y, counts, torch.special.entr(probs).sum() / max(x.shape[0], 1)


_operation = define(
    "moe_inference(Tensor x, Tensor router_weight, Tensor? router_bias, Tensor? selection_bias, "
    "ScalarType router_dtype, int top_k, str score_function, int num_groups, int top_k_groups, str group_score, "
    "float normalization, float scale, Tensor up_proj, Tensor down_proj, Tensor? up_bias, Tensor? down_bias, "
    "str activation, bool gated, str gate_weight_on, Tensor? residual) "
    "-> (Tensor y, Tensor tokens_per_expert, Tensor entropy)",
    moe_inference_ref,
    fake=lambda x, router_weight, router_bias, selection_bias, router_dtype, *_: (
        x.new_empty(x.shape),
        x.new_empty(router_weight.shape[0], dtype=torch.int32),
        x.new_empty((), dtype=router_dtype),
    ),
)
serves_cpu = has_kernel("moe_inference", "CPU")


def moe_inference(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`moe_inference_ref`; no gradient comes back."""
    y, counts, entropy = _operation(*arguments)
    return y, counts, entropy
