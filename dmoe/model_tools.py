"""What walks over a user's model: the sum of its auxiliary losses, and which parameters are experts'."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dmoe.layer import MoE


def moe_layers(model: nn.Module) -> dict[str, MoE]:
    """Every MoE layer of a model by its qualified name, each once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MoE)}


def aux_loss(model: nn.Module) -> Tensor:
    """Sum of the auxiliary losses of all MoE layers since their last forward; add it to the task's loss.

    Each layer's loss already carries its coefficients and is divided by ``num_moe_layers``. Reading clears it, so call
    this once for each training forward, gradient accumulation included, and scale the sum like the task's loss
    (``(task_loss + aux_loss(model)) / accumulation_steps``, ``scaler.scale(...)``).

    Args:
        model: any module; layers inside wrappers (DDP, FSDP, ``torch.compile``) are found.

    Returns:
        Scalar float32 (float64 for a float64 model) with a graph; 0 in evaluation, when nothing was recorded, or with
        ``aux_loss="attached"``.

    Raises:
        RuntimeError: a layer's loss has no graph, as under reentrant activation checkpointing.
    """
    losses = [loss for layer in moe_layers(model).values() if (loss := layer.take_aux_loss()) is not None]
    if losses:
        home = losses[0].device
        return torch.stack([loss.to(home) for loss in losses]).sum()
    parameter = next(model.parameters(), None)
    return torch.zeros((), device=None if parameter is None else parameter.device)


def set_aux_loss_scale(model: nn.Module, scale: float | Tensor) -> None:
    """Tell layers with ``aux_loss="attached"`` what the task's loss is multiplied by before backward.

    Needed where that is not 1: a grad scaler's factor, or ``1 / accumulation_steps``. Kept on the layers, so that two
    models in one process do not share it.

    Args:
        model: any module.
        scale: number or scalar tensor; a tensor is copied without a synchronisation.
    """
    for layer in moe_layers(model).values():
        if isinstance(scale, Tensor):
            layer.aux_loss_scale.copy_(scale, non_blocking=True)
        else:
            layer.aux_loss_scale.fill_(scale)


def update_selection_bias(model: nn.Module) -> None:
    """Move the selection bias of every layer that has one (DeepSeek-V3); call it after the optimizer step."""
    for layer in moe_layers(model).values():
        layer.update_selection_bias()


def is_expert_param(parameter: Tensor) -> bool:
    """Whether a parameter belongs to a routed expert, and so differs between expert-parallel ranks.

    Args:
        parameter: any parameter of any model.
    """
    return bool(getattr(parameter, "expert", False))
