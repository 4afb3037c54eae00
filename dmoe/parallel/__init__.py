"""Experts spread over the ranks of a process group: who owns which, how tokens travel there and back.

``torch.distributed`` is the engine: any group (NCCL on GPUs, gloo on CPUs) serves. Dispatchers are plain objects::

    arrived = dispatcher.dispatch(x, expert_indices, gate_weights)   # rows of all ranks for the experts that live here
    y = run_experts(arrived.x, arrived.plan, arrived.gate_weights, weights)
    y = dispatcher.combine(y, arrived)                               # back where the tokens came from
"""

from __future__ import annotations

from dmoe.parallel.agreement import check_agreement
from dmoe.parallel.collectives import Exchange, all_to_all_rows
from dmoe.parallel.dispatch import AllToAllDispatcher, Traffic
from dmoe.parallel.interface import Dispatched, Dispatcher, LocalDispatcher, Returning, UnderWay
from dmoe.parallel.overlap import Overlapped, chunk_of, run_overlapped
from dmoe.parallel.placement import as_group, ffn_shard, local_experts

__all__ = [
    "AllToAllDispatcher",
    "Dispatched",
    "Dispatcher",
    "Exchange",
    "LocalDispatcher",
    "Overlapped",
    "Returning",
    "Traffic",
    "UnderWay",
    "all_to_all_rows",
    "as_group",
    "check_agreement",
    "chunk_of",
    "ffn_shard",
    "local_experts",
    "run_overlapped",
]
