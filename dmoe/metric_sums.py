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
    several = num_ranks(group) > 1
    pieces: list[Tensor] = []
    for each in metrics.values():
        counts = torch.stack([each.tokens_per_expert, each.kept_per_expert]).double()  # exact up to 2**53
        traffic = [each.bytes_sent, each.naive_bytes_sent]
        none = [float("nan") if number is None else float(number) for number in traffic]
        own = torch.tensor(none, dtype=torch.float64, device="cpu").to(counts.device, non_blocking=True)
        lost = counts.new_zeros(1) if each.rows_dropped is None else each.rows_dropped.double().view(1)
        entropy = each.entropy.double()
        entropy = entropy * counts[0].sum() if several else entropy  # alone it is handed back to the last bit
        pieces += [counts.flatten(), entropy.view(1), lost, own]
    if beside is not None:
        pieces.append(beside)
    if not pieces:
        return {}, torch.empty(0, dtype=torch.float64, device="cpu")
    everything = torch.cat([piece.to(pieces[0].device) for piece in pieces])
    if several:
        dist.all_reduce(everything, group=group)
    everything = everything.cpu() if to_host else everything
    added, position = {}, 0
    for name, each in metrics.items():
        experts = each.tokens_per_expert.shape[0]
        part = everything[position : position + 2 * experts + 4]
        position += 2 * experts + 4
        tokens, kept = (counts.long() for counts in part[: 2 * experts].view(2, experts))
        entropy = part[-4] / part[:experts].sum().clamp(min=1) if several else part[-4]
        sent, naive = (
            None if here is None or (to_host and total.isnan()) else total.long()
            for here, total in zip((each.bytes_sent, each.naive_bytes_sent), part[-2:], strict=True)
        )
        dropped = None if each.rows_dropped is None else part[-3].long()
        added[name] = RoutingMetrics(tokens, kept, entropy.to(each.entropy.dtype), sent, naive, dropped)
    return added, everything[position:]
