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

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Exchange:
    """One all-to-all of rows. All ranks of the group must start their exchanges in the same order.

    Args:
        send_counts: rows for each rank of the group: the first ``send_counts[0]`` rows of the input go to rank 0, and
            so on.
        recv_counts: rows from each rank; they arrive in the order of the ranks.
        group: the ranks.
        what: a name for the rows in error messages.
    """

    def __init__(
        self, send_counts: Sequence[int], recv_counts: Sequence[int], group: ProcessGroup, what: str = "rows"
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
        self.group, self.what = group, what
        self._work: Any = None
        self._input_rows = 0
        self._gradient: tuple[Exchange, Tensor] | None = None  # under way between the halves of backward

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

    def start(self, x: Tensor) -> Tensor:
        """Begin to send the rows of x, and return the buffer where rows will arrive: only :meth:`finish` may read it.

        Args:
            x: ``(R, C)``, any dtype; R is at least the sum of ``send_counts``, and rows beyond that stay here.

        Raises:
            ValueError: x has too few rows, or is not a matrix.
            RuntimeError: the exchange failed.
        """
        if x.dim() != 2 or x.shape[0] < sum(self.send_counts):
            raise ValueError(
                f"all_to_all_rows: {self.what}: expected shape (R, C) with R >= {sum(self.send_counts)}, the sum of "
                f"send_counts, got {tuple(x.shape)}"
            )
        return _Start.apply(x, self)

    def finish(self, under_way: Tensor) -> Tensor:
        """Wait for the rows, ``(sum(recv_counts), C)``; on a GPU it is the stream that waits, not the host.

        Raises:
            RuntimeError: the exchange failed, because a rank died or did not come.
        """
        return _Finish.apply(under_way, self)

    def _launch(self, x: Tensor, num_rows: int) -> Tensor:
        """Start to send x, and return a buffer of ``num_rows`` rows: in front what arrives, then zeros."""
        received = x.new_empty(num_rows, x.shape[1])
        received[sum(self.recv_counts) :].zero_()
        self._work = self._explained(
            lambda: dist.all_to_all_single(
                received[: sum(self.recv_counts)].view(torch.uint8),
                _as_bytes(x[: sum(self.send_counts)]),
                list(self.recv_counts),
                list(self.send_counts),
                group=self.group,
                async_op=True,
            )
        )
        return received

    def _wait(self) -> None:
        work, self._work = self._work, None
        if work is not None:
            self._explained(work.wait)

    def _explained(self, call: Any) -> Any:
        return explained(call, f"the all-to-all of {self.what}", self.group)

    def _reversed(self) -> Exchange:
        return Exchange(self.recv_counts, self.send_counts, self.group, f"gradients of {self.what}")


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange, exchange._input_rows = exchange, x.shape[0]
        return exchange._launch(x, sum(exchange.recv_counts))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        exchange = ctx.exchange
        if exchange._gradient is None:  # to be differentiated again: in steps that autograd knows
            reverse = exchange._reversed()
            received = reverse.finish(reverse.start(grad))
            return torch.nn.functional.pad(received, (0, 0, 0, exchange._input_rows - received.shape[0])), None
        (reverse, received), exchange._gradient = exchange._gradient, None
        reverse._wait()
        return received, None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, under_way: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        exchange._wait()
        return under_way.view_as(under_way)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        exchange = ctx.exchange
        if not torch.is_grad_enabled():
            reverse = exchange._reversed()
            exchange._gradient = reverse, reverse._launch(grad, exchange._input_rows)
        return grad, None  # _Start does not read it: what it returns is under way, and has another shape


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


def _as_bytes(rows: Tensor) -> Tensor:
    """The rows' bytes, one after the other."""
    if not rows.is_contiguous() or rows.stride(1) != 1:  # one element may have any stride, and counts as contiguous
        rows = rows.clone(memory_format=torch.contiguous_format)
    return rows.view(torch.uint8)


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
