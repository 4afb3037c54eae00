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
from dmoe.monitoring.layer_watch import LayerWatch, Size
from dmoe.monitoring.records import LAYER_PARTS, LayerRecord

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_HOST = ("forwards", "tokens", "timed", *LAYER_PARTS)  # numbers of a layer that the host has


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
    ranks, layers = num_ranks(group), len(watches)
    here = dist.get_rank(group) if ranks > 1 else 0
    home = _home(list(watches.values()))
    metrics = {name: _metrics_of(watch, home) for name, watch in watches.items()}
    parts = [
        torch.tensor([_host_numbers(watch) for watch in watches.values()], dtype=torch.float64, device="cpu"),
        torch.zeros(layers, 2, dtype=torch.float64, device=home),
        *_logits(list(watches.values()), home, here, ranks),
        *beside,
    ]
    for place, name in enumerate(watches):
        if name in similarities:
            parts[1][place, 0], parts[1][place, 1] = similarities[name], 1
    pieces = [part.flatten().to(home, non_blocking=True) for part in parts]
    added, rest = add_ranks(metrics, group, torch.cat(pieces), to_host=True)
    host, similar, logits, peaks, *others = rest.split([len(piece) for piece in pieces])
    on_host, alike, sizes = (each.view(layers, -1).tolist() for each in (host, similar, logits))
    largest = peaks.view(layers, -1).amax(1).tolist()
    records, tokens = {}, 0
    for place, (name, layer) in enumerate(added.items()):
        numbers = dict(zip(_HOST, on_host[place], strict=True))
        if numbers["forwards"]:
            records[name] = record = _record(layer, numbers, (*sizes[place], largest[place]), alike[place])
            by_count = sum(record.tokens_per_expert) // watches[name].layer.config.top_k
            tokens = max(tokens, int(numbers["tokens"]) or by_count)
    return records, tokens, others


def _home(watches: Sequence[LayerWatch]) -> torch.device:
    """Where a layer has run, or else where its parameters are, which offloading may have taken elsewhere."""
    ran = [watch.metrics[0].tokens_per_expert.device for watch in watches if watch.metrics]
    return ran[0] if ran else next(watches[0].layer.parameters()).device


def _metrics_of(watch: LayerWatch, home: torch.device) -> RoutingMetrics:
    """All forwards as one; zeros for a layer that has not run here, and may have on other ranks."""
    if watch.metrics:
        return add_forwards(watch.metrics)
    weight = next(watch.layer.parameters())
    wide = torch.promote_types(weight.dtype, torch.float32) if weight.is_floating_point() else torch.float32
    none = torch.zeros(watch.layer.config.num_experts, dtype=torch.int64, device=home)
    return RoutingMetrics(none, none, torch.zeros((), dtype=wide, device=home), 0, 0)


def _host_numbers(watch: LayerWatch) -> list[float]:
    """``_HOST``; it waits for the layer's part of the step."""
    seconds = watch.seconds()
    return [len(watch.metrics), watch.tokens, bool(seconds), *(seconds.get(part, 0.0) for part in LAYER_PARTS)]


def _logits(watches: Sequence[LayerWatch], home: torch.device, here: int, ranks: int) -> tuple[Tensor, Tensor]:
    """Sum of squares and number ``(L, 2)``; and each rank's largest magnitudes at its own place ``(L, W)``.

    A sum over ranks then brings everyone's largest.
    """
    sizes = [_of_forwards(watch.sizes) for watch in watches]
    none = torch.zeros((), dtype=torch.float64, device=home)
    norms, peaks, counts = zip(*[(none, none, 0) if size is None else size for size in sizes], strict=True)
    squares = torch.stack([each.to(home, torch.float64) for each in norms]).square()
    if any(isinstance(each, Tensor) for each in counts):
        several = torch.stack([torch.as_tensor(each, dtype=torch.float64, device=home) for each in counts])
    else:
        several = torch.tensor(counts, dtype=torch.float64, device="cpu").to(home, non_blocking=True)
    largest = none.new_zeros(len(watches), ranks)
    largest[:, here] = torch.stack([each.to(home, torch.float64) for each in peaks])
    return torch.stack([squares, several], 1), largest


def _of_forwards(sizes: Sequence[Size]) -> Size | None:
    """Logits of several forwards as those of one."""
    if len(sizes) < 2:
        return sizes[0] if sizes else None
    norms, peaks, counts = zip(*sizes, strict=True)
    return torch.linalg.vector_norm(torch.stack(norms)), torch.stack(peaks).amax(), sum(counts)


def _record(
    metrics: RoutingMetrics, numbers: Mapping[str, float], logits: Sequence[float], alike: Sequence[float]
) -> LayerRecord:
    """A layer's record, of sums over ranks on the host."""
    (squares, count, peak), (similarity, similar), timed = logits, alike, numbers["timed"]
    tokens, kept = tuple(metrics.tokens_per_expert.tolist()), tuple(metrics.kept_per_expert.tolist())
    return LayerRecord(
        tokens_per_expert=tokens,
        kept_per_expert=kept,
        load=tuple(metrics.load.tolist()),
        entropy=float(metrics.entropy),
        dropped_share=float(metrics.dropped_share) if tokens != kept else 0.0,
        dead_experts=tokens.count(0),
        router_logits_rms=math.sqrt(squares / count) if count else None,
        router_logits_max=peak if count else None,
        expert_similarity=similarity / similar if similar else None,
        bytes_sent=None if metrics.bytes_sent is None else int(metrics.bytes_sent),
        seconds={part: numbers[part] / timed for part in LAYER_PARTS} if timed else {},
        forwards=int(numbers["forwards"]),
    )
