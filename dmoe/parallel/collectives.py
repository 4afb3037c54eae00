"""Rows to and from other ranks: ``all_to_all_single`` with uneven splits, differentiable, and in two halves.

The gradient of an exchange is the exchange the other way round. Rows travel as bytes, so every dtype does on every
backend (gloo knows neither int16 nor float8). Between the two halves a caller may compute::

    exchange = Exchange(send_counts, recv_counts, group)
    under_way = exchange.start(x)
    ...                                   # anything that does not need the rows
    rows = exchange.finish(under_way)

In backward the reverse exchange starts where ``finish`` is reached and is awaited where ``start`` is, so whatever was
computed between the halves is differentiated while the gradients travel.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


# Of a function that talks to other ranks: what travels is in no compiled graph, for its buffers are being filled. The
# public torch.compiler.disable would import dynamo with dmoe, which takes seconds.
outside_graphs: Any = torch._disable_dynamo  # type: ignore[attr-defined]


class RowExchange(Protocol):
    """Rows to and from other ranks in two halves, whichever way they travel."""

    @property
    def send_counts(self) -> tuple[int, ...]:
        """Rows for each rank."""
        ...

    @property
    def recv_counts(self) -> tuple[int, ...]:
        """Rows from each rank."""
        ...

    @property
    def num_rows(self) -> int:
        """Rows of the result."""
        ...

    @property
    def hops(self) -> tuple[Exchange, ...]:
        """The all-to-alls that this is made of, in their order."""
        ...

    def start(self, x: Tensor) -> Tensor:
        """Begin to send the rows of x, ``(R, C)``; only :meth:`finish` may read what this returns."""
        ...

    def advance(self, under_way: Tensor) -> Tensor:
        """Wait for the first of several hops, and begin the next; then :meth:`finish` takes what this returns."""
        ...

    def finish(self, under_way: Tensor) -> Tensor:
        """Wait for the rows: those of rank 0 first."""
        ...

    def reversed(self, room: int | None = None) -> RowExchange:
        """The way of the gradients: every row back to where it came from, and zeros behind them up to ``room`` rows."""
        ...


class Halves(ABC):
    """Two halves of which autograd knows: the gradient is ``reversed()``, in its two halves."""

    _input_rows = 0
    _gradient: tuple[RowExchange, Tensor] | None = None  # under way between the halves of backward

    @abstractmethod
    def reversed(self, room: int | None = None) -> RowExchange:
        """See :class:`RowExchange`."""

    @abstractmethod
    def launch(self, x: Tensor) -> Tensor:
        """Begin to send x, and return a tensor of the result's shape and dtype; autograd is off."""

    @abstractmethod
    def land(self, under_way: Tensor) -> Tensor:
        """Wait, and return the result; autograd is off."""

    def start(self, x: Tensor) -> Tensor:
        """Begin to send the rows of x, and return a placeholder for those that come: only :meth:`finish` may read it.

        Args:
            x: ``(R, C)``; R is at least the sum of ``send_counts``, and rows beyond that stay here.

        Raises:
            ValueError: x has too few rows, or is not a matrix.
            RuntimeError: the exchange failed.
        """
        return _Start.apply(x, self)

    def advance(self, under_way: Tensor) -> Tensor:
        """``under_way``: of one hop, which is on its way."""
        return under_way

    def finish(self, under_way: Tensor) -> Tensor:
        """Wait for the rows, ``(sum(recv_counts), C)``; on a GPU it is the stream that waits, not the host.

        Raises:
            RuntimeError: the exchange failed, because a rank died or did not come.
        """
        return _Finish.apply(under_way, self)


class Exchange(Halves):
    """One all-to-all of rows, of any dtype. All ranks of the group must start their exchanges in the same order.

    Args:
        send_counts: rows for each rank of the group: the first ``send_counts[0]`` rows of the input go to rank 0, and
            so on.
        recv_counts: rows from each rank; they arrive in the order of the ranks.
        group: the ranks.
        what: a name for the rows in error messages.
        room: rows of the result, at least those that arrive: zeros behind them. None: no more than these.
    """

    def __init__(
        self,
        send_counts: Sequence[int],
        recv_counts: Sequence[int],
        group: ProcessGroup,
        what: str = "rows",
        room: int | None = None,
    ) -> None:
        ranks = dist.get_world_size(group)
        if len(send_counts) != ranks or len(recv_counts) != ranks:
            raise ValueError(
                f"all_to_all_rows: expected one count for each of {ranks} ranks, got {len(send_counts)} send_counts "
                f"and {len(recv_counts)} recv_counts"
            )
        if min(*send_counts, *recv_counts) < 0:
            raise ValueError(f"all_to_all_rows: expected counts of at least 0, got {send_counts} and {recv_counts}")
        self.send_counts, self.recv_counts = tuple(send_counts), tuple(recv_counts)
        self.group, self.what, self._room = group, what, room
        self._work: Any = None

    @property
    def num_rows(self) -> int:
        """Rows of the result."""
        return sum(self.recv_counts) if self._room is None else self._room

    @property
    def hops(self) -> tuple[Exchange, ...]:
        """Itself alone."""
        return (self,)

    @property
    def rows_sent(self) -> int:
        """Rows that leave this rank: its own share, which crosses no wire, is not counted."""
        return sum(self.send_counts) - self.rows_kept

    @property
    def rows_kept(self) -> int:
        """Rows that this rank sends to itself."""
        return self.send_counts[dist.get_rank(self.group)]

    @property
    def rows_received(self) -> int:
        """Rows that come from other ranks."""
        return sum(self.recv_counts) - self.recv_counts[dist.get_rank(self.group)]

    def reversed(self, room: int | None = None) -> Exchange:
        """The same with sender and receiver exchanged; see :class:`RowExchange`."""
        return Exchange(self.recv_counts, self.send_counts, self.group, f"gradients of {self.what}", room)

    def launch(self, x: Tensor) -> Tensor:
        """The buffer where rows will arrive; see :class:`Halves`."""
        check_rows(x, self)
        arriving = sum(self.recv_counts)
        received = x.new_empty(self.num_rows, x.shape[1])
        received[arriving:].zero_()
        self._work = self._explained(
            lambda: dist.all_to_all_single(
                received[:arriving].view(torch.uint8),
                as_bytes(x[: sum(self.send_counts)]),
                list(self.recv_counts),
                list(self.send_counts),
                group=self.group,
                async_op=True,
            )
        )
        return received

    def land(self, under_way: Tensor) -> Tensor:
        """That buffer, filled; see :class:`Halves`."""
        work, self._work = self._work, None
        self._explained(work.wait)
        return under_way.view_as(under_way)

    def _explained(self, call: Any) -> Any:
        return explained(call, f"the all-to-all of {self.what}", self.group)


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: Halves) -> Tensor:
        ctx.exchange, exchange._input_rows = exchange, x.shape[0] if x.dim() else 0
        return exchange.launch(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        exchange = ctx.exchange
        if exchange._gradient is None:  # to be differentiated again: in steps that autograd knows
            reverse = exchange.reversed(exchange._input_rows)
            return reverse.finish(reverse.start(grad)), None
        (reverse, under_way), exchange._gradient = exchange._gradient, None
        return reverse.finish(under_way), None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, under_way: Tensor, exchange: Halves) -> Tensor:
        ctx.exchange = exchange
        return exchange.land(under_way)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        exchange = ctx.exchange
        if not torch.is_grad_enabled():
            reverse = exchange.reversed(exchange._input_rows)
            exchange._gradient = reverse, reverse.start(grad)
        return grad, None  # _Start does not read it: what it returns is under way, and has another shape


def tied(y: Tensor, *others: Tensor) -> Tensor:
    """``y``, whose backward reaches the others, too, whatever lies between.

    A rank without a row may compute its (0, H) results from nothing. Its backward would then not come to the exchanges
    that brought the rows, where the other ranks wait for it.
    """
    return _Tied.apply(y, *others)


class _Tied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, *others: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (grad, *(None for _ in ctx.needs_input_grad[1:]))


def check_rows(x: Tensor, exchange: Any) -> None:
    """Refuse what cannot be sent, with a ValueError: no matrix, or too few rows."""
    if x.dim() != 2 or x.shape[0] < sum(exchange.send_counts):
        raise ValueError(
            f"all_to_all_rows: {exchange.what}: expected shape (R, C) with R >= {sum(exchange.send_counts)}, the sum "
            f"of send_counts, got {tuple(x.shape)}"
        )


def all_to_all_rows(
    x: Tensor, send_counts: Sequence[int], recv_counts: Sequence[int], group: ProcessGroup, what: str = "rows"
) -> Tensor:
    """Send rows to every rank of a group and return the rows that came; the gradient goes the other way round.

    Args:
        x: ``(R, C)``, any dtype; R is at least the sum of ``send_counts``, and rows beyond that stay here.
        send_counts, recv_counts, group, what: see :class:`Exchange`.

    Returns:
        ``(sum(recv_counts), C)``, the rows of rank 0 first.

    Raises:
        ValueError: counts or shapes that do not fit.
        RuntimeError: the exchange failed, because a rank died or did not come.
    """
    exchange = Exchange(send_counts, recv_counts, group, what)
    return exchange.finish(exchange.start(x))


def as_bytes(rows: Tensor) -> Tensor:
    """The rows' bytes, one after the other."""
    if not rows.is_contiguous() or rows.stride(1) != 1:  # one element may have any stride, and counts as contiguous
        rows = rows.clone(memory_format=torch.contiguous_format)
    return rows.view(torch.uint8)


def all_reduce(tensor: Tensor, what: str, *groups: ProcessGroup | None, op: Any = dist.ReduceOp.SUM) -> None:
    """Reduce over the ranks of a group, in place; or, one after the other, over the dimensions of a grid of ranks.

    Args:
        tensor: of one shape and dtype on all ranks.
        what: is reduced, for the error.
        *groups: of ranks; None is all of them.
        op: of ``torch.distributed.ReduceOp``.
    """
    for group in groups:
        explained(functools.partial(dist.all_reduce, tensor, op, group=group), f"the all-reduce of {what}", group)


# PyTorch 2.13's name for it, under which it does not warn.
_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"


def all_gather(received: Tensor, tensor: Tensor, what: str, group: ProcessGroup | None) -> None:
    """Every rank's tensor, of one shape, one after the other.

    Args:
        received: is filled, ``(W * n, ...)``.
        tensor: this rank's, ``(n, ...)``.
        what: is gathered, for the error.
        group: the ranks; None is all of them.
    """
    explained(functools.partial(getattr(dist, _GATHER), received, tensor, group=group), what, group)


def explained(call: Any, what: str, group: ProcessGroup | None) -> Any:
    """Run a collective call; what the backend says when it fails gets a sentence on where and why."""
    try:
        return call()
    except RuntimeError as error:  # torch.distributed's own errors are all of this kind
        raise RuntimeError(
            f"dmoe: {what} failed on rank {dist.get_rank(group)} of {dist.get_world_size(group)} of its "
            "group. Most likely another rank died, or did not reach this exchange within the group's "
            f"timeout: look for the first error in the logs of the others. The backend says: {error}"
        ) from error
