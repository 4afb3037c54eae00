"""Experts spread over the ranks of a process group: who owns which, how tokens travel there and back.

``torch.distributed`` is the engine: any group (NCCL on GPUs, gloo on CPUs) serves. Dispatchers are plain objects::

    arrived = dispatcher.dispatch(x, expert_indices, gate_weights)   # rows of all ranks for the experts that live here
    y = run_experts(arrived.x, arrived.plan, arrived.gate_weights, weights)
    y = dispatcher.combine(y, arrived)                               # back where the tokens came from
"""

from __future__ import annotations

from dmoe.parallel.agreement import check_agreement
from dmoe.parallel.by_deep_ep import DeepEPDispatcher
from dmoe.parallel.by_node import NodeDispatcher
from dmoe.parallel.clipping import clip_grad_norm, clip_grad_value, grad_norm
from dmoe.parallel.collectives import Exchange, all_to_all_rows
from dmoe.parallel.dispatch import AllToAllDispatcher
from dmoe.parallel.exact import ExactStep, exact_step
from dmoe.parallel.fsdp import fully_shard_experts
from dmoe.parallel.grad_scaler import GradScaler
from dmoe.parallel.gradients import (
    average_gradients,
    average_in_backward,
    data_parallel,
    exclude_experts,
    split_parameters,
)
from dmoe.parallel.interface import Dispatched, Dispatcher, LocalDispatcher, Returning, UnderWay
from dmoe.parallel.levelling import Levelling, rows_that_pay
from dmoe.parallel.overlap import Overlapped, chunk_of, run_overlapped
from dmoe.parallel.parallelize import parallelize
from dmoe.parallel.placement import as_group, ffn_shard, local_experts
from dmoe.parallel.statistics import LoadOfRanks
from dmoe.parallel.symmetric import SymmetricDispatcher, SymmetricExchange
from dmoe.parallel.traffic import Hop, Traffic
from dmoe.parallel.two_level import TwoLevel, TwoLevelExchange, flat_mesh, mesh_group
from dmoe.parallel.wire import NarrowExchange, pack_rows, unpack_rows

__all__ = [
    "AllToAllDispatcher",
    "DeepEPDispatcher",
    "Dispatched",
    "Dispatcher",
    "ExactStep",
    "Exchange",
    "GradScaler",
    "Hop",
    "Levelling",
    "LoadOfRanks",
    "LocalDispatcher",
    "NarrowExchange",
    "NodeDispatcher",
    "Overlapped",
    "Returning",
    "SymmetricDispatcher",
    "SymmetricExchange",
    "Traffic",
    "TwoLevel",
    "TwoLevelExchange",
    "UnderWay",
    "all_to_all_rows",
    "as_group",
    "average_gradients",
    "average_in_backward",
    "check_agreement",
    "chunk_of",
    "clip_grad_norm",
    "clip_grad_value",
    "data_parallel",
    "exact_step",
    "exclude_experts",
    "ffn_shard",
    "flat_mesh",
    "fully_shard_experts",
    "grad_norm",
    "local_experts",
    "mesh_group",
    "pack_rows",
    "parallelize",
    "rows_that_pay",
    "run_overlapped",
    "split_parameters",
    "unpack_rows",
]
