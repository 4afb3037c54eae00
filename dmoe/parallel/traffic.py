"""What one forward puts on the wire, in rows and bytes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Hop:
    """One of the all-to-alls in a row that bring rows to their rank; counts as in :class:`Traffic`.

    Attributes:
        others: other ranks of the hop's group: messages in each exchange of this rank, empty ones included.
        rows_there: rows that this rank sends to others on the way to the experts: its own, and those that it hands on.
        rows_back: results that it sends to others on the way back.
    """

    others: int
    rows_there: int
    rows_back: int


@dataclass(frozen=True)
class Traffic:
    """What one forward put on the wire, from this rank to others and back; all counts are Python integers.

    Attributes:
        rows_sent: token rows that this rank sent to other ranks.
        rows_kept: those it sent to itself, which cross no wire.
        rows_received: those that came from other ranks; as many results went back.
        naive_rows_sent, naive_rows_kept, naive_rows_received: the same with one row for each choice of each token (and
            for each rank that holds a slice of the chosen expert); None in the static mode, where nobody has counted.
        row_bytes: bytes of one row of x in its own dtype, and of one result.
        choice_bytes: bytes of one row's gate weights and expert ids.
        count_bytes: bytes of counts sent to other ranks.
        wire_row_bytes: bytes of one row of x on its way there; None: ``row_bytes``.
        tp_rows_sent, tp_rows_received: rows of the step between tensor-parallel ranks, which travel in their own dtype.
        joined: whether rows and choices were one exchange.
        hops: those of the way there, each of which is gone back; empty: one, straight to each rank.
    """

    rows_sent: int
    rows_kept: int
    rows_received: int
    naive_rows_sent: int | None
    naive_rows_kept: int | None
    naive_rows_received: int | None
    row_bytes: int
    choice_bytes: int
    count_bytes: int
    wire_row_bytes: int | None = None
    hops: tuple[Hop, ...] = ()
    joined: bool = False
    tp_rows_sent: int = 0
    tp_rows_received: int = 0

    @property
    def bytes_sent(self) -> int:
        """Bytes that this rank sent to others in forward: rows with their choices, results, and counts.

        Over more hops than one, what it handed on for others is among them.
        """
        wire_row_bytes = self.row_bytes if self.wire_row_bytes is None else self.wire_row_bytes
        there, back = self.rows_sent, self.rows_received
        if self.hops:
            there, back = sum(hop.rows_there for hop in self.hops), sum(hop.rows_back for hop in self.hops)
        there_bytes = there * (wire_row_bytes + self.choice_bytes)
        there_bytes += self.tp_rows_sent * (self.row_bytes + self.choice_bytes)
        return there_bytes + (back + self.tp_rows_received) * self.row_bytes + self.count_bytes

    @property
    def messages_per_exchange(self) -> int | None:
        """Messages from this rank to others in each exchange (counts, choices, rows, results) but tensor-parallel ones.

        None if unknown.
        """
        return sum(hop.others for hop in self.hops) if self.hops else None

    @property
    def messages(self) -> int | None:
        """Those of a forward: three exchanges where choices travel with the rows, four where they do not.

        In the static mode, where ``count_bytes`` is 0, one less. None if unknown.
        """
        each = self.messages_per_exchange
        exchanges = (1 if self.count_bytes else 0) + (1 if self.joined else 2) + 1
        return None if each is None else exchanges * each

    @property
    def naive_bytes_sent(self) -> int | None:
        """Bytes of rows and results alone, had each choice sent a whole copy (whose weight can then stay at home)."""
        if self.naive_rows_sent is None or self.naive_rows_received is None:
            return None
        return (self.naive_rows_sent + self.naive_rows_received) * self.row_bytes
