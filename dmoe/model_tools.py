"""What walks over a user's model: the sum of its auxiliary losses, and which parameters are experts'."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dmoe.layer import MoE
from dmoe.metric_sums import add_ranks, num_ranks
from dmoe.metrics import RoutingMetrics

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def moe_layers(model: nn.Module) -> dict[str, MoE]:
    """Every MoE layer of a model by its qualified name, each once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MoE)}


def aux_loss(model: nn.Module) -> Tensor:
    """Sum of the auxiliary losses of all MoE layers' last training forwards; add it to the task's loss.

    Each layer's loss already carries its coefficients and is divided by ``num_moe_layers``. Reading clears it, so call
    this once for each training forward, gradient accumulation included, and scale the sum like the task's loss
    (``(task_loss + aux_loss(model)) / accumulation_steps``, ``scaler.scale(...)``).

    Args:
        model: any module; layers inside wrappers (DDP, FSDP, ``torch.compile``) are found.

    Returns:
        Scalar float32 (float64 for a float64 model) with a graph; 0 when nothing waits to be read: an evaluation
        records nothing, and leaves what is there, and with ``aux_loss="attached"`` nothing is kept.

    Raises:
        RuntimeError: a layer's loss has no graph, as under reentrant activation checkpointing.
    """
    losses = [loss for layer in moe_layers(model).values() if (loss := layer.take_aux_loss()) is not None]
    if losses:
        home = losses[0].device
        return torch.stack([loss.to(home) for loss in losses]).sum()
    parameter = next(model.parameters(), None)
    if parameter is None or parameter.is_meta:  # offloaded: a number on the CPU goes with tensors on any device
        return torch.zeros((), device="cpu")
    return torch.zeros((), device=parameter.device)


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


def attach_aux_losses(model: nn.Module) -> None:
    """Let every layer add the gradient of its auxiliary losses by itself, in backward, from now on.

    For loops that compute the loss where the layers are not: the stages of a pipeline
    (``torch.distributed.pipelining``), or a trainer that cannot be edited. What ``aux_loss="attached"`` does from the
    beginning; :func:`aux_loss` is 0 then, and :func:`attached_aux_loss` says what was added.

    Args:
        model: any module, or one stage of it.
    """
    for layer in moe_layers(model).values():
        layer.attach_aux_loss()


@torch.no_grad()
def attached_aux_loss(model: nn.Module, group: ProcessGroup | None = None) -> Tensor:
    """The auxiliary losses that backwards have attached since the last call, a number to log; reading clears it.

    Each layer's is the mean over its backwards (micro-batches), without the scale; the layers' are added up.

    Args:
        model: any module, or one stage of it.
        group: the stages of a pipeline, over which the sum goes on; every rank of it calls this. None: this rank alone.

    Returns:
        Scalar float32; 0 where nothing was attached.
    """
    losses = [mean for layer in moe_layers(model).values() if (mean := layer.take_attached_loss()) is not None]
    parameter = next(model.parameters(), None)
    home = losses[0].device if losses else torch.device("cpu") if parameter is None else parameter.device
    total = torch.zeros((), device=home)
    for loss in losses:
        total += loss.to(home)
    if group is not None:
        dist.all_reduce(total, group=group)
    return total


def update_selection_bias(model: nn.Module, group: ProcessGroup | None = None) -> None:
    """Move the selection bias of every layer that has one (DeepSeek-V3); call it after the optimizer step.

    Args:
        model: any module, the same on all ranks.
        group: all ranks that train it; None: those that the layers know of, see :meth:`dmoe.MoE.update_selection_bias`.

    Raises:
        ValueError: None, and there are ranks that no layer knows of.
    """
    for layer in moe_layers(model).values():
        layer.update_selection_bias(group)


@torch.no_grad()
def reduce_metrics(model: nn.Module, group: ProcessGroup | None = None) -> dict[str, RoutingMetrics]:
    """The last forward's metrics of every MoE layer, over all ranks of a group: one all-reduce for the whole model.

    Call it when you log, on every rank; a step without it pays nothing. The host waits only where it reads a result.

    Args:
        model: any module, the same on all ranks.
        group: ``torch.distributed`` ranks; None is all of them.

    Returns:
        By layer name: counts and bytes summed (as scalar int64 tensors; None where the layer counts none), the
        entropy's mean over ranks weighted by their assignments. Layers that have not run are left out.

    """
    found = {name: layer.last_metrics for name, layer in moe_layers(model).items()}
    ran = {name: metrics for name, metrics in found.items() if metrics is not None}
    return ran if num_ranks(group) == 1 else add_ranks(ran, group)[0]


def is_expert_param(parameter: Tensor) -> bool:
    """Whether a parameter belongs to a routed expert, and so differs between expert-parallel ranks.

    Args:
        parameter: any parameter of any model.
    """
    return bool(getattr(parameter, "expert", False))
