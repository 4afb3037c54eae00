"""A capacity that the ranks of a group share: whose assignments come first is counted over all of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dmoe.ops.histogram import histogram
from dmoe.plan import plan_token_choice


def keep_within(
    chosen: Tensor, num_experts: int, capacity: int, ranks: Any, *, choice_major: bool
) -> tuple[Tensor, Tensor]:
    """The choices that are among an expert's first ``capacity`` of all ranks, ``(T, K)``; the others become E.

    Order is that of the ranks, and inside a rank of its tokens; with ``choice_major`` all ranks' first choices come
    before all their second ones. One all-gather of K x E counts; the host waits for nothing.

    Args:
        chosen: ``(T, K)`` integer in [0, E].
        num_experts: E.
        capacity: rows of an expert, over all ranks.
        ranks: :class:`dmoe.parallel.LoadOfRanks`; each brings equally many tokens.
        choice_major: see above.

    Returns:
        The choices, and how many of this rank's each expert had before.

    Raises:
        ValueError: on the CPU, on every rank: ranks with different numbers of tokens.
    """
    top_k = chosen.shape[1]
    plan = plan_token_choice(chosen, num_experts, drop_order="choice_major" if choice_major else "token_major")
    expert = chosen.long().clamp(max=num_experts - 1)
    position = plan.token_to_rows - plan.expert_offsets[expert]  # among this rank's
    level = torch.arange(top_k, device=chosen.device) if choice_major else torch.zeros_like(expert[0])
    levels = top_k if choice_major else 1
    ids = torch.where(chosen < num_experts, level * num_experts + chosen, levels * num_experts)
    counts = histogram(ids.reshape(-1), levels * num_experts + 1)[:-1].view(levels, num_experts)
    sent = torch.cat([counts.flatten(), torch.full_like(counts[0, :1], chosen.shape[0])])
    received, here = ranks.gather(sent)
    if chosen.device.type == "cpu" and (received[:, -1] != chosen.shape[0]).any():  # asking is free here
        raise ValueError(
            "MoE: capacity_over: 'group' expected equally many tokens on all ranks, which one capacity is counted "
            f"from, got {received[:, -1].tolist()}"
        )
    everyone = received[:, :-1].view(-1, levels, num_experts)
    earlier = everyone.sum(0).cumsum(0) - everyone.sum(0) - (counts.cumsum(0) - counts)  # other ranks' choices before
    before = earlier + everyone[:here].sum(0)
    kept = (plan.token_to_rows >= 0) & (position + before[level, expert] < capacity)
    return torch.where(kept, chosen, num_experts), plan.tokens_per_expert
