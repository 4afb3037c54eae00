"""What routers settle before they choose: how experts are scored, chosen and weighed, and what logits have to be."""

from __future__ import annotations

from torch import Tensor

from dmoe.config import MoEConfig
from dmoe.ops.router_top_k import TopKRule


def check_logits(router_logits: Tensor, config: MoEConfig, expert_indices: Tensor | None = None) -> None:
    """Raise ValueError unless these are ``(T, E)`` logits, and indices to replay ``(T, K)`` integers."""
    if router_logits.dim() != 2 or router_logits.shape[1] != config.num_experts:
        raise ValueError(
            f"route: router_logits: expected shape (T, num_experts = {config.num_experts}), got "
            f"{tuple(router_logits.shape)}"
        )
    shape = (router_logits.shape[0], config.top_k)
    if expert_indices is not None and (expert_indices.shape != shape or expert_indices.is_floating_point()):
        raise ValueError(
            f"route: expert_indices: expected integers of shape {shape}, got {expert_indices.dtype} "
            f"{tuple(expert_indices.shape)}"
        )


def rule_of(config: MoEConfig) -> TopKRule:
    """The part of the configuration that scores, chooses and weighs."""
    # A softmax over the chosen logits alone is the softmax over all, renormalised over the chosen ones (as long as
    # these do not all underflow beside an expert that was not chosen, as a replayed routing may have it).
    over_chosen = 1.0 if config.softmax_order == "after_topk" else 0.0
    return TopKRule(
        top_k=config.top_k,
        score_function=config.score_function,
        num_groups=config.num_groups,
        top_k_groups=config.num_groups if config.top_k_groups is None else config.top_k_groups,
        group_score=config.group_score,
        normalization=float(config.gate_normalization or over_chosen),
        scale=config.gate_scale,
    )
