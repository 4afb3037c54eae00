"""Rows that travel as one byte per number: fp8 or int8 with a scale of its own for each row.

``pack_rows`` makes a row of H numbers H bytes and a float32 scale, in one message; ``unpack_rows`` gives the numbers
back, rounded. With normal data the error is 2.6% of a row's root mean square for fp8, and 0.6% (H = 64) to 0.9% (7,168)
for int8, which spreads its 255 steps evenly up to the largest number of the row, and so loses to fp8 where few numbers
are far larger than the others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmoe.ops.activation import accumulate_dtype
from dmoe.parallel.collectives import Exchange, Halves, RowExchange

# What a byte holds, and the largest number that it takes. Gradients travel in the same: e5m2, which has the range for
# gradients under one scale, would pay for it with twice the error, and here a scale for each row brings the range.
WIRE_DTYPES: dict[str, tuple[torch.dtype, float]] = {"fp8": (torch.float8_e4m3fn, 448.0), "int8": (torch.int8, 127.0)}
SCALE_BYTES = 4
_SMALLEST = torch.finfo(torch.float32).tiny


def check_wire_dtype(wire_dtype: str | None, wire_backward: bool) -> None:
    """Refuse, with a ValueError, what is no option of the wire."""
    if wire_dtype is not None and wire_dtype not in WIRE_DTYPES:
        raise ValueError(f"wire_dtype: expected None or one of {', '.join(map(repr, WIRE_DTYPES))}, got {wire_dtype!r}")
    if wire_backward and wire_dtype is None:
        raise ValueError("wire_backward: expected False without a wire_dtype, got True: there is nothing to narrow to")


def pack_rows(x: Tensor, kind: str) -> Tensor:
    """Every row as bytes: its numbers divided by the row's scale and rounded to nearest even, then the scale.

    The scale is the row's largest magnitude / 448 (fp8, ``float8_e4m3fn``) or / 127 (int8), in float32, and not below
    the smallest normal float32. A row that holds NaN or an infinity, or numbers that no float32 holds, has a scale of
    NaN or infinity, over which all its numbers are 0 or NaN: it arrives as NaN altogether.

    Args:
        x: ``(R, H)`` floating point, H >= 1.
        kind: ``"fp8"`` or ``"int8"``.

    Returns:
        ``(R, H + 4)`` uint8.

    Raises:
        ValueError: x is not such a matrix, or another kind.
    """
    check_wire_dtype(kind, False)
    if x.dim() != 2 or x.shape[1] == 0 or not x.is_floating_point():
        raise ValueError(
            f"pack_rows: x: expected floating point of shape (R, H) with H >= 1, got {x.dtype} of shape "
            f"{tuple(x.shape)}"
        )
    dtype, limit = WIRE_DTYPES[kind]
    wide = accumulate_dtype(x.dtype)
    largest = torch.linalg.vector_norm(x.detach(), float("inf"), dim=1, keepdim=True, dtype=wide)
    scale = (largest / limit).float().clamp_min(_SMALLEST)
    numbers = x.detach().to(wide) / scale
    if (
        not dtype.is_floating_point
    ):  # has no NaN, and needs none: the scale is one, or infinite, and both times 0 are NaN
        numbers = numbers.round().nan_to_num(0.0)
    return torch.cat([numbers.to(dtype).view(torch.uint8), scale.view(torch.uint8)], 1)


def unpack_rows(packed: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    """The numbers of :func:`pack_rows`; rows of zero bytes are zeros.

    Args:
        packed: ``(R, H + 4)`` uint8.
        kind: as they were packed.
        dtype: of the result.

    Returns:
        ``(R, H)`` of ``dtype``.

    Raises:
        ValueError: packed is not such a matrix, or another kind.
    """
    check_wire_dtype(kind, False)
    if packed.dim() != 2 or packed.shape[1] <= SCALE_BYTES or packed.dtype != torch.uint8:
        raise ValueError(
            f"unpack_rows: packed: expected uint8 of shape (R, H + {SCALE_BYTES}) with H >= 1, got {packed.dtype} of "
            f"shape {tuple(packed.shape)}"
        )
    wide = accumulate_dtype(dtype)
    numbers = packed[:, :-SCALE_BYTES].view(WIRE_DTYPES[kind][0]).to(wide)
    scale = packed[:, -SCALE_BYTES:].clone(memory_format=torch.contiguous_format).view(torch.float32)
    return (numbers * scale).to(dtype)


class NarrowExchange(Halves):
    """Packs rows, lets an exchange carry the bytes, and unpacks them; the rows that a rank keeps take part.

    Rounding counts as the identity in backward (straight through). The gradient goes back in its own dtype, or packed
    likewise.

    Args:
        carrier: how rows travel.
        kind: ``"fp8"`` or ``"int8"``.
        narrow_gradients: whether gradients are packed, too.
    """

    def __init__(self, carrier: RowExchange, kind: str, narrow_gradients: bool = False) -> None:
        self.carrier, self.kind, self.narrow_gradients = carrier, kind, narrow_gradients
        self._bytes: Tensor | None = None

    @property
    def send_counts(self) -> tuple[int, ...]:
        """Rows for each rank."""
        return self.carrier.send_counts

    @property
    def recv_counts(self) -> tuple[int, ...]:
        """Rows from each rank."""
        return self.carrier.recv_counts

    @property
    def num_rows(self) -> int:
        """Rows of the result."""
        return self.carrier.num_rows

    @property
    def hops(self) -> tuple[Exchange, ...]:
        """Those of the carrier."""
        return self.carrier.hops

    def reversed(self, room: int | None = None) -> RowExchange:
        """Rows of gradients; see :class:`dmoe.parallel.collectives.RowExchange`."""
        back = self.carrier.reversed(room)
        return NarrowExchange(back, self.kind, True) if self.narrow_gradients else back

    def launch(self, x: Tensor) -> Tensor:
        """A placeholder without memory: the bytes lie elsewhere; see :class:`dmoe.parallel.collectives.Halves`."""
        self._bytes = self.carrier.start(pack_rows(x, self.kind))
        return x.new_zeros(()).expand(self.num_rows, x.shape[1])

    def advance(self, under_way: Tensor) -> Tensor:
        """See :class:`dmoe.parallel.collectives.RowExchange`."""
        assert self._bytes is not None
        with torch.no_grad():
            self._bytes = self.carrier.advance(self._bytes)
        return under_way

    def land(self, under_way: Tensor) -> Tensor:
        """The rows, rounded; see :class:`dmoe.parallel.collectives.Halves`."""
        assert self._bytes is not None
        arrived, self._bytes = self.carrier.finish(self._bytes), None
        return unpack_rows(arrived, self.kind, under_way.dtype)
