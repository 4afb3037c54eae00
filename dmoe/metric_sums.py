"""Metrics of several forwards, and of several ranks, as those of one: the only place where they are added up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from dmoe.metrics import RoutingMetrics

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def num_ranks(group: ProcessGroup | None) -> int:
    """Ranks of a group (None: all of them); 1 where there is no ``torch.distributed``."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


@torch.no_grad()
def add_forwards(forwards: Sequence[RoutingMetrics]) -> RoutingMetrics:
    """One layer's forwards as one: counts and bytes summed, the entropy's mean weighted by their assignments.

    Args:
        forwards: at least one. One alone is returned as it is; of several, what ranks' rows were is left out.
    """
    if len(forwards) == 1:
        return forwards[0]
    counts = torch.stack([torch.stack([each.tokens_per_expert, each.kept_per_expert]) for each in forwards]).long()
    weights = counts[:, 0].sum(1).double()
    entropy = torch.stack([each.entropy for each in forwards]).double()
    tokens, kept = counts.sum(0)
    sent = [each.bytes_sent for each in forwards]
    naive = [each.naive_bytes_sent for each in forwards]
    lost = [each.rows_dropped for each in forwards]
    return RoutingMetrics(
        tokens,
        kept,
        (entropy * weights).sum() / weights.sum().clamp(min=1),
        None if None in sent else sum(number for number in sent if number is not None),
        None if None in naive else sum(number for number in naive if number is not None),
        None if any(number is None for number in lost) else torch.stack([n for n in lost if n is not None]).sum(),
    )


@torch.no_grad()
def add_ranks(
    metrics: Mapping[str, RoutingMetrics],
    group: ProcessGroup | None,
    beside: Tensor | None = None,
    *,
    to_host: bool = False,
) -> tuple[dict[str, RoutingMetrics], Tensor]:
    """Metrics over all ranks of a group, with at most one all-reduce.

    Args:
        metrics: by layer name, the same layers on every rank.
        group: ``torch.distributed`` ranks; None is all of them.
        beside: ``(N,)`` float64 to be summed in the same all-reduce.
        to_host: hand back tensors on the CPU, all of which came there in one copy; the host waits for it.

    Returns:
        By layer name: counts and bytes summed (scalar int64 tensors; None where the layer counts none), the entropy's
        mean over ranks weighted by their assignments; and ``beside``'s sum, ``(N,)``.
    """
    several, layers = num_ranks(group) > 1, list(metrics.values())
    pieces = [] if not layers else _packed(layers, weighed=several)
    home = pieces[0].device if pieces else None
    pieces += [] if beside is None else [beside if home is None else beside.to(home)]
    if not pieces:
        return {}, torch.empty(0, dtype=torch.float64, device="cpu")
    everything = torch.cat(pieces)
    if several:
        dist.all_reduce(everything, group=group)
    everything = everything.cpu() if to_host else everything
    parts = everything.split([len(piece) for piece in pieces])
    rest = everything[:0] if beside is None else parts[-1]
    if not layers:
        return {}, rest
    experts = [len(each.tokens_per_expert) for each in layers]
    tokens, kept = (part.split(experts) for part in parts[0].long().split(sum(experts)))
    entropy, lost, sent, naive = parts[1].view(4, -1)
    if several:
        entropy = entropy / torch.stack([each.sum() for each in tokens]).clamp(min=1)
    known = (~parts[1].view(4, -1).isnan()).tolist() if to_host else [[True] * len(layers)] * 4
    added = {}
    for place, (name, each) in enumerate(metrics.items()):
        added[name] = RoutingMetrics(
            tokens[place],
            kept[place],
            entropy[place].to(each.entropy.dtype),
            sent[place].long() if each.bytes_sent is not None and known[2][place] else None,
            naive[place].long() if each.naive_bytes_sent is not None and known[3][place] else None,
            None if each.rows_dropped is None else lost[place].long(),
        )
    return added, rest


def _packed(layers: Sequence[RoutingMetrics], *, weighed: bool) -> list[Tensor]:
    """All counts, ``(2 * sum of E,)``, and four numbers of each layer, ``(4 * L,)``: float64, exact up to 2**53.

    Args:
        layers: L layers' metrics.
        weighed: times the layer's assignments, an entropy can be summed; without it is kept to the last bit.
    """
    home = layers[0].tokens_per_expert.device
    tokens = [each.tokens_per_expert.to(home) for each in layers]
    counts = torch.cat([*tokens, *(each.kept_per_expert.to(home) for each in layers)]).double()
    entropy = torch.stack([each.entropy.to(home, torch.float64) for each in layers])
    if weighed:
        entropy = entropy * torch.stack([each.sum() for each in tokens])
    lost = [entropy.new_zeros(()) if n is None else n.to(home, torch.float64) for n in (e.rows_dropped for e in layers)]
    traffic = [*(each.bytes_sent for each in layers), *(each.naive_bytes_sent for each in layers)]
    numbers = [float("nan") if number is None else float(number) for number in traffic]
    own = torch.tensor(numbers, dtype=torch.float64, device="cpu").to(home, non_blocking=True)
    return [counts, torch.cat([entropy, torch.stack(lost), own])]
