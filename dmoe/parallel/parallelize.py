"""A whole model on a mesh of ranks by one call: experts over ``ep``, everything else by FSDP2 or DDP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from dmoe.parallel.dispatch import AllToAllDispatcher
from dmoe.parallel.fsdp import fully_shard_experts
from dmoe.parallel.gradients import data_parallel, dispatchers, split_parameters
from dmoe.parallel.statistics import LoadOfRanks
from dmoe.parallel.two_level import flat_mesh, mesh_group

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

EXPERT_DIMS = ("ep", "expert_tp")


def parallelize(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    data: str | None = "fsdp2",
    blocks: Sequence[nn.Module] | None = None,
    expert_options: dict[str, Any] | None = None,
    **options: Any,
) -> nn.Module:
    """Spread a model over a mesh: the experts of its MoE layers over ``ep``, the rest by FSDP2 or DDP.

    ::

        mesh = init_device_mesh("cuda", (2, 4), mesh_dim_names=("replicas", "ep"))
        model = dmoe.parallel.parallelize(model, mesh)  # built as for one process, alike on every rank
        optimizer = torch.optim.AdamW([{"params": group} for group in dmoe.parallel.split_parameters(model)])
        ...
        dmoe.parallel.clip_grad_norm(model, 1.0)

    A step on it equals one process's on the tokens of all ranks of the mesh. Layers that were built with an
    ``ep_group`` stay as they are; the others get ``mesh["ep"]``, and ``mesh["expert_tp"]`` where the mesh has it
    (:meth:`dmoe.MoE.spread_experts`). The mesh's other dimension, whatever its name, are the ranks that hold the same
    experts: FSDP2 cuts them over it, DDP averages over it. A model whose mesh has no ``ep`` is spread the same way with
    all experts on each rank.

    Args:
        model: with the same values on all ranks, or on the meta device, to be filled after. It is changed in place.
        mesh: all ranks that train the model: one dimension beside ``ep`` and ``expert_tp`` at most.
        data: ``fsdp2`` for ``fully_shard`` over all ranks of the mesh, ``ddp`` for :func:`data_parallel`, None to
            spread the experts alone, for a wrapper of your own.
        blocks: what ``fully_shard`` gathers at a time, from the first on; None are the members of every outermost
            ``nn.ModuleList``, and of lists and dicts that are members themselves.
        expert_options: of ``fully_shard`` for the experts where they differ from ``options``.
        **options: of ``fully_shard`` (as ``mp_policy``, ``reshard_after_forward``), or of ``DistributedDataParallel``.

    Returns:
        The model; with ``ddp`` its wrapper.

    Raises:
        ValueError: a mesh, or options, that do not fit; a model that FSDP1 or DDP has wrapped already; experts that
            cannot be spread.
        TypeError: no mesh.
    """
    replicas = _replicas_of(mesh)
    _check(model, data, blocks, expert_options)
    everyone = mesh_group(mesh)
    _spread(model, mesh, everyone)
    if data == "ddp":
        held = mesh[replicas].get_group() if replicas is not None and dispatchers(model) else None
        return data_parallel(model, process_group=everyone, expert_replicas=held, **options)
    if data == "fsdp2":
        _fully_shard(model, mesh, replicas, blocks, {**options, **(expert_options or {})}, options)
    return model


def _spread(model: nn.Module, mesh: DeviceMesh, everyone: ProcessGroup) -> None:
    names = mesh.mesh_dim_names or ()
    tp = mesh["expert_tp"] if "expert_tp" in names else None
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "spread_experts")]
    if "ep" in names:
        _refuse_tied(layers)
    for layer in layers:
        if "ep" in names and not isinstance(layer.dispatcher, AllToAllDispatcher):
            layer.spread_experts(mesh["ep"], expert_tp_group=tp, loss_group=everyone)
        for held, name in ((layer, "bias_ranks"), (layer.auxiliary, "ranks")):
            if getattr(held, name) is None:
                setattr(held, name, LoadOfRanks(everyone))


def _refuse_tied(layers: list[Any]) -> None:
    """Layers whose experts are one parameter would go on with parameters of their own."""
    parameters = [parameter for layer in layers for parameter in layer.experts.parameters()]
    if len(parameters) != len(set(parameters)):
        raise ValueError(
            "parallelize: model: expected experts that are each one layer's, got two layers that share a parameter: "
            "let them share the layer"
        )


def _fully_shard(
    model: nn.Module,
    mesh: DeviceMesh,
    replicas: str | None,
    blocks: Sequence[nn.Module] | None,
    of_experts: dict[str, Any],
    options: dict[str, Any],
) -> None:
    from torch.distributed.fsdp import fully_shard

    everyone = flat_mesh(mesh)
    if replicas is not None:
        fully_shard_experts(model, mesh[replicas], **of_experts)
        alone: set[nn.Parameter] = set()
    else:  # each expert lives on one rank: nobody is to average its gradients, or to gather it
        alone = set(split_parameters(model)[1])
    for block in _outermost_blocks(model) if blocks is None else blocks:
        fully_shard(block, mesh=everyone, ignored_params=alone, **options)
    fully_shard(model, mesh=everyone, ignored_params=alone, **options)
    marked: list[Any] = [module for module in model.modules() if hasattr(module, "mark_parameters")]
    for module in marked:
        module.mark_parameters()  # FSDP made parameters of its own


def _outermost_blocks(model: nn.Module) -> list[nn.Module]:
    """Members of every ``nn.ModuleList`` that lies in no other one, each once: a transformer's layers."""
    found: list[nn.Module] = []
    inside: set[int] = set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and id(module) not in inside:
            found += [each for each in _members(module) if not hasattr(each, "unshard")]
            inside |= {id(each) for each in module.modules()}
    return list(dict.fromkeys(found))


def _members(container: nn.Module) -> list[nn.Module]:
    """What is called, of a list of lists or dicts too: these have no forward that FSDP could gather for."""
    members: list[nn.Module] = []
    for child in container.children():
        members += _members(child) if isinstance(child, nn.ModuleList | nn.ModuleDict) else [child]
    return members


def _replicas_of(mesh: Any) -> str | None:
    """The dimension of ranks that hold the same experts; None where there is none."""
    from torch.distributed.device_mesh import DeviceMesh

    if not isinstance(mesh, DeviceMesh):
        raise TypeError(
            "parallelize: mesh: expected a DeviceMesh with named dimensions, as init_device_mesh('cuda', (2, 4), "
            f"mesh_dim_names=('replicas', 'ep')), got {type(mesh).__name__}"
        )
    names = mesh.mesh_dim_names or ()
    others = [name for name in names if name not in EXPERT_DIMS]
    if not names or len(others) > 1 or ("expert_tp" in names and "ep" not in names):
        raise ValueError(
            "parallelize: mesh: expected the dimensions 'ep', 'expert_tp' beside it if you like, and one more at most, "
            f"of the ranks that hold the same experts, got {names or f'{mesh.ndim} without names'}; pass the part of a "
            "larger mesh that trains this model, as mesh['replicas', 'ep']"
        )
    return others[0] if others else None


def _check(model: nn.Module, data: Any, blocks: Any, expert_options: Any) -> None:
    if data not in ("fsdp2", "ddp", None):
        raise ValueError(f"parallelize: data: expected 'fsdp2', 'ddp' or None, got {data!r}")
    for name, given in (("blocks", blocks), ("expert_options", expert_options)):
        if given is not None and data != "fsdp2":
            raise ValueError(f"parallelize: {name}: expected None with data={data!r}, got {type(given).__name__}")
    wrapped = next((type(each).__name__ for each in model.modules() if _is_wrapper(each)), None)
    if wrapped is not None:
        raise ValueError(
            f"parallelize: expected a model that nothing wraps, got {wrapped} in it: parallelize spreads the experts "
            "first, and then shards or wraps the rest by itself (data=)"
        )


def _is_wrapper(module: nn.Module) -> bool:
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    return isinstance(module, nn.parallel.DistributedDataParallel | FullyShardedDataParallel | FSDPModule)
