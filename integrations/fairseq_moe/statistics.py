"""What the branch logs of a gate, as tensors that nobody has to wait for.

=============================  ==================================================================================
name                           meaning (mean over MoE layers, then over ranks and micro-batches)
=============================  ==================================================================================
``overflow_expertK``           percent of the K-th choices that the capacity dropped; 0 when dropless
``entropy_gating``             mean entropy of the gate's probabilities, nats
``expertK_balance_top``        percent of tokens whose K-th choice is one of the most used max(ceil(0.2 E), 1) experts
``expertK_balance_bottom``     the same of the least used
``unused_expertK_count``       experts that are nobody's K-th choice
``all_to_all_cpu_time_ms``     host time in exchanges, ``all_to_all_cuda_time_ms`` device time; 0 unless recorded
=============================  ==================================================================================

With one expert per token the names of the second one are 0. On the branch so is ``overflow_expert1`` then, which here
is measured.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dmoe.ops.histogram import histogram

# In the order in which gate_statistics returns them.
OF_CHOICES = (
    "overflow_expert1",
    "expert1_balance_top",
    "expert1_balance_bottom",
    "overflow_expert2",
    "expert2_balance_top",
    "expert2_balance_bottom",
    "unused_expert1_count",
    "unused_expert2_count",
)
NAMES = (
    "overflow_expert1",
    "overflow_expert2",
    "entropy_gating",
    "expert1_balance_top",
    "expert1_balance_bottom",
    "unused_expert1_count",
    "expert2_balance_top",
    "expert2_balance_bottom",
    "unused_expert2_count",
    "all_to_all_cpu_time_ms",
    "all_to_all_cuda_time_ms",
)
_SAMPLE_FRACTION = 0.2


@torch.no_grad()
def gate_statistics(chosen: Tensor, routed: Tensor, token_to_rows: Tensor, num_experts: int) -> Tensor:
    """The figures of :data:`OF_CHOICES`, ``(8,)`` float32, zeros for a second choice that is none.

    Args:
        chosen: ``(T, K)`` int64, the choices before padding and luck took some away.
        routed: ``(T, K)``, E where one was taken away.
        token_to_rows: ``(T, K)`` of the plan, -1 where there is no row.
        num_experts: E.
    """
    num_tokens, top_k = chosen.shape
    asked = routed != num_experts
    dropped = asked & (token_to_rows < 0)
    overflow = 100.0 * dropped.sum(0) / asked.sum(0).clamp(min=1)
    sample = max(math.ceil(_SAMPLE_FRACTION * num_experts), 1)
    figures, unused = [], []
    for k in range(top_k):
        counts = histogram(chosen[:, k].contiguous(), num_experts)
        shares = counts.float().sort(descending=True).values * (100.0 / max(num_tokens, 1))
        figures += [overflow[k], shares[:sample].sum(), shares[-sample:].sum()]
        unused.append((counts == 0).sum())
    none = overflow.new_zeros(())
    figures += [none] * (6 - len(figures)) + unused + [none] * (2 - len(unused))
    return torch.stack([figure.to(torch.float32) for figure in figures])
