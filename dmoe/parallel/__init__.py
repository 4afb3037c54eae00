"""Experts spread over the ranks of a process group: who owns which, how tokens travel there and back.

``torch.distributed`` is the engine: any group (NCCL on GPUs, gloo on CPUs) serves. Dispatchers are plain objects::

    arrived = dispatcher.dispatch(x, expert_indices, gate_weights)   # rows of all ranks for the experts that live here
    y = run_experts(arrived.x, arrived.plan, arrived.gate_weights, weights)
    y = dispatcher.combine(y, arrived)                               # back where the tokens came from
"""

from __future__ import annotations

from dmoe.parallel.agreement import check_agreement
from dmoe.parallel.clipping import clip_grad_norm, grad_norm
from dmoe.parallel.collectives import Exchange, all_to_all_rows
from dmoe.parallel.dispatch import AllToAllDispatcher, Dispatched, Dispatcher, LocalDispatcher, Traffic
from dmoe.parallel.gradients import average_gradients, data_parallel
from dmoe.parallel.placement import as_group, local_experts

__all__ = [
    "AllToAllDispatcher",
    "Dispatched",
    "Dispatcher",
    "Exchange",
    "LocalDispatcher",
    "Traffic",
    "all_to_all_rows",
    "as_group",
    "average_gradients",
    "check_agreement",
    "clip_grad_norm",
    "data_parallel",
    "grad_norm",
    "local_experts",
]
