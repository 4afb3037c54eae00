"""torch's symmetric memory as a transport: the all-to-all in which GPUs read each other's memory (NVSHMEM).

``torch.ops.symm_mem.all_to_all_vdev_2d`` takes its splits from the device and arranges what it receives by expert. Here
each rank is one split: a token goes once to a rank, however many of its experts live there, and the plan expands it on
arrival, as with ``all_to_all_single``. Rows are copied into buffers that all ranks have at the same size, and out of
them again.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from dmoe.parallel.collectives import Exchange, RowExchange, all_reduce, as_bytes, check_rows, explained
from dmoe.parallel.dispatch import AllToAllDispatcher

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from dmoe.parallel.counting import Counting

MOST_RANKS = 32  # the operation adds up a row of splits in one warp


class SymmetricDispatcher(AllToAllDispatcher):
    """:class:`AllToAllDispatcher` whose rows, results and gradients travel through symmetric memory.

    In every dispatch the ranks agree on how many rows there has to be room for, for which the host waits once more than
    for the counts; not so in the static mode. Copies of experts, and steps of tensor parallelism, are collectives as
    elsewhere. Before the first forward ``torch.distributed._symmetric_memory.set_backend("NVSHMEM")`` has to be called.

    Args:
        group: the ranks, 32 at most.
        num_experts: E, see there.
        **options: of :class:`AllToAllDispatcher`, but ``two_level``.

    Raises:
        ValueError: as there; two hops, or more ranks.
        RuntimeError: this torch has no such operation, or no NVSHMEM.
    """

    def __init__(self, group: ProcessGroup, num_experts: int, *args: Any, **options: Any) -> None:
        super().__init__(group, num_experts, *args, **options)
        if self.two_level is not None:
            raise ValueError(
                "MoE: ep_levels: expected None with transport='symmetric_memory', got TwoLevel: it goes straight to "
                "each rank"
            )
        if self.world_size > MOST_RANKS:
            raise ValueError(
                f"MoE: ep_group: expected at most {MOST_RANKS} ranks with transport='symmetric_memory', got "
                f"{self.world_size}"
            )
        self._buffers = SymmetricBuffers.of(group)

    def _counted(self, counting: Counting, x: Tensor, chosen: Tensor) -> Any:
        """As :meth:`AllToAllDispatcher._counted`; the room that all agree on is kept where hops keep their counts."""
        sent, received, *others = super()._counted(counting, x, chosen)
        most = torch.tensor([max(sum(sent), sum(received))], device=x.device)
        all_reduce(most, "room for rows", self.group, op=dist.ReduceOp.MAX)
        counting.held = [[int(most)]]
        return sent, received, *others

    def _exchange(
        self,
        send_counts: Sequence[int],
        recv_counts: Sequence[int],
        held_counts: Sequence[int],
        what: str,
        *,
        back: bool = False,
    ) -> RowExchange:
        """Through the buffers. In the static mode, too, ``held_counts`` add up to the room on every rank."""
        return SymmetricExchange(send_counts, recv_counts, self._buffers, sum(held_counts), what)


class SymmetricExchange(Exchange):
    """:class:`Exchange` through symmetric memory.

    Args:
        send_counts, recv_counts, what, room: as there.
        buffers: those of the group.
        most_rows: the most rows that any rank sends, or receives, in this exchange; the same number on all of them.
    """

    def __init__(
        self,
        send_counts: Sequence[int],
        recv_counts: Sequence[int],
        buffers: SymmetricBuffers,
        most_rows: int,
        what: str = "rows",
        room: int | None = None,
    ) -> None:
        super().__init__(send_counts, recv_counts, buffers.group, what, room)
        self.buffers, self.most_rows = buffers, most_rows

    def reversed(self, room: int | None = None) -> SymmetricExchange:
        """The same with sender and receiver exchanged; see :class:`dmoe.parallel.collectives.RowExchange`."""
        what = f"gradients of {self.what}"
        return SymmetricExchange(self.recv_counts, self.send_counts, self.buffers, self.most_rows, what, room)

    def launch(self, x: Tensor) -> Tensor:
        """A tensor that will be filled; see :class:`dmoe.parallel.collectives.Halves`."""
        check_rows(x, self)
        arriving = sum(self.recv_counts)
        received = x.new_empty(self.num_rows, x.shape[1])
        received[arriving:].zero_()
        rows, room = as_bytes(x[: sum(self.send_counts)]), received[:arriving].view(torch.uint8)
        self._work = self._explained(lambda: self.buffers.send(rows, self.send_counts, room, self.most_rows))
        return received


class SymmetricBuffers:
    """Symmetric memory of a group, which all its layers share; every rank makes, and grows, its own at the same time.

    There are two buffers to send from, and two for splits, taken in turns: others may still read one while the next
    exchange fills the other, and when that one's barrier is passed, nobody does any more.

    Args:
        group: the ranks.

    Raises:
        RuntimeError: this torch has no such operation, or no NVSHMEM.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self.group, self.num_ranks = group, dist.get_world_size(group)
        missing = None
        if not hasattr(torch.ops.symm_mem, "all_to_all_vdev_2d"):
            missing = f"all_to_all_vdev_2d in torch {torch.__version__}"
        elif not _symmetric_memory().is_nvshmem_available():
            missing = "NVSHMEM"
        if missing is not None:
            raise RuntimeError(
                f"MoE: transport: expected 'all_to_all' without {missing}, which 'symmetric_memory' needs, got "
                "'symmetric_memory'"
            )
        self._sent: list[Tensor] = []
        self._splits: list[tuple[Tensor, Tensor]] = []
        self._received: Tensor | None = None
        self._turn = 0

    @classmethod
    def of(cls, group: ProcessGroup) -> SymmetricBuffers:
        """Those of a group; they are made anew when the last dispatcher that had them is gone."""
        found = _BY_GROUP.get(group)
        if found is None:
            found = _BY_GROUP[group] = cls(group)
        return found

    def send(self, rows: Tensor, counts: Sequence[int], received: Tensor, most_rows: int) -> _UnderWay:
        """Begin to send rows.

        Args:
            rows: ``(S, B)`` uint8, those for rank 0 first.
            counts: rows for each rank.
            received: ``(R, B)`` uint8, is filled.
            most_rows: see :class:`SymmetricExchange`.
        """
        width, device = rows.shape[1], rows.device
        self._grow(max(most_rows, 1) * width, device)
        self._turn = 1 - self._turn
        capacity = self._sent[0].numel() // width
        sent, arriving = (
            flat[: capacity * width].view(capacity, width) for flat in (self._sent[self._turn], self._received_buffer)
        )
        splits, arriving_splits = self._splits[self._turn]
        side = _side_stream(device) if device.type == "cuda" else None
        if side is not None:
            side.wait_stream(torch.cuda.current_stream(device))
        with contextlib.nullcontext() if side is None else torch.cuda.stream(side):
            sent[: len(rows)].copy_(rows)
            host = torch.tensor(counts, dtype=torch.int64, device="cpu")
            splits.copy_(host.pin_memory() if side is not None else host, non_blocking=True)
            torch.ops.symm_mem.all_to_all_vdev_2d(sent, arriving, splits, arriving_splits, self.group.group_name)
            received.copy_(arriving[: len(received)])
            if side is None:
                return _UnderWay(None)
            for tensor in (rows, received):
                tensor.record_stream(side)
            return _UnderWay(side.record_event())

    @property
    def _received_buffer(self) -> Tensor:
        assert self._received is not None
        return self._received

    def _grow(self, size: int, device: torch.device) -> None:
        """Room for so many bytes, the same on every rank."""
        if self._received is not None and self._received.numel() >= size and self._received.device == device:
            return
        if self._received is None:
            symmetric = _symmetric_memory()
            if device.type == "cuda" and symmetric.get_backend(device) != "NVSHMEM":
                raise RuntimeError(
                    "MoE: transport: expected torch.distributed._symmetric_memory.set_backend('NVSHMEM') before the "
                    f"first forward with 'symmetric_memory', got the backend {symmetric.get_backend(device)!r}"
                )
        elif device.type == "cuda":
            torch.cuda.synchronize(device)
        if self._received is not None:  # nobody reads the old ones any more
            explained(functools.partial(dist.barrier, group=self.group), "waiting for larger buffers", self.group)
        self._sent, self._received, size = [], None, size + size // 4  # so that a few rows more need no others
        self._sent = [self._shared(size, dtype=torch.uint8, device=device) for _ in range(2)]
        self._received = self._shared(size, dtype=torch.uint8, device=device)
        if not self._splits or self._splits[0][0].device != device:
            of_splits: dict[str, Any] = {"dtype": torch.int64, "device": device}
            ranks = self.num_ranks
            self._splits = [(self._shared(ranks, **of_splits), self._shared(2, ranks, **of_splits)) for _ in range(2)]

    def _shared(self, *shape: int, **of: Any) -> Tensor:
        """A tensor that the other ranks know of."""
        tensor: Tensor = _symmetric_memory().empty(*shape, **of)
        call = functools.partial(_symmetric_memory().rendezvous, tensor, self.group)
        explained(call, "the rendezvous of symmetric memory", self.group)
        return tensor


class _UnderWay:
    """What ``Work`` of torch.distributed is elsewhere."""

    def __init__(self, event: Any) -> None:
        self._event = event

    def wait(self) -> None:
        """Let the current stream wait; the host does not."""
        if self._event is not None:
            self._event.wait()


_BY_GROUP: WeakValueDictionary[Any, SymmetricBuffers] = WeakValueDictionary()


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all exchanges, which thereby keep their order."""
    return torch.cuda.Stream(device)


def _symmetric_memory() -> Any:
    import torch.distributed._symmetric_memory as symmetric  # when it is used: it imports much

    return symmetric
