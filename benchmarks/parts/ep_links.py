"""Seconds of an all-to-all from its rows: a latency-bandwidth model of two kinds of links.

GPUs share a node of L with fast links inside; between the N = W / L nodes each GPU has a slower link of its own. Both
are full duplex, and work at the same time. An exchange of messages of ``b`` bytes takes, on one kind of link,

    messages * latency + max(bytes sent, bytes received) / bandwidth        of one rank,

the slower of the two kinds counts, and of the ranks the slowest. The messages of a rank leave one after the other, so
the latency is paid for each: pessimistic where a network card takes many at once, and why the figure can be edited.

- Flat: L - 1 messages inside and W - L between, at the same time.
- Two-level (Tutel's 2DH): first inside a node, rank l hands all rows for the l'-th rank of any node to its own node's
  l'-th rank; then between nodes, each rank talks to the ranks in its own place. L - 1 messages, then N - 1; rows cross
  the nodes' boundary as often as in the flat one, and (L - 1) / L of all rows cross a link inside.

- By node (DeepEP): first between nodes, each token once to each node of its experts, then inside the nodes, once to
  each rank. N - 1 messages, then L - 1, after an exchange of counts in each.

Results go back the way that tokens came. What no formula here knows: contention between switches, the time to gather
rows, kernels' launches, and the barrier that a slow rank is to others before the exchange begins.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DEFAULT_LINKS = Path(__file__).parent / "ep_links.json"


@dataclass(frozen=True)
class Link:
    """One direction of a GPU's link: bytes per second, seconds per message, and who says so."""

    name: str
    bandwidth: float
    latency: float
    source: str

    def seconds(self, messages: int, sent: Tensor, received: Tensor) -> Tensor:
        """Of each rank, ``(W,)``; bytes are ``(W,)``."""
        return messages * self.latency + torch.maximum(sent, received).double() / self.bandwidth


@dataclass(frozen=True)
class Machine:
    """Nodes of ``node`` GPUs, the links inside and between, and the FLOP/s that grouped products reach on one."""

    name: str
    node: int
    inside: Link
    between: Link
    flops: float
    source: str


def load_machine(path: Path = DEFAULT_LINKS) -> Machine:
    """Read a link table such as ``ep_links.json``.

    Raises:
        ValueError: a field is missing, is none, or not a positive number; the message names it.
    """
    try:
        table = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name}: expected JSON, got {error}") from None

    def field(holder: Any, name: str, where: str, kind: type) -> Any:
        value = holder.get(name) if isinstance(holder, dict) else None
        if kind is str:
            fine, expected = isinstance(value, str), "text"
        else:
            fine = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")
            fine, expected = fine and kind(value) == value, "a positive number" if kind is float else "an integer >= 1"
        if not fine:
            raise ValueError(f"{path.name}: {where}{name}: expected {expected}, got {value!r}")
        return kind(value)

    def link(name: str) -> Link:
        entry, where = table.get(name) if isinstance(table, dict) else None, f"{name}."
        return Link(
            field(entry, "name", where, str),
            field(entry, "gigabytes_per_second", where, float) * 1e9,
            field(entry, "microseconds_per_message", where, float) * 1e-6,
            field(entry, "source", where, str),
        )

    share = field(table, "share_of_teraflops", "", float)
    if share > 1:
        raise ValueError(f"{path.name}: share_of_teraflops: expected at most 1, got {share}")
    return Machine(
        field(table, "name", "", str),
        field(table, "gpus_per_node", "", int),
        link("inside"),
        link("between"),
        field(table, "teraflops", "", float) * 1e12 * share,
        field(table, "source", "", str),
    )


@dataclass(frozen=True)
class Phase:
    """One step of an exchange: rows of every rank on both kinds of link, ``(W,)`` each, and messages of one rank."""

    inside_sent: Tensor
    inside_received: Tensor
    between_sent: Tensor
    between_received: Tensor
    inside_messages: int
    between_messages: int

    def back(self) -> Phase:
        """The same the other way round."""
        return Phase(
            self.inside_received,
            self.inside_sent,
            self.between_received,
            self.between_sent,
            self.inside_messages,
            self.between_messages,
        )


def flat(rows: Tensor, node: int) -> list[Phase]:
    """Every rank to every other, all at once.

    Args:
        rows: ``(W, W)``, those from rank i to j; the diagonal is not sent.
        node: L; ranks ``[n L, (n + 1) L)`` are a node. More than W counts as W.

    Raises:
        ValueError: W is no multiple of L.
    """
    grid, size = _grid(rows, node)
    ranks = len(rows)
    same_node = torch.diagonal(grid.sum(3), dim1=0, dim2=2).T.flatten()  # (L, N) of each sender's own node
    from_node = torch.diagonal(grid.sum(1), dim1=0, dim2=1).T.flatten()
    sent, received, kept = rows.sum(1), rows.sum(0), rows.diagonal()
    return [
        Phase(same_node - kept, from_node - kept, sent - same_node, received - from_node, size - 1, ranks - size),
    ]


def two_level(rows: Tensor, node: int) -> list[Phase]:
    """Inside the nodes, then between them; arguments and errors as :func:`flat`."""
    grid, size = _grid(rows, node)
    nodes = len(rows) // size
    by_place = grid.sum(2)  # (N, L, L'): rows of a rank for each place, in whichever node
    own_place = torch.diagonal(by_place, dim1=1, dim2=2)  # (N, L)
    carried = grid.sum(1)  # (N, N', L'): what the rank in place l' of node n holds after the first step
    stays = torch.diagonal(carried, dim1=0, dim2=1).T  # (N, L')
    nothing = torch.zeros_like(own_place.flatten())
    return [
        Phase(
            (by_place.sum(2) - own_place).flatten(),
            (by_place.sum(1) - own_place).flatten(),
            nothing,
            nothing,
            size - 1,
            0,
        ),
        Phase(
            nothing,
            nothing,
            (carried.sum(1) - stays).flatten(),
            (carried.sum(0) - stays).flatten(),
            0,
            nodes - 1,
        ),
    ]


def by_node(rows: Tensor, to_nodes: Tensor, node: int) -> list[Phase]:
    """Between the nodes once per (token, node), to the rank in the sender's own place there, then inside to its ranks.

    Args:
        rows: ``(W, W)``, once per (token, rank).
        to_nodes: ``(W, N)``, once per (token, node), that from a rank's own node among them.
        node: L, as :func:`flat`.

    Raises:
        ValueError: as there.
    """
    grid, size = _grid(rows, node)
    nodes = len(rows) // size
    crossing = to_nodes.view(nodes, size, nodes)
    stays = torch.diagonal(crossing, dim1=0, dim2=2).T  # (N, L)
    carried = grid.sum(0).transpose(0, 1)  # (N', L, L'): what the rank in place l of node n' hands on to place l'
    kept = torch.diagonal(carried, dim1=1, dim2=2)
    nothing = torch.zeros_like(stays.flatten())
    sent, received = crossing.sum(2) - stays, crossing.sum(0).T - stays
    handed, taken = carried.sum(2) - kept, carried.sum(1) - kept
    return [
        Phase(nothing, nothing, sent.flatten(), received.flatten(), 0, nodes - 1),
        Phase(handed.flatten(), taken.flatten(), nothing, nothing, size - 1, 0),
    ]


def seconds(phases: list[Phase], row_bytes: float, machine: Machine) -> float:
    """Of an exchange, one step after the other, the slowest rank in each."""
    total = 0.0
    for phase in phases:
        inside = machine.inside.seconds(
            phase.inside_messages, phase.inside_sent * row_bytes, phase.inside_received * row_bytes
        )
        between = machine.between.seconds(
            phase.between_messages, phase.between_sent * row_bytes, phase.between_received * row_bytes
        )
        total += float(torch.maximum(inside, between).max())
    return total


def overlapped(
    before: float, dispatch: list[float], experts: list[float], combine: list[float], beside: float
) -> float:
    """Seconds of a layer in chunks: the link and the GPU each do one thing at a time, and both at once.

    Args:
        before: seconds of the exchange of counts, on the link.
        dispatch, experts, combine: of each chunk. The link takes all dispatches first, then each combine when its
            experts are done; the experts of a chunk wait for its dispatch and for the chunk before.
        beside: seconds of what needs no other rank (a shared expert), first on the GPU.
    """
    link, gpu, done = before, beside, []
    for there, compute in zip(dispatch, experts, strict=True):
        link += there
        gpu = max(gpu, link) + compute
        done.append(gpu)
    for back, ready in zip(combine, done, strict=True):
        link = max(link, ready) + back
    return max(link, gpu)


def _grid(rows: Tensor, node: int) -> tuple[Tensor, int]:
    """Rows as ``(N, L, N, L)``, and L."""
    ranks = len(rows)
    size = min(node, ranks)
    if rows.dim() != 2 or rows.shape[1] != ranks or node < 1 or ranks % size:
        raise ValueError(
            f"rows, node: expected a (W, W) matrix with W a multiple of the node's GPUs, got shape "
            f"{tuple(rows.shape)} and nodes of {node}"
        )
    return rows.view(ranks // size, size, ranks // size, size), size
