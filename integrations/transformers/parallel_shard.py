"""Memory for a model that is spread over ranks, cut and averaged as FSDP2 and expert parallelism have it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

import dmoe
from dmoe.integrations.transformers.parallel_links import here
from dmoe.integrations.transformers.parallel_mesh import Grid
from dmoe.parallel import average_in_backward, fully_shard_experts


def spread(model: Any, grid: Grid, device: torch.device, **fsdp_options: Any) -> None:
    """Give a model memory on a device, in place, and let its gradients be means over all ranks.

    With replicas, experts are cut over those of the same experts and everything else over all ranks, each decoder
    layer by itself (FSDP2): no more than one layer is ever whole on a rank. Without any, what is no expert is on every
    rank, and hooks average its gradients when a backward ends.

    Args:
        model: on ``meta``, or with values; ranks' experts are on their ranks already.
        grid: of ranks.
        device: for parameters and buffers.
        **fsdp_options: of ``torch.distributed.fsdp.fully_shard``.
    """
    settled: dict[int, nn.Parameter] = {}
    if grid.fsdp > 1:
        from torch.distributed.fsdp import fully_shard

        layers = layers_of(model)
        inside = {id(each) for layer in layers for each in layer.modules()}
        for layer in layers:
            settle(layer, device, settled)
            if grid.ep > 1:
                fully_shard_experts(layer, grid.of("fsdp"), **fsdp_options)
            fully_shard(layer, mesh=grid.everyone, **fsdp_options)
        settle(model, device, settled, inside)
        fully_shard(model, mesh=grid.everyone, **fsdp_options)
        for layer in dmoe.moe_layers(model).values():
            layer.experts.mark_parameters()  # FSDP made parameters of its own
        return
    settle(model, device, settled)
    if grid.group is not None:
        average_in_backward(model, grid.group)


def layers_of(model: Any) -> list[nn.Module]:
    """The layers that are gathered each on its own: those that Transformers says are not to be split."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    found: list[nn.Module] = []
    inside: set[int] = set()
    for module in model.modules():
        if id(module) not in inside and module is not model and type(module).__name__ in names:
            found.append(module)
            inside |= {id(each) for each in module.modules()}
    return found


@torch.no_grad()
def settle(
    module: nn.Module, device: torch.device, settled: dict[int, nn.Parameter], but: Collection[int] = ()
) -> None:
    """Parameters that are on ``meta``, or views of something larger, get memory of their own; all move to a device.

    Tied ones stay tied. Values of what was on ``meta`` are not defined.

    Args:
        module: whose parameters, and those of all below it.
        device: for them, and for buffers.
        settled: those of earlier calls, by what they were.
        but: modules, by identity, that are left alone.
    """
    for owner in module.modules():
        if id(owner) in but:
            continue
        for name, parameter in owner._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in settled:
                new = _settled(parameter, device)
                settled[id(parameter)] = settled[id(new)] = new
            owner._parameters[name] = settled[id(parameter)]
        for name, buffer in owner._buffers.items():
            if buffer is not None:
                owner._buffers[name] = torch.empty_like(buffer, device=device) if buffer.is_meta else buffer.to(device)


def _settled(parameter: nn.Parameter, device: torch.device) -> nn.Parameter:
    local = here(parameter)
    roomy = not local.is_meta and local.untyped_storage().nbytes() > local.nbytes
    if local.device == device and not roomy:
        return parameter
    value: Tensor = torch.empty_like(parameter.detach(), device=device)
    if not local.is_meta:
        here(value).copy_(local)
    new = nn.Parameter(value, requires_grad=parameter.requires_grad)
    new.__dict__.update(parameter.__dict__)
    return new
