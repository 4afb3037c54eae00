"""Rows in two hops, first inside a node and then between nodes: Tutel's 2DH all-to-all (Hwang et al. 2023).

With N nodes of L ranks the global rank of the l-th on node n is ``n * L + l``. Rank (n, l) hands rank (n, l') of its
node all its rows for any (n', l'), and that one sends them on, with those of its neighbours, to (n', l'). N - 1
messages cross between nodes instead of (N - 1) * L, each L times as large; L - 1 stay inside, N times as large. Results
return the same way.

::

    by (n', l') --regroup--> by (l', n') ==inside==> by (l, n') --regroup--> by (n', l) ==between==> by (n, l)

What arrives is what the flat exchange brings, row for row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from dmoe.parallel.collectives import Exchange, check_rows

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class TwoLevel:
    """The groups of the two hops, as this rank sees them.

    Attributes:
        inner: the ranks of this node.
        outer: the ranks of all nodes with this rank's place in its node, in the order of the nodes.
    """

    inner: ProcessGroup
    outer: ProcessGroup

    @classmethod
    def of_mesh(cls, mesh: Any) -> TwoLevel:
        """The two dimensions of a ``DeviceMesh``: nodes, then the ranks of a node.

        Raises:
            ValueError: a mesh of another number of dimensions.
        """
        if mesh.ndim != 2:
            raise ValueError(f"TwoLevel: expected a DeviceMesh of two dimensions, nodes first, got {mesh.ndim}")
        return cls(inner=mesh.get_group(1), outer=mesh.get_group(0))

    @property
    def num_nodes(self) -> int:
        """N."""
        return dist.get_world_size(self.outer)

    @property
    def ranks_per_node(self) -> int:
        """L."""
        return dist.get_world_size(self.inner)

    def check_against(self, group: ProcessGroup) -> None:
        """Are these the rows and columns of the group's ranks? Asks nobody.

        Raises:
            ValueError: they are not: naming the ranks expected and those that came.
        """
        everyone, each, me = dist.get_process_group_ranks(group), self.ranks_per_node, dist.get_rank(group)
        node, local = divmod(me, each)
        expected = {"inner": everyone[node * each : (node + 1) * each], "outer": everyone[local::each]}
        for name, ranks in expected.items():
            got = dist.get_process_group_ranks(getattr(self, name))
            if got != ranks:
                raise ValueError(
                    f"TwoLevel: {name}: expected the global ranks {ranks} on rank {me} of the group of {everyone} with "
                    f"{each} ranks in a node, got {got}"
                )


def mesh_group(mesh: Any) -> ProcessGroup:
    """The group of all ranks of a two-dimensional ``DeviceMesh``, row by row. Every rank of the mesh has to ask."""
    everyone = mesh.mesh.flatten().tolist()
    world = dist.group.WORLD
    if world is not None and everyone == dist.get_process_group_ranks(world):
        return world
    return mesh._flatten().get_group()  # not public so far, but the one way to a group without asking all processes


def flat_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The same ranks as a mesh of one dimension, ``("ranks",)``. Every rank of the mesh has to ask."""
    from torch.distributed.device_mesh import DeviceMesh

    return DeviceMesh.from_group(mesh_group(mesh), mesh.device_type, mesh_dim_names=("ranks",))


class Pieces:
    """Rows in pieces (a, b), those of one a together, and the way to those of one b together.

    Args:
        counts: rows of piece (a, b) for a in range(A), b in range(B).
    """

    def __init__(self, counts: Sequence[Sequence[int]]) -> None:
        self.counts = tuple(tuple(row) for row in counts)
        self.num_rows = sum(map(sum, self.counts))
        self._index: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """A, B."""
        return len(self.counts), len(self.counts[0])

    def transposed(self) -> Pieces:
        """The other order."""
        return Pieces(list(zip(*self.counts, strict=True)))

    def regroup(self, x: Tensor, room: int | None = None) -> Tensor:
        """Rows (a, b) to (b, a); differentiable.

        Args:
            x: ``(R, C)``, R at least the rows of all pieces; what is beyond them is left out.
            room: rows of the result: zeros behind the pieces. None: no more than these.
        """
        return _Regroup.apply(x, self, self.num_rows if room is None else room)

    def copy(self, x: Tensor, room: int) -> Tensor:
        """``regroup`` without autograd."""
        rows = self.num_rows
        if rows == room and min(self.shape) == 1:  # nothing changes places
            return x[:rows]
        result = x.new_empty(room, x.shape[1])
        result[rows:].zero_()
        if len({count for row in self.counts for count in row}) == 1:  # as in the static mode: no index to make
            pieces = x[:rows].reshape(*self.shape, self.counts[0][0], x.shape[1]).transpose(0, 1)
            result[:rows].view(pieces.shape).copy_(pieces)
        else:
            torch.index_select(x, 0, self.index(x.device), out=result[:rows])
        return result

    def index(self, device: torch.device) -> Tensor:
        """Where each row of the result lies in x, ``(num_rows,)`` int64; the host waits for nothing."""
        if self._index is None:
            starts = _grid(_starts(count for row in self.counts for count in row), *self.shape)
            lengths = [count for column in zip(*self.counts, strict=True) for count in column]
            before = [start for column in zip(*starts, strict=True) for start in column]
            shifts = [start - end for start, end in zip(before, _starts(lengths), strict=False)]
            table = torch.tensor([shifts, lengths], device="cpu")
            if device.type == "cuda":
                table = table.pin_memory()
            shift, length = table.to(device, non_blocking=True)
            moved = torch.repeat_interleave(shift, length, output_size=self.num_rows)
            self._index = torch.arange(self.num_rows, device=device) + moved
        return self._index


class _Regroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, pieces: Pieces, room: int) -> Tensor:
        ctx.pieces, ctx.input_rows = pieces, x.shape[0]
        return pieces.copy(x, room)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.pieces.transposed().regroup(grad, ctx.input_rows), None, None


class TwoLevelExchange:
    """One all-to-all of rows in two hops; see :class:`dmoe.parallel.collectives.RowExchange`.

    ``start`` sends the first hop, ``finish`` awaits it, regroups, and does the second. In backward, where ``finish`` is
    reached the second hop is undone and the first hop's reverse begins, to be awaited where ``start`` is reached. All
    ranks of both groups must start, and finish, in the same order.

    Args:
        send_counts: rows for each of the N * L ranks.
        recv_counts: rows from each of them.
        held_counts: rows that pass this rank, N counts for each rank of its node: those that come from the l-th for
            node n', and on the way back go to the l-th from node n'.
        levels: the two groups.
        what: a name for the rows in error messages.
        back: whether this is the way back, first between nodes and then inside. It undoes an exchange whose
            ``send_counts`` are this one's ``recv_counts``, and the other way round, with the same ``held_counts``.
        room: rows of the result: zeros behind those that arrive. None: no more than these.

    Raises:
        ValueError: not one count for each rank, or a negative one.
    """

    def __init__(
        self,
        send_counts: Sequence[int],
        recv_counts: Sequence[int],
        held_counts: Sequence[int],
        levels: TwoLevel,
        what: str = "rows",
        *,
        back: bool = False,
        room: int | None = None,
    ) -> None:
        nodes, each = levels.num_nodes, levels.ranks_per_node
        for name, counts in (("send", send_counts), ("recv", recv_counts), ("held", held_counts)):
            if len(counts) != nodes * each or min(counts) < 0:
                raise ValueError(
                    f"TwoLevelExchange: {what}: {name}_counts: expected {nodes * each} counts of at least 0, for "
                    f"{nodes} nodes of {each} ranks, got {tuple(counts)}"
                )
        self.send_counts, self.recv_counts = tuple(send_counts), tuple(recv_counts)
        self.held_counts = tuple(held_counts)
        self.levels, self.what, self._back, self._room, self._advanced = levels, what, back, room, False
        sent, received = _grid(send_counts, nodes, each), _grid(recv_counts, nodes, each)
        held = _grid(held_counts, each, nodes)
        inside, between = (levels.inner, f"{what} inside the node"), (levels.outer, f"{what} between nodes")
        self._before: Pieces | None
        self._after: Pieces | None
        if back:
            first = Exchange(_by_row(sent), _by_column(held), *between)
            second = Exchange(_by_row(held), _by_column(received), *inside)
            self._before, self._after = None, Pieces(received).transposed()
            self._between = Pieces(held).transposed()
        else:
            first = Exchange(_by_column(sent), _by_row(held), *inside)
            second = Exchange(_by_column(held), _by_row(received), *between, room)
            self._before, self._after, self._between = Pieces(sent), None, Pieces(held)
        self.hops: tuple[Exchange, ...] = (first, second)

    @property
    def num_rows(self) -> int:
        """Rows of the result."""
        return sum(self.recv_counts) if self._room is None else self._room

    def reversed(self, room: int | None = None) -> TwoLevelExchange:
        """The other direction."""
        what = f"gradients of {self.what}"
        counts = self.recv_counts, self.send_counts, self.held_counts
        return TwoLevelExchange(*counts, self.levels, what, back=not self._back, room=room)

    def start(self, x: Tensor) -> Tensor:
        """Begin the first hop.

        Args:
            x: ``(R, C)``; R is at least the sum of ``send_counts``, and rows beyond that stay here.

        Raises:
            ValueError: x has too few rows, or is not a matrix.
            RuntimeError: the exchange failed.
        """
        check_rows(x, self)
        return self.hops[0].start(x if self._before is None else self._before.regroup(x))

    def advance(self, under_way: Tensor) -> Tensor:
        """Wait for the first hop, and begin the second; then :meth:`finish` takes what this returns.

        Raises:
            RuntimeError: the exchange failed, because a rank died or did not come.
        """
        self._advanced = True
        return self.hops[1].start(self._between.regroup(self.hops[0].finish(under_way)))

    def finish(self, under_way: Tensor) -> Tensor:
        """The rest of the way, to ``(num_rows, C)``.

        Raises:
            RuntimeError: the exchange failed, because a rank died or did not come.
        """
        rows = self.hops[1].finish(under_way if self._advanced else self.advance(under_way))
        return rows if self._after is None else self._after.regroup(rows, self._room)


def _grid(counts: Sequence[int], rows: int, columns: int) -> list[Sequence[int]]:
    return [counts[row * columns : (row + 1) * columns] for row in range(rows)]


def _starts(lengths: Iterable[int]) -> list[int]:
    """Where each of them begins, one after the other; and the end."""
    return list(accumulate(lengths, initial=0))


def _by_row(grid: Sequence[Sequence[int]]) -> list[int]:
    return [sum(row) for row in grid]


def _by_column(grid: Sequence[Sequence[int]]) -> list[int]:
    return [sum(column) for column in zip(*grid, strict=True)]
