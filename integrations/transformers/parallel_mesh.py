"""The ranks of a parallel model: a grid of replicas ("fsdp") by ranks that share the experts ("ep")."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn

from dmoe.parallel import flat_mesh

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

_T = TypeVar("_T")
DIMS, _KEPT = ("fsdp", "ep"), "_dmoe_grid"


@dataclass(frozen=True)
class Grid:
    """Which ranks hold what.

    Attributes:
        fsdp, ep: sizes.
        mesh: of both dimensions; None for one process without a group.
        everyone: the same ranks in one dimension; None likewise.
    """

    fsdp: int = 1
    ep: int = 1
    mesh: DeviceMesh | None = None
    everyone: DeviceMesh | None = None

    def __deepcopy__(self, memo: Any) -> Grid:
        return self

    @property
    def group(self) -> ProcessGroup | None:
        """All of these ranks; None for one alone."""
        return None if self.everyone is None else self.everyone.get_group()

    @property
    def first(self) -> bool:
        """Whether this rank speaks for all."""
        return self.everyone is None or self.everyone.get_local_rank() == 0

    def of(self, name: str) -> DeviceMesh:
        """One dimension of the mesh, where there is one."""
        assert self.mesh is not None
        return self.mesh[name]

    def together(self, step: Callable[[], _T], *, first_alone: bool = False) -> _T:
        """What a step gives, which talks to nobody; where it raises on one rank, all ranks raise.

        Args:
            step: what each rank does.
            first_alone: only the first rank does it, and all get what it gave.

        Raises:
            Exception: what the step raised here; where it did not, a RuntimeError with another's type and text.
        """
        if self.group is None:
            return step()
        given, error = None, None
        try:
            given = step() if self.first or not first_alone else None
        except Exception as problem:
            error = problem
        told: list[Any] = [None] * dist.get_world_size(self.group)
        text = None if error is None else f"{type(error).__name__}: {error}"
        dist.all_gather_object(told, (text, given if first_alone else None), group=self.group)
        if error is not None:
            raise error
        for rank, (text, _) in enumerate(told):
            if text is not None:
                raise RuntimeError(f"rank {rank} failed, and so all ranks stop: {text}")
        return cast("_T", told[0][1] if first_alone else given)


def keep_grid(model: nn.Module, grid: Grid) -> None:
    """Let a model know its ranks."""
    model.__dict__[_KEPT] = grid


def grid_of_model(model: nn.Module) -> Grid:
    """The ranks that a model is spread over.

    Raises:
        ValueError: it is none of :func:`parallelize`'s.
    """
    grid = model.__dict__.get(_KEPT)
    if not isinstance(grid, Grid):
        raise ValueError(f"expected a model that parallelize returned, got {type(model).__name__} of another origin")
    return grid


def grid_of(ep: int | None, fsdp: int | None, mesh: DeviceMesh | None, device: torch.device) -> Grid:
    """The grid that sizes or a mesh describe.

    Args:
        ep, fsdp: sizes; None is what the mesh, or the number of ranks, leaves.
        mesh: of dimensions named "fsdp" and "ep", or None to make one of all ranks.
        device: where the ranks compute.

    Raises:
        ValueError: sizes that do not fit the ranks, or a mesh of other dimensions.
        RuntimeError: several ranks without a process group.
    """
    for name, size in (("ep", ep), ("fsdp", fsdp)):
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise ValueError(f"parallelize: {name}: expected an integer of at least 1, got {size!r}")
    if mesh is not None:
        return _of_mesh(ep, fsdp, mesh)
    started = dist.is_available() and dist.is_initialized()
    if not started and (ep or 1) * (fsdp or 1) > 1:
        raise RuntimeError(
            f"parallelize: expected a process group of ep * fsdp = {ep or 1} * {fsdp or 1} ranks, got none: call "
            "torch.distributed.init_process_group first, under torchrun"
        )
    world = dist.get_world_size() if started else 1
    ep = ep or 1
    fsdp = fsdp or max(world // ep, 1)
    if ep * fsdp != world:
        raise ValueError(
            f"parallelize: expected ep * fsdp to be the {world} ranks of the process group, got ep={ep} * fsdp={fsdp}"
        )
    if world == 1:
        return Grid()
    from torch.distributed.device_mesh import init_device_mesh

    made = init_device_mesh(device.type, (fsdp, ep), mesh_dim_names=DIMS)
    return Grid(fsdp, ep, made, flat_mesh(made))


def _of_mesh(ep: int | None, fsdp: int | None, mesh: DeviceMesh) -> Grid:
    names = tuple(mesh.mesh_dim_names or ())
    if names != DIMS:
        raise ValueError(f'parallelize: mesh: expected the dimensions ("fsdp", "ep"), got {names or mesh.ndim}')
    sizes = (mesh.size(0), mesh.size(1))
    if (fsdp or sizes[0], ep or sizes[1]) != sizes:
        raise ValueError(
            f"parallelize: mesh: expected fsdp={fsdp} by ep={ep}, as you say, got {sizes[0]} by {sizes[1]}"
        )
    return Grid(*sizes, mesh, flat_mesh(mesh))
