"""The norm of all gradients, when some of them lie on other ranks, and clipping by it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dmoe.expert_slice import local_part
from dmoe.ops.activation import accumulate_dtype
from dmoe.parallel.collectives import all_reduce
from dmoe.parallel.gradients import dispatchers, experts_of, is_sharded

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@torch.no_grad()
def grad_norm(model: nn.Module, norm_type: float = 2.0, *, parameters: Iterable[nn.Parameter] | None = None) -> Tensor:
    """The p-norm of all gradients of a model as one vector, each parameter counted once; equal on every rank.

    What every rank has (router, attention) counts once, an expert counts wherever it lives, and ``DTensor`` gradients
    (FSDP2) count in all their parts. Nothing is read by the host.

    Args:
        model: every rank's part of it. Gradients of what is replicated are equal on all ranks already.
        norm_type: p > 0, or ``math.inf`` for the largest magnitude.
        parameters: those of the model's that count, the same ones on all ranks; None is all of them.

    Returns:
        Scalar, in float32 (float64 when a gradient is).

    Raises:
        ValueError: ``norm_type`` is no norm.
    """
    if not norm_type > 0:
        raise ValueError(f"grad_norm: norm_type: expected a number above 0, or inf, got {norm_type}")
    owners = _owners(model)
    counted = list(model.parameters() if parameters is None else parameters)
    parts: dict[tuple[ProcessGroup, ...], list[Tensor]] = {}
    for parameter in counted:
        groups, share = _groups_of(parameter, owners)
        norms = parts.setdefault(groups, [])  # also without a gradient here: other ranks may have one
        if parameter.grad is None:
            continue
        norm = torch.linalg.vector_norm(local_part(parameter.grad), norm_type, dtype=accumulate_dtype(parameter.dtype))
        norms.append(norm if math.isinf(norm_type) else norm**norm_type * share)
    if not counted:
        return torch.zeros(())
    widest = max((each.dtype for each in counted), key=lambda dtype: dtype.itemsize)
    home, highest = counted[0].device, accumulate_dtype(widest)
    totals = []
    for groups, norms in parts.items():
        norms = norms or [torch.zeros((), device=home)]
        stacked = torch.stack([norm.to(home, highest) for norm in norms])
        total = stacked.max() if math.isinf(norm_type) else stacked.sum()
        all_reduce(total, "a norm", *groups, op=dist.ReduceOp.MAX if math.isinf(norm_type) else dist.ReduceOp.SUM)
        totals.append(total)
    everything = torch.stack(totals)
    return everything.max() if math.isinf(norm_type) else everything.sum() ** (1 / norm_type)


@torch.no_grad()
def clip_grad_norm(
    model: nn.Module,
    max_norm: float,
    norm_type: float = 2.0,
    *,
    error_if_nonfinite: bool = False,
    parameters: Iterable[nn.Parameter] | None = None,
) -> Tensor:
    """``torch.nn.utils.clip_grad_norm_`` for a model with experts on other ranks: all ranks scale by the same factor.

    Args:
        model: see :func:`grad_norm`; every rank of every group calls this.
        max_norm: gradients of a larger norm are multiplied by ``max_norm / (norm + 1e-6)``.
        norm_type: p.
        error_if_nonfinite: raise instead of scaling by NaN; this makes the host wait for the norm.
        parameters: those of the model's that are clipped by their norm, as of one of several optimizers; None is all.

    Returns:
        The norm before clipping, scalar.

    Raises:
        RuntimeError: the norm is not finite, and ``error_if_nonfinite``.
    """
    clipped = list(model.parameters() if parameters is None else parameters)
    norm = grad_norm(model, norm_type, parameters=clipped)
    if error_if_nonfinite and not torch.isfinite(norm):
        raise RuntimeError(
            f"clip_grad_norm: expected a finite norm of order {norm_type} of the gradients, got {norm.item()}; the "
            "gradients are left as they are"
        )
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for parameter in clipped:
        if parameter.grad is not None:
            grad = local_part(parameter.grad)
            grad.mul_(factor.to(grad.device, grad.dtype))
    return norm


@torch.no_grad()
def clip_grad_value(parameters: Iterable[nn.Parameter], clip_value: float) -> None:
    """``torch.nn.utils.clip_grad_value_`` for parameters some of which are ``DTensor``, which it refuses to mix.

    Args:
        parameters: of this rank; each number of their gradients is put between ``-clip_value`` and ``clip_value``.
        clip_value: 0 or more.
    """
    for parameter in parameters:
        if parameter.grad is not None:
            local_part(parameter.grad).clamp_(-clip_value, clip_value)


def _owners(model: nn.Module) -> dict[int, Any]:
    """By the identity of an expert's parameter, the layer it belongs to."""
    return {id(parameter): layer for layer, _ in dispatchers(model) for parameter in layer.parameters()}


def _groups_of(parameter: Any, owners: dict[int, Any]) -> tuple[tuple[ProcessGroup, ...], float]:
    """The groups over which a parameter's parts add up, and what share of this rank's part counts here."""
    layer: Any = owners.get(id(parameter))
    mesh = getattr(parameter, "device_mesh", None)
    groups: list[ProcessGroup] = []
    share = 1.0
    own: tuple[str, ...] = ()
    if layer is not None and is_sharded(parameter):
        groups += layer.dispatcher.groups
        experts = experts_of(layer)
        owned = experts.owned
        own = (owned.mesh.mesh_dim_names or ()) if owned.mesh is not None else ()
        if parameter is experts._parameters.get("down_bias"):  # every shard of an expert holds the whole of it
            share = 1 / owned.num_shards
        if mesh == owned.mesh:
            mesh = None
    if mesh is not None:
        names = mesh.mesh_dim_names or (None,) * mesh.ndim
        for dim, (name, placement) in enumerate(zip(names, parameter.placements, strict=True)):
            if not placement.is_replicate() and name not in own:  # is_shard() is False for a shard of a shard
                groups.append(mesh.get_group(dim))
    return tuple(groups), share
