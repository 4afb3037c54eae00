"""FSDP2 for experts: sharded over the ranks that hold the same ones, and gathered for their own forward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from dmoe.parallel.gradients import dispatchers, experts_of
from dmoe.parallel.statistics import LoadOfRanks

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def fully_shard_experts(model: nn.Module, mesh: DeviceMesh, **options: Any) -> list[nn.Module]:
    """``torch.distributed.fsdp.fully_shard`` on the experts of every expert-parallel layer.

    Do this first, then ``fully_shard`` the model over all ranks that train it::

        mesh = init_device_mesh("cuda", (replicas, ep), mesh_dim_names=("replicas", "ep"))
        model = Model(ep_group=mesh["ep"])
        dmoe.parallel.fully_shard_experts(model, mesh["replicas"])
        fully_shard(model, mesh=all_ranks)

    Selection biases of routers follow the load of all these ranks, replicas and experts' alike, from then on.

    The stack of experts is cut, or, where there are more replicas than experts on a rank, each expert along its first
    dimension that the replicas divide (FSDP2 cuts evenly there). Gradients are averaged over the replicas.

    Args:
        model: with layers built with ``ep_group=mesh["ep"]``, one dimension of the mesh that ``mesh`` is of too.
        mesh: the ranks that hold the same experts, one dimension.
        **options: of ``fully_shard``.

    Returns:
        The modules that were wrapped.

    Raises:
        ValueError: parameters that are no ``DTensor``, so that nobody would know what is where.
    """
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Shard

    wrapped = []
    for layer, dispatcher in dispatchers(model):
        experts: Any = layer.experts
        if not all(isinstance(parameter, DTensor) for parameter in experts.parameters()):
            raise ValueError(
                "fully_shard_experts: expected experts whose parameters are DTensor, got plain tensors: build the "
                "layer with dtensor=True and with experts of one width"
            )
        many = mesh.size() > dispatcher.num_local_experts

        def placement(parameter: Tensor, many: bool = many) -> Shard:
            inner = range(1, parameter.dim()) if many else ()
            return Shard(next((dim for dim in inner if parameter.shape[dim] % mesh.size() == 0), 0))

        fully_shard(experts, mesh=mesh, **{"shard_placement_fn": placement, **options})
        experts_of(layer).mark_parameters()  # FSDP made parameters of its own
        if layer.bias_ranks is None:
            layer.bias_ranks = LoadOfRanks(*dispatcher.groups, mesh.get_group())
        wrapped.append(experts)
    return wrapped
