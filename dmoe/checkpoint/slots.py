"""Where in a checkpoint the experts' tensors are, and how each layer's are spread over ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dmoe.checkpoint.layout import Partition, expert_key, is_packed
from dmoe.checkpoint.optimizer import expert_states
from dmoe.checkpoint.tree import Path, branches, is_model_state, is_optimizer_state, shown
from dmoe.config import MoEConfig

Widths = Sequence[int] | Mapping[str, Sequence[int]] | None


@dataclass(frozen=True)
class Slot:
    """A tensor that is cut: which layer's it is (the path of its model state, and its name there), and which field."""

    model: Path
    layer: str
    field: str

    @property
    def home(self) -> Path:
        """Its layer, as a path."""
        return (*self.model, self.layer)


def find_slots(tree: Any, owner: str) -> dict[Path, Slot]:
    """Every tensor of a checkpoint that belongs to experts: parameters, and an optimizer's states in their shape.

    Args:
        tree: a state dict, or dicts and lists around some, with optimizers' states.
        owner: whose it is, for messages.

    Raises:
        ValueError: no experts; an optimizer's state that belongs to no model, or that cannot be cut.
    """
    slots: dict[Path, Slot] = {}
    models = {path: node for path, node in branches(tree) if is_model_state(node)}
    if not models:
        raise ValueError(
            f"{owner}: expected a checkpoint with MoE layers, whose experts' parameters have names as "
            "'experts.down_proj' or 'blocks.0.ffn.experts.gate_up_proj', got none"
        )
    for path, model in models.items():
        for key, value in model.items():
            found = expert_key(key)
            if found is not None and isinstance(value, Tensor):
                place = (*path, key)
                slots[place] = Slot(path, found[0], found[1])
    for path, node in branches(tree):
        if is_optimizer_state(node):
            slots |= _of_optimizer(node, path, models, owner)
        if any(isinstance(key, str) and key.startswith("state.") and ".experts." in key for key in node):
            raise ValueError(
                f"{owner}: {shown(path)}: expected an optimizer's state as a dict with 'state' and 'param_groups', got "
                "a flattened one; save it with flatten_optimizer_state_dict=False"
            )
    return slots


def _of_optimizer(node: Mapping[Any, Any], path: Path, models: Mapping[Path, Any], owner: str) -> dict[Path, Slot]:
    if not node["state"]:
        return {}
    beside = _model_beside(path, models)
    if beside is None:
        raise ValueError(
            f"{owner}: {shown(path)}: expected the model of this optimizer in the same dict or around, got "
            f"{', '.join(shown(model) for model in models)}"
        )
    model = models[beside]
    slots = {}
    for key, name in expert_states(node, model, path).items():
        found = expert_key(name)
        assert found is not None
        for kind, value in node["state"][key].items():
            if not isinstance(value, Tensor) or (value.numel() == 1 and value.shape != model[name].shape):
                continue
            place = (*path, "state", key, kind)
            if value.shape != model[name].shape:
                raise ValueError(
                    f"{owner}: {shown(place)}: expected a number or a tensor of {name}'s shape "
                    f"{tuple(model[name].shape)}, got {tuple(value.shape)}, which cannot be cut with the experts"
                )
            slots[place] = Slot(beside, found[0], found[1])
    return slots


def _model_beside(path: Path, models: Mapping[Path, Any]) -> Path | None:
    """The first model state in the nearest dict around an optimizer's state."""
    for length in range(len(path) - 1, -1, -1):
        for model in models:
            if model[:length] == path[:length]:
                return model
    return None


def find_partitions(
    trees: Sequence[Any], slots: Mapping[Path, Slot], ranks: int, shards: int, widths: Widths, *, whole: bool
) -> dict[Path, Partition]:
    """How each layer is spread, by the path of the layer; every tensor's shape is checked against it.

    Args:
        trees: the whole checkpoint alone, or those of all ranks.
        slots: of each of them.
        ranks, shards: see :class:`Partition`.
        widths: of experts whose widths differ: one list for all layers, or by the layers' names.
        whole: whether ``trees`` holds the whole.

    Raises:
        ValueError: layers that cannot be divided, or shapes that do not fit together.
    """
    partitions: dict[Path, Partition] = {}
    for slot in slots.values():
        if slot.home in partitions:
            continue
        model = at(trees[0], slot.model)
        down = model.get(f"{slot.layer}.down_proj")
        if not isinstance(down, Tensor) or down.dim() not in (2, 3):
            what = f"shape {tuple(down.shape)}" if isinstance(down, Tensor) else "none"
            raise ValueError(f"{shown(slot.home)}.down_proj: expected (E, H, F), or (H, sum F), got {what}")
        packed = is_packed("down_proj", down)
        if packed:
            all_widths = _given_widths(trees[0], slot, widths)
        elif whole:
            all_widths = (down.shape[2],) * down.shape[0]
        else:
            all_widths = (down.shape[2] * shards,) * (down.shape[0] * (ranks // shards))
        try:
            partitions[slot.home] = Partition(all_widths, packed, ranks, shards)
        except ValueError as error:
            raise ValueError(f"{shown(slot.home)}: {error}") from None
        _check_router(model, slot, len(all_widths))
    for path, slot in slots.items():
        hidden = at(trees[0], slot.model)[f"{slot.layer}.down_proj"].shape[-2]
        partition = partitions[slot.home]
        if whole:
            partition = Partition(partition.widths, partition.packed, 1)
        for rank, tree in enumerate(trees):
            expected = partition.shape(slot.field, hidden, rank)
            got = tuple(at(tree, path).shape)
            if got != expected:
                owner = "" if whole else f"rank {rank}: "
                raise ValueError(
                    f"{owner}{shown(path)}: expected shape {expected} ({partition.num_experts} experts over "
                    f"{partition.ranks} ranks in {partition.shards} shards, after down_proj"
                    f"{' and the given widths' if partition.packed else ' of rank 0'}), got {got}"
                )
    return partitions


def at(tree: Any, path: Path) -> Any:
    """What is at a path."""
    for key in path:
        tree = tree[key]
    return tree


def _given_widths(tree: Any, slot: Slot, widths: Widths) -> tuple[int, ...]:
    if isinstance(widths, Mapping):
        widths = widths.get(slot.layer)
    if widths is None:
        widths = _saved_widths(tree, slot.model)
    if widths is None:
        raise ValueError(
            f"{shown(slot.home)}: expected the widths of its experts, which differ and stand side by side (down_proj "
            "is (H, sum F)): give them, in the order of all experts (--widths, widths=), or save the layer's config "
            "(a dmoe.MoEConfig, or a dict with 'ffn_hidden_size') as 'config' beside the model's state"
        )
    if any(not isinstance(width, int) or isinstance(width, bool) or width < 1 for width in widths):
        raise ValueError(f"{shown(slot.home)}: widths: expected integers of at least 1, got {list(widths)}")
    return tuple(widths)


def _saved_widths(tree: Any, model: Path) -> Sequence[int] | None:
    """``ffn_hidden_size`` of the nearest ``config`` around a model's state."""
    for length in range(len(model), -1, -1):
        config = at(tree, model[:length]).get("config") if isinstance(at(tree, model[:length]), Mapping) else None
        found = config.ffn_hidden_size if isinstance(config, MoEConfig) else None
        if isinstance(config, Mapping):
            found = config.get("ffn_hidden_size")
        if isinstance(found, list | tuple):
            return found
    return None


def _check_router(model: Mapping[str, Any], slot: Slot, experts: int) -> None:
    """The router beside the experts knows how many there are: files may be missing at the end, or be too many."""
    router = model.get(f"{slot.layer.removesuffix('experts')}router.weight")
    if isinstance(router, Tensor) and router.dim() == 2 and router.shape[0] != experts:
        less = "a rank's file is missing" if router.shape[0] > experts else "too many files, or shards"
        raise ValueError(
            f"{shown(slot.home)}: expected {router.shape[0]} experts, which its router chooses from, got {experts}: "
            f"{less}"
        )
