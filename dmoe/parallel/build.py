"""From a config and the user's groups: the dispatcher, and which part of the experts lives on this rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from dmoe.config import MoEConfig
from dmoe.expert_slice import ExpertSlice
from dmoe.parallel.by_deep_ep import DeepEPDispatcher
from dmoe.parallel.by_node import NodeDispatcher
from dmoe.parallel.dispatch import AllToAllDispatcher
from dmoe.parallel.gradients import SharedOverflow
from dmoe.parallel.interface import Dispatcher, LocalDispatcher
from dmoe.parallel.levelling import Levelling
from dmoe.parallel.mesh import expert_mesh
from dmoe.parallel.overlap import chunk_of
from dmoe.parallel.placement import as_group
from dmoe.parallel.statistics import LoadOfRanks
from dmoe.parallel.symmetric import SymmetricDispatcher
from dmoe.parallel.two_level import TwoLevel, mesh_group

_GRAD_SCALES = {"mean": lambda ranks: 1 / ranks, "sum": lambda ranks: 1.0, "sqrt_world_size": lambda ranks: ranks**-0.5}

_BY_TRANSPORT: dict[str, type[AllToAllDispatcher]] = {
    "all_to_all": AllToAllDispatcher,
    "deep_ep": DeepEPDispatcher,
    "symmetric_memory": SymmetricDispatcher,
}


@dataclass(frozen=True)
class LayerRanks:
    """What a layer knows of other ranks.

    Attributes:
        dispatcher: how tokens reach the experts.
        ep_group: the ranks that share the experts, a group or a mesh; None where they all live here.
        of_tokens: whose tokens share the experts; None is this rank alone.
        of_loss: whose tokens are one batch for ``load_balancing_over="global"``; None likewise.
        of_bias: whose load moves the selection bias; None where nobody said so.
    """

    dispatcher: Dispatcher
    ep_group: Any
    of_tokens: LoadOfRanks | None
    of_loss: LoadOfRanks | None
    of_bias: LoadOfRanks | None


def ranks_of_layer(
    config: MoEConfig, ep_group: Any, expert_tp_group: Any, ep_levels: Any, loss_group: Any
) -> LayerRanks:
    """From a layer's groups, as :class:`dmoe.MoE` takes them; raises what :func:`build_dispatcher` does."""
    dispatcher = build_dispatcher(config, ep_group, expert_tp_group, ep_levels)
    if ep_group is None and isinstance(dispatcher, AllToAllDispatcher):  # all ranks of a mesh of levels
        ep_group = dispatcher.group
    told = None if loss_group is None else LoadOfRanks(as_group(loss_group, "loss_group"))
    sharing = None if ep_group is None else LoadOfRanks(as_group(ep_group))
    of_tokens = LoadOfRanks(*dispatcher.groups) if isinstance(dispatcher, AllToAllDispatcher) else None
    return LayerRanks(dispatcher, ep_group, of_tokens, of_loss=sharing if told is None else told, of_bias=told)


def build_dispatcher(
    config: MoEConfig, ep_group: Any, expert_tp_group: Any = None, ep_levels: Any = None
) -> Dispatcher:
    """How tokens reach the experts; the groups are those of :class:`dmoe.MoE`.

    Raises:
        ValueError, TypeError: groups that are none, or options that need all experts in one place.
        ImportError, RuntimeError: a transport that is not installed.
    """
    if ep_levels is not None and not isinstance(ep_levels, TwoLevel):
        if not hasattr(ep_levels, "ndim"):
            raise TypeError(
                "MoE: ep_levels: expected a two-dimensional DeviceMesh or a dmoe.parallel.TwoLevel, got "
                f"{type(ep_levels).__name__}"
            )
        mesh, ep_levels = ep_levels, TwoLevel.of_mesh(ep_levels)
        ep_group = mesh_group(mesh) if ep_group is None else ep_group
    if ep_group is None:
        for name, given in (("expert_tp_group", expert_tp_group), ("ep_levels", ep_levels)):
            if given is not None:
                raise ValueError(f"MoE: {name}: expected None without ep_group, got {type(given).__name__}")
        return LocalDispatcher(config.num_experts)
    if config.accumulate_main_grad and config.expert_grad_scale != "sum":
        raise ValueError(
            "MoE: accumulate_main_grad: expected False with ep_group, or expert_grad_scale='sum', got True with "
            f"{config.expert_grad_scale!r}: what goes straight into main_grad is not scaled"
        )
    if config.accumulate_main_grad and config.overlap_degree > 1:
        raise ValueError(
            f"MoE: overlap_degree: expected 1 with accumulate_main_grad, got {config.overlap_degree}: each chunk would "
            "add to the whole buffer"
        )
    group = as_group(ep_group)
    tp_group = None if expert_tp_group is None else as_group(expert_tp_group, "expert_tp_group")
    shards = max(1, dist.get_world_size(group) // config.num_experts)
    shards *= 1 if tp_group is None else dist.get_world_size(tp_group)
    by_node = ep_levels is not None and config.rows_between_nodes == "once_per_node"
    kind = _BY_TRANSPORT[config.transport]
    dispatcher = (NodeDispatcher if by_node and kind is AllToAllDispatcher else kind)(
        group,
        config.num_experts,
        tp_group,
        max_rows_received=config.max_rows_received,
        on_overflow=config.on_overflow,
        wire_dtype=config.wire_dtype,
        wire_backward=config.wire_backward,
        two_level=ep_levels,
        join_choices=config.join_choices,
        levelling=_levelling(config, shards, ep_levels is not None),
    )
    if config.batch_invariant and dispatcher.ffn_shard[1] > 1:
        raise ValueError(
            "MoE: batch_invariant: expected False where ranks share an expert, got True with "
            f"{dispatcher.ffn_shard[1]} slices of each expert's F: their partial results are a sum of its own"
        )
    chunk_of(dispatcher.num_local_experts, config.overlap_degree, 0)  # says so where they cannot be cut
    return dispatcher


def _levelling(config: MoEConfig, shards: int, across_nodes: bool) -> Levelling | None:
    if config.balance_ranks is None:
        return None
    return Levelling(
        config.balance_slack,
        config.max_expert_copies,
        config.min_rows_per_copy,
        ffn=config.ffn_sizes[0] // shards,
        projections=3 if config.gated else 2,
        across_nodes=across_nodes,
    )


def owned_experts(
    config: MoEConfig, ranks: LayerRanks, *, device: torch.device | str | None, dtensor: bool
) -> ExpertSlice | None:
    """What lives on this rank; None when all experts do.

    Raises:
        ValueError: a width that the shards of an expert do not divide, or options that need whole experts.
    """
    dispatcher = ranks.dispatcher
    if not isinstance(dispatcher, AllToAllDispatcher):
        return None
    shard, num_shards = dispatcher.ffn_shard
    if odd := [width for width in config.ffn_sizes if width % num_shards]:
        raise ValueError(
            f"MoE: ffn_hidden_size: expected multiples of {num_shards}, the ranks that share an expert, got {odd[0]}"
        )
    if num_shards > 1 and config.expert_dropout:
        raise ValueError(
            f"MoE: expert_dropout: expected 0 where {num_shards} ranks share an expert, got {config.expert_dropout}: "
            "each would drop other numbers of one sum"
        )
    mesh = None
    if dtensor and isinstance(config.ffn_hidden_size, int):
        mesh = expert_mesh(ranks.ep_group, dispatcher.group, num_shards, device, dispatcher.tp_group)
    scale = _GRAD_SCALES[config.expert_grad_scale](dispatcher.num_ranks)
    # Of DTensor, PyTorch's scaler knows that they are parts of a whole.
    share = SharedOverflow(*dispatcher.groups) if mesh is None and dispatcher.num_ranks > 1 else None
    return ExpertSlice(dispatcher.local_experts, config.num_experts, shard, num_shards, mesh, scale, share)
