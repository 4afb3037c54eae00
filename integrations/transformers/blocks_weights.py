"""Tensors of a Hugging Face MoE block under dmoe's names and in dmoe's shapes, and back: pure functions of tensors.

Whatever touches experts leaves their first dimension alone, so every map here holds for a slice of the experts, too:
that is how a rank reads its own from a file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate


@dataclass(frozen=True)
class Layout:
    """How their tensors lie beside ours.

    Attributes:
        join: their tensors to ours, views where that is possible.
        split: ours to their tensors; ``split(join(tensors))`` are the same numbers in the same shapes.
    """

    join: Callable[[Sequence[Tensor]], Tensor]
    split: Callable[[Tensor], Sequence[Tensor]]


def _of_one(join: Callable[[Tensor], Tensor], split: Callable[[Tensor], Tensor]) -> Layout:
    return Layout(lambda tensors: join(tensors[0]), lambda tensor: (split(tensor),))


SAME = _of_one(lambda theirs: theirs, lambda ours: ours)
# (1, E) beside (E,), and a single expert's (F, H) beside (1, F, H)
ROW = _of_one(lambda theirs: theirs.squeeze(0), lambda ours: ours.unsqueeze(0))
SINGLE = _of_one(lambda theirs: theirs.unsqueeze(0), lambda ours: ours.squeeze(0))
# (E, H, F) stored as (E, F, H)
TRANSPOSED = _of_one(lambda theirs: theirs.mT, lambda ours: ours.mT)
# (E, 2, F, H) beside (E, 2F, H), the F rows of the gate first; biases (E, 2, F) beside (E, 2F)
HALVES = _of_one(lambda theirs: theirs.unflatten(1, (2, -1)), lambda ours: ours.flatten(1, 2))
HALVES_TRANSPOSED = _of_one(lambda theirs: theirs.mT.unflatten(1, (2, -1)), lambda ours: ours.flatten(1, 2).mT)
# the same, with rows gate 0, up 0, gate 1, up 1 ...
INTERLEAVED = _of_one(
    lambda theirs: theirs.unflatten(1, (-1, 2)).transpose(1, 2), lambda ours: ours.transpose(1, 2).flatten(1, 2)
)
INTERLEAVED_TRANSPOSED = _of_one(
    lambda theirs: theirs.mT.unflatten(1, (-1, 2)).transpose(1, 2), lambda ours: ours.transpose(1, 2).flatten(1, 2).mT
)
# a single expert's (2F, H), the gate first
SINGLE_HALVES = _of_one(
    lambda theirs: theirs.unflatten(0, (2, -1)).unsqueeze(0), lambda ours: ours.squeeze(0).flatten(0, 1)
)
# a gate's and an up projection's (F, H) beside a single expert's (1, 2, F, H)
PAIR = Layout(lambda tensors: torch.stack(list(tensors)).unsqueeze(0), lambda ours: ours.squeeze(0).unbind(0))


@dataclass(frozen=True)
class Weight:
    """One tensor of :class:`dmoe.MoE`, and where a block's state dict has it.

    Attributes:
        ours: its name in the layer's state dict.
        theirs: name or names in the block's state dict.
        layout: how their shapes differ.
    """

    ours: str
    theirs: tuple[str, ...]
    layout: Layout

    def to_ours(self, tensors: Sequence[Tensor]) -> Tensor:
        """Their tensors, in the order of ``theirs``, as ours: contiguous; a view where nothing has to move."""
        return self.layout.join(tensors).contiguous()

    def to_theirs(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Ours as theirs, each contiguous; views where nothing has to move.

        A single expert that FSDP2 shards lies on one rank alone, which no sharding of theirs can say: it is gathered,
        so all ranks have to call this.
        """
        if isinstance(tensor, DTensor) and tensor.shape[0] == 1:
            tensor = tensor.redistribute(placements=[Replicate()] * tensor.device_mesh.ndim)
        return tuple(each.contiguous() for each in self.layout.split(tensor))


def rename_to_ours(state: MutableMapping[str, Any], weights: Iterable[Weight], prefix: str, ours: str) -> None:
    """Translate a state dict in place, as far as it has their names: those under ``prefix`` become ``ours + name``."""
    for weight in weights:
        names = [prefix + name for name in weight.theirs]
        if all(name in state for name in names):
            state[ours + weight.ours] = weight.to_ours([state.pop(name) for name in names])


def rename_to_theirs(state: MutableMapping[str, Any], weights: Iterable[Weight], prefix: str, ours: str) -> None:
    """The other way round: ``ours + name`` become their names under ``prefix``."""
    for weight in weights:
        if ours + weight.ours in state:
            tensors = weight.to_theirs(state.pop(ours + weight.ours))
            state.update({prefix + name: tensor for name, tensor in zip(weight.theirs, tensors, strict=True)})


_ROUTERS = ("gate.weight", "router.weight", "router.gate.weight", "gate.wg.weight")
_SELECTION_BIASES = ("gate.e_score_correction_bias", "e_score_correction_bias", "expert_bias")
SHARED = ("shared_expert", "shared_experts", "shared_mlp")


def _known(up: Layout, down: Layout, up_bias: Layout) -> list[Weight]:
    """Every name that a block of some family gives a tensor which dmoe has."""
    weights = [Weight("router.weight", (name,), SAME) for name in _ROUTERS]
    weights += [Weight("router.bias", (name,), SAME) for name in ("gate.bias", "router.bias")]
    weights += [Weight("router.selection_bias", (name,), SAME) for name in _SELECTION_BIASES]
    weights += [
        Weight("router.selection_bias", ("gate.moe_statics.e_score_correction_bias",), ROW),
        Weight("experts.gate_up_proj", ("experts.gate_up_proj",), up),
        Weight("experts.up_proj", ("experts.up_proj",), SAME),
        Weight("experts.gate_up_bias", ("experts.gate_up_proj_bias",), up_bias),
        Weight("experts.down_proj", ("experts.down_proj",), down),
        Weight("experts.down_bias", ("experts.down_proj_bias",), SAME),
        Weight("shared_expert.gate.weight", ("shared_expert_gate.weight",), SAME),
    ]
    for kind, ours in (("weight", "proj"), ("bias", "bias")):
        for shared in SHARED:
            pair = (f"{shared}.gate_proj.{kind}", f"{shared}.up_proj.{kind}")
            weights.append(Weight(f"shared_expert.mlp.gate_up_{ours}", pair, PAIR))
            weights.append(
                Weight(f"shared_expert.mlp.gate_up_{ours}", (f"{shared}.gate_up_proj.{kind}",), SINGLE_HALVES)
            )
            weights.append(Weight(f"shared_expert.mlp.up_{ours}", (f"{shared}.up_proj.{kind}",), SINGLE))
            weights.append(Weight(f"shared_expert.mlp.down_{ours}", (f"{shared}.down_proj.{kind}",), SINGLE))
    return weights


# how the experts of a family lie: up projection, down projection, bias of the up projection
EXPERTS = {
    "halves": (HALVES, SAME, HALVES),
    "halves_transposed": (HALVES_TRANSPOSED, TRANSPOSED, HALVES),
    "interleaved_transposed": (INTERLEAVED_TRANSPOSED, TRANSPOSED, INTERLEAVED),
}


def weights_of(names: Mapping[str, Any] | Iterable[str], experts: str) -> tuple[list[Weight], list[str]]:
    """The map for a block with tensors of these names.

    Args:
        names: of the block's state dict.
        experts: how its experts lie, a key of ``EXPERTS``.

    Returns:
        The weights, and the names that dmoe has nothing for.
    """
    left, found = set(names), []
    for weight in _known(*EXPERTS[experts]):
        if left.issuperset(weight.theirs):
            found.append(weight)
            left -= set(weight.theirs)
    return found, sorted(left)
