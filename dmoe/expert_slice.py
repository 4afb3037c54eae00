"""Which part of all experts lives on a rank, and its parameters as parts of global tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class ExpertSlice:
    """The experts of one rank under expert parallelism.

    Attributes:
        experts: those that live here, a range in [0, E).
        num_experts: E.
        shard: which part of their F lives here: columns ``[shard * F / num_shards, (shard + 1) * F / num_shards)``.
        num_shards: parts that each F is cut into.
        mesh: the ranks as a mesh of ``(E / len(experts),)`` ranks, or ``(E / len(experts), num_shards)``: parameters
            are then ``DTensor`` on it, which checkpoints and FSDP2 understand. None: plain tensors.
        grad_scale: backward multiplies the parameters' gradients by this.
        share_overflow: what the parameters go through, so that an overflow under autocast to float16 on one rank is one
            on all; None where somebody else sees to that.
    """

    experts: range
    num_experts: int
    shard: int = 0
    num_shards: int = 1
    mesh: DeviceMesh | None = None
    grad_scale: float = 1.0
    share_overflow: Callable[[Sequence[Tensor]], Sequence[Tensor]] | None = None

    def columns(self, width: int) -> slice:
        """The part of an expert's ``width`` columns that lives here."""
        each = width // self.num_shards
        return slice(self.shard * each, (self.shard + 1) * each)

    def distributed(self, local: Tensor, shard_dim: int | None) -> Tensor:
        """This rank's part of a parameter ``(E, ...)``, as a ``DTensor`` of the whole; without a mesh as it is.

        Args:
            local: ``(len(experts), ...)``.
            shard_dim: the dimension that ``num_shards`` cuts; None where every shard has all of it.
        """
        if self.mesh is None:
            return local
        from torch.distributed.tensor import DTensor, Replicate, Shard

        shape = list(local.shape)
        shape[0] *= self.mesh.size(0)
        placements: list[Any] = [Shard(0)]
        if self.mesh.ndim == 2:
            placements.append(Replicate() if shard_dim is None else Shard(shard_dim))
            if shard_dim is not None:
                shape[shard_dim] *= self.mesh.size(1)
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(local, self.mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)

    def part_of(self, value: Tensor, parameter: Tensor, shard_dim: int | None) -> Tensor:
        """What a parameter is to be loaded with: this rank's part, when ``value`` is the whole, ``(E, ...)``.

        A value that is a ``DTensor``, or of another shape than the whole and the part, is returned as it is.
        """
        here = local_part(parameter.detach())
        if hasattr(value, "to_local"):
            return value
        if value.shape == here.shape:  # also where ZeRO 3 has left nothing of either
            return self.distributed(value.contiguous(), shard_dim)
        whole = list(here.shape)
        whole[0] = self.num_experts
        if shard_dim is not None:
            whole[shard_dim] *= self.num_shards
        if list(value.shape) != whole:
            return value
        return self.distributed(self.cut(value, shard_dim).contiguous(), shard_dim)

    def cut(self, value: Tensor, shard_dim: int | None) -> Tensor:
        """This rank's part of a whole parameter ``(E, ...)`` of equally wide experts, as a view."""
        value = value[self.experts.start : self.experts.stop]
        if shard_dim is None:
            return value
        columns = self.columns(value.shape[shard_dim])
        return value.narrow(shard_dim, columns.start, columns.stop - columns.start)

    def cut_by_fsdp(self, value: Tensor, parameter: Any) -> Tensor:
        """What FSDP2 leaves on this rank of what lives on the ranks that hold the same experts, as a view.

        Args:
            value: ``(len(experts), ...)``, uncut.
            parameter: the ``DTensor`` that it is a value of.
        """
        mesh, own = parameter.device_mesh, () if self.mesh is None else self.mesh.mesh_dim_names or ()
        names = mesh.mesh_dim_names or (None,) * mesh.ndim
        for mesh_dim, (name, placement) in enumerate(zip(names, parameter.placements, strict=True)):
            if placement.is_replicate() or name in own:
                continue
            parts = value.split(-(-value.shape[placement.dim] // mesh.size(mesh_dim)), placement.dim)
            here = mesh.get_local_rank(mesh_dim)
            value = parts[here] if here < len(parts) else value.narrow(placement.dim, 0, 0)  # others took them all
        return value

    def cut_columns(self, value: Tensor, widths: Sequence[int], dim: int) -> Tensor:
        """This rank's part of experts of different widths, which lie side by side in a dimension; a copy."""
        parts = value.split(list(widths), dim)[self.experts.start : self.experts.stop]
        columns = [(part, self.columns(part.shape[dim])) for part in parts]
        return torch.cat([part.narrow(dim, mine.start, mine.stop - mine.start) for part, mine in columns], dim)


def local_part(tensor: Tensor) -> Tensor:
    """A ``DTensor``'s part on this rank, through which gradients reach it; any other tensor as it is."""
    if not torch.compiler.is_dynamo_compiling():
        return tensor.to_local() if hasattr(tensor, "to_local") else tensor
    from torch.distributed.tensor import DTensor  # PyTorch 2.11's compiler knows the class, and not what it has

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, forward_scale: float, backward_scale: float) -> Tensor:
        ctx.scale = backward_scale
        return tensor.view_as(tensor) if forward_scale == 1 else tensor * forward_scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad if ctx.scale == 1 else grad * ctx.scale, None, None


def scaled(tensor: Tensor, forward_scale: float, backward_scale: float) -> Tensor:
    """``tensor * forward_scale``, whose gradient is multiplied by ``backward_scale`` instead."""
    if forward_scale == 1 and backward_scale == 1:
        return tensor
    return _ScaledGradient.apply(tensor, forward_scale, backward_scale)
