"""Distributed checkpoints in Megatron's own names and global layout, so that both layers load what either saved.

``<layer>.router.weight``, ``<layer>.experts.experts.linear_fc1.weight`` of shape ``(..., E, 2 F, H)`` (gate above up)
and ``<layer>.experts.experts.linear_fc2.weight`` ``(..., E, H, F)``; or, where Megatron asks for single shards, a key
for every expert. Which rank holds which part is said with each tensor, so that any other division of experts, their
width and layers can load it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from megatron.core.dist_checkpointing.mapping import ReplicaId, ShardedTensor, ShardedTensorFactory
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_object_for_checkpoint
from megatron.core.utils import make_sharded_tensor_for_checkpoint
from torch import Tensor, nn

from dmoe.integrations.megatron.flat_biases import parameters_by_name

_LINEAR = {
    "gate_up_proj": "linear_fc1.weight",
    "up_proj": "linear_fc1.weight",
    "gate_up_bias": "linear_fc1.bias",
    "up_bias": "linear_fc1.bias",
    "down_proj": "linear_fc2.weight",
    "down_bias": "linear_fc2.bias",
}
_EXTRA = "megatron_extra_state"  # in our own names; what Megatron calls them is in the keys


class Place(NamedTuple):
    """Where this rank's experts lie among all.

    Attributes:
        ep_rank, ep_ranks: block of experts, of how many.
        etp_rank, etp_ranks: slice of their F, of how many.
        replica: which of the ranks with the same experts this is; the first one saves.
    """

    ep_rank: int
    ep_ranks: int
    etp_rank: int
    etp_ranks: int
    replica: int

    @classmethod
    def of(cls, pg_collection: Any) -> Place:
        """From Megatron's groups."""
        ep, etp = pg_collection.ep, pg_collection.expt_tp
        return cls(ep.rank(), ep.size(), etp.rank(), etp.size(), pg_collection.expt_dp.rank())


def layer_sharded_state_dict(layer: Any, prefix: str, offsets: tuple, metadata: dict | None) -> dict[str, Any]:
    """All of a :class:`DmoeLayer`, by its own names, as parts of what Megatron's layer calls them.

    Args:
        layer: the layer.
        prefix: of its names.
        offsets: ``(axis, index, count)`` for each axis that stands before the tensors', as that of the layers.
        metadata: Megatron's, of which ``singleton_local_shards`` and ``dp_cp_group`` are looked at.
    """
    metadata = ensure_metadata_has_dp_cp_group(metadata)
    tp, dp_cp = layer.pg_collection.tp, metadata["dp_cp_group"]
    state: dict[str, Any] = {}
    router = layer.moe.router
    named = {"weight": router.weight, "bias": router.bias, "expert_bias": layer.expert_bias}
    named["qb_beta"] = None if layer.quantile is None else layer.quantile.beta
    own = {"expert_bias": "selection_bias"}
    for name, tensor in named.items():
        if tensor is not None:
            state[f"{prefix}moe.router.{own.get(name, name)}"] = make_sharded_tensor_for_checkpoint(
                tensor, f"{prefix}router.{name}", prepend_offsets=offsets, tp_group=tp, dp_cp_group=dp_cp
            )
    if layer.moe.output_bias is not None:  # MegaBlocks'; Megatron's layer has no such
        state[f"{prefix}moe.output_bias"] = make_sharded_tensor_for_checkpoint(
            layer.moe.output_bias, f"{prefix}output_bias", prepend_offsets=offsets, tp_group=tp, dp_cp_group=dp_cp
        )
    place = Place.of(layer.pg_collection)
    state |= experts_sharded_state_dict(
        layer.moe.experts, f"{prefix}moe.experts.", f"{prefix}experts.experts.", offsets, place, metadata
    )
    if layer.shared_experts is not None:
        state |= layer.shared_experts.sharded_state_dict(f"{prefix}shared_experts.", offsets, metadata)
    return state


def experts_sharded_state_dict(
    experts: nn.Module, prefix: str, key_prefix: str, offsets: tuple, place: Place, metadata: dict | None
) -> dict[str, Any]:
    """The experts of a rank.

    Args:
        experts: dmoe's module of experts.
        prefix: of its own names.
        key_prefix: of Megatron's names, as ``decoder.layers.mlp.experts.experts.``.
        offsets, metadata: as for :func:`layer_sharded_state_dict`.
        place: which experts these are.
    """
    single = bool((metadata or {}).get("singleton_local_shards", False))
    state: dict[str, Any] = {}
    count = 0
    for name, parameter in parameters_by_name(experts):
        shape = getattr(experts, name).shape
        count = shape[0]
        layout = _Layout(name, shape, offsets, place, single)
        whole_over_etp = name == "down_bias"
        replica = (0, place.etp_rank if whole_over_etp else 0, place.replica)
        state[prefix + name] = ShardedTensorFactory(
            key_prefix + _LINEAR[name], parameter, layout.build, layout.merge, replica
        )
    # Megatron's own linears save an empty state beside their weights, and do not load without it.
    first = place.ep_rank * count
    for expert in range(first, first + count):
        at = offsets if single else (*offsets, (len(offsets), expert, place.ep_ranks * count))
        for linear in ("linear_fc1", "linear_fc2"):
            key = f"{key_prefix}{expert}.{linear}" if single else key_prefix + linear
            state[f"{prefix}{_EXTRA}.{expert}.{linear}"] = make_sharded_object_for_checkpoint(
                None, f"{key}._extra_state", at, (0, place.etp_rank, place.replica)
            )
    return state


def without_extra_states(module: nn.Module, incompatible_keys: Any) -> None:
    """A hook after ``load_state_dict``: the empty states of Megatron's linears are nothing that is missing here."""
    unexpected = incompatible_keys.unexpected_keys
    unexpected[:] = [key for key in unexpected if f".{_EXTRA}." not in f".{key}"]


class _Layout:
    """One parameter, as it is kept, to parts of global tensors and back; optimizer states go the same way."""

    def __init__(self, name: str, shape: torch.Size, offsets: tuple, place: Place, single: bool) -> None:
        self.gated, self.f_axis = name.startswith("gate_up"), _f_axis(name)
        self.field, self.offsets, self.place = _LINEAR[name], offsets, place
        self.shape, self.count, self.single = shape, shape[0], single
        self.flat = name.endswith("_bias")

    @torch.no_grad()
    def build(self, key: str, tensor: Tensor, replica_id: ReplicaId, flattened_range: slice | None) -> Any:
        """The parts: a list by half, and within by expert where each has a key of its own."""
        if flattened_range is not None:
            raise NotImplementedError(f"{key}: expected whole tensors, got a flat range {flattened_range}")
        tensor = tensor.view(self.shape)
        halves = tensor.unbind(1) if self.gated else (tensor,)
        if not self.single:
            return [self._part(key, half, number, replica_id) for number, half in enumerate(halves)]
        return [
            [
                self._part(self._key_of(key, expert, number), half[expert], number, replica_id)
                for expert in range(self.count)
            ]
            for number, half in enumerate(halves)
        ]

    @torch.no_grad()
    def merge(self, parts: list[Any]) -> Tensor:
        """The inverse of :meth:`build`."""
        halves = [torch.stack(part) if self.single else part for part in parts]
        whole = torch.stack(halves, 1) if self.gated else halves[0]
        return whole.flatten() if self.flat else whole

    def _key_of(self, key: str, expert: int, half: int) -> str:
        """An expert's own key: with its number, and for the halves of a gated one ``_w`` and ``_v``."""
        number = self.place.ep_rank * self.count + expert
        with_number = f"{key.removesuffix(self.field)}{number}.{self.field}"  # Megatron may have changed the prefix
        return with_number + ("_w", "_v")[half] if self.gated else with_number

    def _part(self, key: str, tensor: Tensor, half: int, replica_id: ReplicaId) -> ShardedTensor:
        """Where one half of this rank's experts, or of one of them, lies."""
        before, place = len(self.offsets), self.place
        lies = list(self.offsets)
        if not self.single:
            lies.append((before, place.ep_rank, place.ep_ranks))
        if self.f_axis is not None:
            axis = before + self.f_axis + (0 if self.single else 1)
            shard, shards = place.etp_rank, place.etp_ranks
            if self.gated and not self.single:  # all gates, then all ups
                shard, shards = shard + half * shards, 2 * shards
            lies.append((axis, shard, shards))
        return ShardedTensor.from_rank_offsets(
            key, tensor.contiguous(), *lies, replica_id=replica_id, prepend_axis_num=before
        )


def _f_axis(name: str) -> int | None:
    """Which axis of one expert's tensor, one half of it where gated, is F."""
    return {"down_bias": None, "down_proj": 1}.get(name, 0)
