"""From what the layers' watches saw to one :class:`StepRecord`, with one all-reduce and one copy to the host."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from dmoe.metric_sums import add_forwards, add_ranks, num_ranks
from dmoe.metrics import RoutingMetrics
from dmoe.monitoring.layer_watch import LayerWatch
from dmoe.monitoring.records import LAYER_PARTS, LayerRecord

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_HOST = ("forwards", "tokens", "timed", *LAYER_PARTS)  # numbers of a layer that the host has
_DEVICE = ("squares", "logits", "similarity", "similar")  # and that its device has


def layer_records(
    watches: Mapping[str, LayerWatch],
    similarities: Mapping[str, Tensor],
    group: ProcessGroup | None,
    beside: Sequence[Tensor] = (),
) -> tuple[dict[str, LayerRecord], int, list[Tensor]]:
    """The layers that ran on any rank, over all ranks; the tokens of the layer that saw most; and what was beside.

    Args:
        watches: by layer name, the same on all ranks.
        similarities: of layers, in a step that measures them.
        group: the ranks.
        beside: more to be summed, ``(N,)`` float64 each, of the same lengths on all ranks.
    """
    ranks = num_ranks(group)
    here = dist.get_rank(group) if ranks > 1 else 0
    seconds = {name: watch.seconds() for name, watch in watches.items()}  # which waits for the step's work
    metrics = {name: _metrics_of(watch) for name, watch in watches.items()}
    home = next(iter(metrics.values())).tokens_per_expert.device
    host = [_host_numbers(watch, seconds[name]) for name, watch in watches.items()]
    device = [_device_numbers(watch, similarities.get(name), home) for name, watch in watches.items()]
    largest = torch.zeros(len(watches), ranks, dtype=torch.float64, device=home)  # a sum over ranks brings each its own
    largest[:, here] = torch.stack([each[-1] for each in device])
    parts = [
        torch.tensor(host, dtype=torch.float64, device="cpu").flatten().to(home, non_blocking=True),
        torch.stack([each[:-1] for each in device]).flatten(),
        largest.flatten(),
        *(each.to(home) for each in beside),
    ]
    added, rest = add_ranks(metrics, group, torch.cat(parts), to_host=True)
    host_sum, device_sum, largest, *others = rest.split([len(part) for part in parts])
    on_host = host_sum.view(len(watches), -1).tolist()
    on_device = device_sum.view(len(watches), -1).tolist()
    peaks = largest.view(len(watches), -1).amax(1).tolist()
    records, tokens = {}, 0
    for place, (name, layer) in enumerate(added.items()):
        numbers = dict(zip(_HOST + _DEVICE, on_host[place] + on_device[place], strict=True))
        if numbers["forwards"]:
            records[name] = _record(layer, numbers, peaks[place])
            top_k = watches[name].layer.config.top_k
            tokens = max(tokens, int(numbers["tokens"]) or sum(records[name].tokens_per_expert) // top_k)
    return records, tokens, others


def _metrics_of(watch: LayerWatch) -> RoutingMetrics:
    """All forwards as one; zeros for a layer that has not run here, and may have on other ranks."""
    if watch.metrics:
        return add_forwards(watch.metrics)
    weight = next(watch.layer.parameters())
    none = torch.zeros(watch.layer.config.num_experts, dtype=torch.int64, device=weight.device)
    return RoutingMetrics(none, none, torch.zeros((), device=weight.device), 0, 0)


def _host_numbers(watch: LayerWatch, seconds: Mapping[str, float]) -> list[float]:
    return [len(watch.metrics), watch.tokens, bool(seconds), *(seconds.get(part, 0.0) for part in LAYER_PARTS)]


def _device_numbers(watch: LayerWatch, similarity: Tensor | None, home: torch.device) -> Tensor:
    """``_DEVICE`` and the largest logit, ``(5,)`` float64."""
    sizes = [size.to(home) for size in watch.sizes]
    if len(sizes) == 1:
        total = sizes[0]
    elif sizes:
        several = torch.stack(sizes)
        total = torch.cat([several[:, :2].sum(0), several[:, 2:].amax(0)])
    else:
        total = torch.zeros(3, dtype=torch.float64, device=home)
    alike = total.new_zeros(2)
    if similarity is not None:
        alike = torch.stack([similarity.to(home), alike.new_ones(())])
    return torch.cat([total[:2], alike, total[2:]])


def _record(metrics: RoutingMetrics, numbers: Mapping[str, float], peak: float) -> LayerRecord:
    """A layer's record, of sums over ranks on the host."""
    logits, timed, similar = numbers["logits"], numbers["timed"], numbers["similar"]
    return LayerRecord(
        tokens_per_expert=tuple(metrics.tokens_per_expert.tolist()),
        kept_per_expert=tuple(metrics.kept_per_expert.tolist()),
        load=tuple(metrics.load.tolist()),
        entropy=float(metrics.entropy),
        dropped_share=float(metrics.dropped_share),
        dead_experts=int(metrics.dead_experts),
        router_logits_rms=math.sqrt(numbers["squares"] / logits) if logits else None,
        router_logits_max=peak if logits else None,
        expert_similarity=numbers["similarity"] / similar if similar else None,
        bytes_sent=None if metrics.bytes_sent is None else int(metrics.bytes_sent),
        seconds={part: numbers[part] / timed for part in LAYER_PARTS} if timed else {},
        forwards=int(numbers["forwards"]),
    )
