"""From a config and the user's groups: the dispatcher, and which part of the experts lives on this rank."""

from __future__ import annotations

from typing import Any

import torch

from dmoe.config import MoEConfig
from dmoe.expert_slice import ExpertSlice
from dmoe.parallel.dispatch import AllToAllDispatcher, Dispatcher, LocalDispatcher
from dmoe.parallel.mesh import expert_mesh
from dmoe.parallel.placement import as_group

_GRAD_SCALES = {"mean": lambda ranks: 1 / ranks, "sum": lambda ranks: 1.0, "sqrt_world_size": lambda ranks: ranks**-0.5}


def build_dispatcher(config: MoEConfig, ep_group: Any) -> Dispatcher:
    """How tokens reach the experts.

    Raises:
        ValueError, TypeError: groups that are none, or options that need all experts in one place.
    """
    if ep_group is None:
        return LocalDispatcher(config.num_experts)
    if config.router == "expert_choice":
        raise ValueError(
            "MoE: router: expected a router whose tokens choose with ep_group, got 'expert_choice': its experts would "
            "pick from the tokens of one rank at a time"
        )
    if config.accumulate_main_grad and config.expert_grad_scale != "sum":
        raise ValueError(
            "MoE: accumulate_main_grad: expected False with ep_group, or expert_grad_scale='sum', got True with "
            f"{config.expert_grad_scale!r}: what goes straight into main_grad is not scaled"
        )
    return AllToAllDispatcher(
        as_group(ep_group),
        config.num_experts,
        max_rows_received=config.max_rows_received,
        wire_dtype=config.wire_dtype,
        wire_backward=config.wire_backward,
    )


def owned_experts(
    config: MoEConfig, dispatcher: Dispatcher, ep_group: Any, *, device: torch.device | str | None, dtensor: bool
) -> ExpertSlice | None:
    """What lives on this rank; None when all experts do.

    Raises:
        ValueError: a width that the shards of an expert do not divide, or options that need whole experts.
    """
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
        mesh = expert_mesh(ep_group, dispatcher.group, num_shards, device)
    scale = _GRAD_SCALES[config.expert_grad_scale](dispatcher.world_size)
    return ExpertSlice(dispatcher.local_experts, shard, num_shards, mesh, scale)
