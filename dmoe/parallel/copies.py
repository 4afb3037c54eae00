"""Experts' weights to ranks that host copies of them for one forward, and the copies' gradients home.

::

    own weights --+--> experts that live here            (their gradients)  --+--> sum --> the parameters' gradients
                  +--> all-to-all --> copies hosted here --> all-to-all home --+

Weights travel behind the tokens, while the experts that live here compute. In backward the copies come first, so that
their gradients are on the way home while all else is computed. An expert's gradient is its owner's, to which the sum of
the copies' is added, these in the order of the ranks that hosted them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from dmoe.expert_weights import F_DIM, ExpertWeights
from dmoe.ops._checks import autocast_is_on
from dmoe.parallel.collectives import Exchange, outside_graphs, tied

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Copies:
    """Which experts this rank lends, and hosts, in one forward.

    Args:
        sent: this rank's experts that go to others, counted among its own, those for rank 0 first: a list; or, in the
            static mode, where every rank is sent the same and the host does not know which, ``(n,)`` int64 on the
            weights' device.
        send_counts: of these for each rank.
        recv_counts: copies that come from each rank.
        group: the ranks.

    Attributes:
        bytes_sent: bytes of weights that this rank sent to others, once they are on their way.
    """

    def __init__(
        self, sent: Sequence[int] | Tensor, send_counts: Sequence[int], recv_counts: Sequence[int], group: ProcessGroup
    ) -> None:
        self.sent, self.group, self.bytes_sent = sent, group, 0
        self.send_counts, self.recv_counts = tuple(send_counts), tuple(recv_counts)

    @classmethod
    def of_slots(
        cls, slots: Sequence[Sequence[int]], num_local: int, rank: int, shards: int, group: ProcessGroup
    ) -> Copies | None:
        """From the plan's slots, which the host has read; None where no rank hosts anything.

        Args:
            slots: the experts that each owner hosts, ``(O, C)``, in ascending order; E or more for none.
            num_local: E / O.
            rank: of this process in ``group``, which has ``O * shards`` ranks.
            shards: ranks in a row that share an owner's experts; a copy of a slice goes to who has that slice.
            group: the ranks.
        """
        none, (me, shard) = num_local * len(slots), divmod(rank, shards)
        if all(expert >= none for hosted in slots for expert in hosted):
            return None
        sent = [[expert % num_local for expert in hosted if expert // num_local == me] for hosted in slots]
        received = [sum(expert // num_local == owner for expert in slots[me]) for owner in range(len(slots))]

        def by_rank(counts: Sequence[int]) -> list[int]:
            return [counts[r // shards] if r % shards == shard else 0 for r in range(len(slots) * shards)]

        counts = by_rank([len(one) for one in sent]), by_rank(received)
        return cls([expert for one in sent for expert in one], *counts, group)

    @classmethod
    def static(cls, lent: Tensor, rank: int, shards: int, group: ProcessGroup) -> Copies:
        """Every owner's hottest experts to every owner.

        Args:
            lent: this rank's, counted among its own, ``(c,)`` int64.
            rank, shards, group: see :meth:`of_slots`.
        """
        ranks = dist.get_world_size(group)
        counts = [lent.shape[0] if r % shards == rank % shards else 0 for r in range(ranks)]
        return cls(lent.repeat(ranks // shards), counts, counts, group)

    @property
    def num_hosted(self) -> int:
        """Copies that come to this rank."""
        return sum(self.recv_counts)

    def sent_on(self, device: torch.device) -> Tensor:
        """:attr:`sent` as a tensor."""
        return self.sent if isinstance(self.sent, Tensor) else _indices(self.sent, device)

    def summed(self, grads: Tensor) -> tuple[Tensor, Tensor]:
        """Experts that were lent, each once, and the sums of their copies' gradients in the order of ranks.

        Adding each expert once leaves nothing to chance on a GPU, where additions to one place have no order.

        Args:
            grads: of the copies in the order of :attr:`sent`, ``(n, ...)``.
        """
        if isinstance(self.sent, Tensor):
            by_rank = grads.unflatten(0, (sum(count > 0 for count in self.send_counts), -1))
            return self.sent[: by_rank.shape[1]], by_rank.sum(0)
        places: dict[int, list[int]] = {}
        for place, expert in enumerate(self.sent):
            places.setdefault(expert, []).append(place)
        sums = [grads[where].sum(0) if len(where) > 1 else grads[where[0]] for where in places.values()]
        return _indices(list(places), grads.device), torch.stack(sums) if sums else grads

    @outside_graphs
    def start(
        self, weights: ExpertWeights, main_grads: Sequence[Tensor | None] | None = None, x: Tensor | None = None
    ) -> Lent:
        """Begin to send the weights that are lent.

        Args:
            weights: of the experts that live here, tensors.
            main_grads: buffers that the gradients of up and down projection are added to, instead of being handed on.
            x: the tokens, if the weights' gradients have to be there before the tokens' leave: FSDP takes them then.

        Raises:
            RuntimeError: an exchange failed.
        """
        names = [name for name in F_DIM if getattr(weights, name) is not None]
        given = [getattr(weights, name) for name in names]
        buffers = dict(zip(("up_proj", "down_proj"), main_grads or (), strict=False))
        x, *shared = _Lend.apply(self, [buffers.get(name) for name in names], x, *given)
        own, rows = shared[: len(names)], shared[len(names) :]
        kind = weights.up_proj.device.type
        dtype = torch.get_autocast_dtype(kind) if autocast_is_on(kind) and weights.dtype == torch.float32 else None
        under_way = []
        self.bytes_sent = 0
        for name, tensor in zip(names, rows, strict=True):
            if dtype is not None:  # as the products would: the bits are the same, and half as many
                tensor = tensor.to(dtype)
            exchange = Exchange(self.send_counts, self.recv_counts, self.group, f"copies of experts ({name})")
            self.bytes_sent += exchange.rows_sent * tensor.shape[1] * tensor.element_size()
            under_way.append((exchange, exchange.start(tensor)))
        changed: dict[str, Any] = dict(zip(names, own, strict=True))
        return Lent(self, _replaced(weights, changed), x, tuple(names), tuple(under_way))


@dataclass(frozen=True)
class Lent:
    """Weights of which some are on their way to other ranks: for :meth:`finish`, and for that once.

    Attributes:
        copies: who lends what.
        weights: of the experts that live here, to compute with: their gradients meet the copies'.
        x: the tokens, if they were given.
        names: the fields of these weights that travel.
        under_way: the exchange of each, and the buffer that is being filled.
    """

    copies: Copies
    weights: ExpertWeights
    x: Tensor | None
    names: tuple[str, ...]
    under_way: tuple[tuple[Exchange, Tensor], ...]

    def deferred(self) -> Lent:
        """The same, whose own weights' gradients are computed where backward comes to this call."""
        return replace(self, weights=self.weights.deferred())

    @outside_graphs
    def finish(self, y: Tensor) -> tuple[Tensor, ExpertWeights | None]:
        """Wait for the copies that this rank hosts.

        Args:
            y: what the experts that live here made. Its backward will reach the exchange whatever becomes of the
                copies: other ranks wait there for their gradients.

        Returns:
            y, and the weights of the copies, None where none is hosted here.

        Raises:
            RuntimeError: an exchange failed.
        """
        arrived = tuple(exchange.finish(buffer) for exchange, buffer in self.under_way)
        hosted, y = self.copies.num_hosted, tied(y, *arrived)
        if not hosted:
            return y, None
        shapes = [getattr(self.weights, name).shape[1:] for name in self.names]
        fields = {n: rows.view(hosted, *shape) for n, rows, shape in zip(self.names, arrived, shapes, strict=True)}
        return y, _replaced(self.weights, fields)


def _replaced(weights: ExpertWeights, fields: dict[str, Any]) -> ExpertWeights:
    """Weights of other values, for whose gradients nobody waits in halves."""
    return ExpertWeights(**fields, gated=weights.gated)


class _Lend(torch.autograd.Function):
    """Weights as they are, and those that go to other ranks, a row each; gradients of both are added up."""

    @staticmethod
    def forward(
        ctx: Any, copies: Copies, buffers: Sequence[Tensor | None], x: Tensor | None, *weights: Tensor
    ) -> tuple[Tensor | None, ...]:
        ctx.copies, ctx.buffers = copies, buffers
        ctx.shapes = [weight.shape for weight in weights]
        ctx.set_materialize_grads(False)
        sent = copies.sent_on(weights[0].device)
        rows = [weight.index_select(0, sent).flatten(1) for weight in weights]
        return None if x is None else x.view_as(x), *(weight.view_as(weight) for weight in weights), *rows

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor | None, *grads: Tensor | None) -> tuple[Any, ...]:
        count = len(ctx.shapes)
        total: list[Tensor | None] = []
        for shape, buffer, own, lent in zip(ctx.shapes, ctx.buffers, grads[:count], grads[count:], strict=True):
            if lent is None:
                total.append(own)
                continue
            experts, sums = ctx.copies.summed(lent.view(len(lent), *shape[1:]))
            if buffer is not None:
                buffer.index_add_(0, experts, sums.to(buffer.dtype))
                total.append(own)
            elif own is None:
                total.append(sums.new_zeros(shape).index_add(0, experts, sums))
            elif torch.is_grad_enabled():  # to be differentiated again
                total.append(own.index_add(0, experts, sums))
            else:  # nobody else has it: it comes from the products' backward
                total.append(own.index_add_(0, experts, sums))
        return None, None, grad_x, *total


def _indices(numbers: Sequence[int], device: torch.device) -> Tensor:
    """Host's numbers on a device, without a wait."""
    there = torch.tensor(numbers, dtype=torch.int64, device="cpu")
    return there.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else there
