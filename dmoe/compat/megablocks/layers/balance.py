"""The load-balancing loss over all layers, and what they leave for it."""

from __future__ import annotations

import torch
from torch import Tensor

from dmoe.compat.megablocks.layers.arguments import Arguments
from dmoe.compat.megablocks.layers.router import _LOGITS, batched_router_zloss
from dmoe.compat.megablocks.layers.saved import Rounds, layers_per_stage

_LOADS = Rounds("load-balancing loss", "clear_load_balancing_loss")


def save_load_balancing_loss(loss: tuple[Tensor, Tensor]) -> None:
    """Add what a layer contributes, ``(tokens_per_expert (E,), expert_scores (T, E))``.

    Layers do this by themselves, in training. What is saved by hand stays until it is cleared.
    """
    _LOADS.save(loss)


def get_load_balancing_loss() -> list[tuple[Tensor, Tensor]]:
    """What the layers saved since the last clearing, in order: a new list of (tokens_per_expert, expert_scores)."""
    return _LOADS.values()


def clear_load_balancing_loss() -> None:
    """Forget what the layers saved, and the graphs it holds: call it after each step."""
    _LOADS.clear()


def batched_load_balancing_loss(args: Arguments) -> Tensor | float:
    """``weight * E / (num_layers * T * K) * sum_l sum_e n_le * mean_t p_lte`` (Switch; Fedus et al. 2021, eq. 4).

    ``n_le`` counts layer l's assignments to expert e before any drop, ``p_lte`` are its scores of token t. Under expert
    parallelism both are of this rank's own tokens, as there: data parallelism makes the mean of the ranks' gradients.

    A pipeline stage computes its share, a sum over its own layers; the shares of all stages, or of all chunks of a
    virtual pipeline, add up to the model's loss. Megatron asks for it behind each forward of a stage or a chunk, and
    clears. Where several forwards ran since the last clearing, as micro-batches of one step, it is the mean of their
    losses (:mod:`.saved`); MegaBlocks refuses these.

    Args:
        args: the model's; ``num_layers`` and the pipeline options say how many layers each forward must have left.

    Returns:
        A scalar in the scores' dtype, float32 with ``moe_lbl_in_fp32``: the weight under even routing, over all
        pipeline stages. 0.0 when the weight is 0; 0 without tokens.

    Raises:
        ValueError: another number of layers has run in training since the last clearing, or shapes disagree.
        RuntimeError: the layers ran under ``no_grad``, and this does not.
    """
    if args.moe_loss_weight == 0:
        return 0.0
    rounds, layers = _LOADS.rounds(), layers_per_stage(args)
    if not rounds or any(len(entries) != layers for entries in rounds):
        raise ValueError(
            f"batched_load_balancing_loss: expected {layers} layers (num_layers = {args.num_layers}, "
            f"pipeline_model_parallel_size = {args.pipeline_model_parallel_size}, "
            f"num_layers_per_virtual_pipeline_stage = {args.num_layers_per_virtual_pipeline_stage}), got "
            f"{' and '.join(str(len(entries)) for entries in rounds) or 0} since clear_load_balancing_loss(); layers "
            "in evaluation leave nothing"
        )
    _LOADS.check_recorded()
    losses = [_loss_of_round(args, entries) for entries in rounds]
    loss = losses[0] if len(losses) == 1 else torch.stack(losses).mean()
    return loss if args.moe_lbl_in_fp32 else loss.to(rounds[0][0][1].dtype)


def _loss_of_round(args: Arguments, entries: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The loss of one forward, in float32 or wider."""
    tokens, experts = entries[0][1].shape[0], args.moe_num_experts
    for counts, scores in entries:
        if tuple(counts.shape) != (experts,) or tuple(scores.shape) != (tokens, experts):
            raise ValueError(
                f"batched_load_balancing_loss: expected tokens_per_expert ({experts},) and expert_scores "
                f"({tokens}, {experts}) of every layer, got {tuple(counts.shape)} and {tuple(scores.shape)}"
            )
    wide = torch.promote_types(entries[0][1].dtype, torch.float32)  # half counts to 65504, and exactly to 2048
    total = torch.stack([torch.dot(counts.to(wide), scores.sum(0, dtype=wide)) for counts, scores in entries]).sum()
    return experts * args.moe_loss_weight / (args.num_layers * max(tokens, 1) ** 2 * args.moe_top_k) * total


def batched_load_balancing_and_z_loss(args: Arguments) -> tuple[Tensor | float, Tensor | float]:
    """The pair that ``batched_load_balancing_loss`` of Muennighoff's fork (OLMoE) returns.

    Returns:
        :func:`batched_load_balancing_loss`, and ``moe_zloss_weight * sum_lt logsumexp(logits_lt)**2 / (num_layers * T *
        K)``: that fork's scale, which divides by K as well; 0.0 when its weight is 0. Of several forwards, the mean.
    """
    balance = batched_load_balancing_loss(args)
    if args.moe_zloss_weight == 0:
        return balance, 0.0
    each = batched_router_zloss(args)
    assert isinstance(each, Tensor)
    return balance, each.sum() / (args.num_layers * args.moe_top_k * max(len(_LOGITS.rounds()), 1))
