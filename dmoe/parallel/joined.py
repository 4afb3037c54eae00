"""Rows of tokens with their choices beside them, in one exchange of bytes: fewer messages, for copies on both sides.

Messages cost where ranks are many and tokens few. Apart, the choices come first, and the plan is made while the rows
are still under way; together they come as one.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from dmoe.parallel.collectives import RowExchange, as_bytes
from dmoe.parallel.wire import SCALE_BYTES, pack_rows, unpack_rows


class Arriving(Protocol):
    """Tokens under way. The choices are asked for first."""

    def advance(self) -> None:
        """Wait for the first of several hops, and begin the next."""
        ...

    def choices(self) -> Tensor:
        """Wait for the choices and their weights, ``(R', 2 K)``."""
        ...

    def rows(self) -> Tensor:
        """Wait for the tokens, ``(R', H)``."""
        ...


class Apart:
    """Choices and rows in two exchanges, each with what its ``start`` returned."""

    def __init__(self, choices: tuple[RowExchange, Tensor], rows: tuple[RowExchange, Tensor]) -> None:
        self._choices, self._rows = choices, rows

    def advance(self) -> None:
        """See :class:`Arriving`."""
        self._choices, self._rows = (
            (exchange, exchange.advance(under_way)) for exchange, under_way in (self._choices, self._rows)
        )

    def choices(self) -> Tensor:
        """See :class:`Arriving`."""
        exchange, under_way = self._choices
        return exchange.finish(under_way)

    def rows(self) -> Tensor:
        """See :class:`Arriving`."""
        exchange, under_way = self._rows
        return exchange.finish(under_way)


class Joined:
    """Choices and rows in one exchange, which starts at once.

    Args:
        x: ``(R, H)``.
        chosen: K gate weights and K ids, ``(R, 2 K)``; their gradient is that of the first K.
        carrier: how rows travel.
        kind: ``"fp8"`` or ``"int8"`` for x; None sends it as it is. See :mod:`dmoe.parallel.wire`.
        narrow_gradients: whether x's gradient goes back like that, too.
    """

    def __init__(
        self, x: Tensor, chosen: Tensor, carrier: RowExchange, kind: str | None, narrow_gradients: bool
    ) -> None:
        self._exchange = _JoinedExchange(carrier, kind, narrow_gradients)
        self._under_way = _Start.apply(x, chosen, self._exchange)
        self._x: Tensor | None = None

    def advance(self) -> None:
        """See :class:`Arriving`."""
        self._exchange.advance()

    def choices(self) -> Tensor:
        """See :class:`Arriving`."""
        self._x, chosen = _Finish.apply(*self._under_way, self._exchange)
        return chosen

    def rows(self) -> Tensor:
        """See :class:`Arriving`."""
        assert self._x is not None
        return self._x


class _JoinedExchange:
    """The exchange itself, without autograd, and what its backward has under way."""

    def __init__(self, carrier: RowExchange, kind: str | None, narrow_gradients: bool) -> None:
        self.carrier, self.kind, self.narrow_gradients = carrier, kind, narrow_gradients
        self.input_rows, self.needs = 0, (False, False)
        self.gradient: tuple[_JoinedExchange, tuple[Tensor | None, Tensor | None]] | None = None
        self._bytes: Tensor | None = None

    def launch(self, x: Tensor | None, chosen: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Begin; what is None does not travel. Placeholders without memory, in the results' shapes."""
        given = [] if x is None else [as_bytes(x) if self.kind is None else pack_rows(x, self.kind)]
        given += [] if chosen is None else [as_bytes(chosen)]
        self._bytes = self.carrier.start(torch.cat(given, 1))
        rows = self.carrier.num_rows
        placeholders = (None if t is None else t.new_zeros(()).expand(rows, t.shape[1]) for t in (x, chosen))
        return next(placeholders), next(placeholders)

    def advance(self) -> None:
        """Wait for the first of several hops, and begin the next."""
        assert self._bytes is not None
        with torch.no_grad():
            self._bytes = self.carrier.advance(self._bytes)

    def land(self, x: Tensor | None, chosen: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Wait; x and chosen are the placeholders."""
        assert self._bytes is not None
        arrived, self._bytes = self.carrier.finish(self._bytes), None
        width = 0
        if x is not None:
            width = x.shape[1] + SCALE_BYTES if self.kind is not None else x.shape[1] * x.element_size()
            part = arrived[:, :width]
            x = _numbers(part, x.dtype) if self.kind is None else unpack_rows(part, self.kind, x.dtype)
        return x, None if chosen is None else _numbers(arrived[:, width:], chosen.dtype)

    def backward(self, grad_x: Tensor | None, grad_chosen: Tensor | None) -> _JoinedExchange:
        """The way of the gradients, begun: what is None needs none, on no rank."""
        kind = self.kind if self.narrow_gradients else None
        reverse = _JoinedExchange(self.carrier.reversed(self.input_rows), kind, self.narrow_gradients)
        weights = None if grad_chosen is None else grad_chosen[:, : grad_chosen.shape[1] // 2]
        self.gradient = reverse, reverse.launch(grad_x, weights)
        return reverse


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, chosen: Tensor, exchange: _JoinedExchange) -> tuple[Any, ...]:
        ctx.exchange, exchange.input_rows = exchange, x.shape[0]
        exchange.needs = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        return exchange.launch(x[: sum(exchange.carrier.send_counts)], chosen[: sum(exchange.carrier.send_counts)])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *placeholders: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        assert ctx.exchange.gradient is not None
        (reverse, under_way), ctx.exchange.gradient = ctx.exchange.gradient, None
        grad_x, weights = reverse.land(*under_way)
        return grad_x, None if weights is None else torch.cat([weights, torch.zeros_like(weights)], 1), None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, chosen: Tensor, exchange: _JoinedExchange) -> tuple[Any, ...]:
        ctx.exchange = exchange
        landed = exchange.land(x, chosen)
        ctx.mark_non_differentiable(*(part for part, need in zip(landed, exchange.needs, strict=True) if not need))
        return landed

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_x: Tensor, grad_chosen: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        needs = ctx.exchange.needs
        ctx.exchange.backward(grad_x if needs[0] else None, grad_chosen if needs[1] else None)
        return grad_x, grad_chosen, None  # which _Start does not read


def _numbers(part: Tensor, dtype: torch.dtype) -> Tensor:
    return part.clone(memory_format=torch.contiguous_format).view(dtype)
