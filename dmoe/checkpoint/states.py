"""Merging the states of all ranks into one, and splitting one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from dmoe.checkpoint.layout import Partition
from dmoe.checkpoint.slots import Slot, Widths, at, find_partitions, find_slots
from dmoe.checkpoint.tree import Path, check_plain, children, describe, is_list, rebuilt, same_leaf, shown

Progress = Callable[[Iterable[Path], int], Iterable[Path]]  # wraps an iterable of known length, as tqdm does


@torch.no_grad()
def merge_states(
    states: Sequence[Mapping[str, Any]],
    *,
    shards: int = 1,
    widths: Widths = None,
    ignore: Sequence[str] = (),
    progress: Progress = lambda paths, total: paths,
) -> dict[str, Any]:
    """One checkpoint for one process from those of all expert-parallel ranks.

    Experts' parameters, and an optimizer's states in their shape, are joined in the order of the ranks; everything else
    must be equal on all ranks, to the bit, and is taken from the first.

    Args:
        states: of each rank in order: a model's ``state_dict()``, or any dicts and lists around some, with
            ``state_dict()`` of AdamW-like optimizers beside (by position, or by name as from
            ``torch.distributed.checkpoint.state_dict.get_optimizer_state_dict``). Tensors are plain ones; a DTensor's
            part is its ``to_local()``.
        shards: every so many consecutive ranks hold slices along F of the same experts.
        widths: F of each of all E experts, where they differ: for all layers, or by the layers' names (as
            ``blocks.0.ffn.experts``). None: what a ``config`` beside the model's state says.
        ignore: patterns (``rng*``) of paths with slashes whose values may differ between ranks; the first one's stay.
        progress: wraps the paths of what is joined.

    Returns:
        The whole, in the structure of the first; on its devices. What is equal on all ranks is the first's own tensor.

    Raises:
        ValueError: states that differ in keys, shapes or values, or that hold no experts; the message names the first
            path that differs, and the ranks.
        TypeError: a state that is no dict, or tensors that are no plain ones.
    """
    if not states:
        raise ValueError("merge: expected the states of at least one rank, got none")
    _check_states("merge", [(f"rank {rank}", state) for rank, state in enumerate(states)])
    if not isinstance(shards, int) or shards < 1 or len(states) % shards:
        raise ValueError(f"merge: shards: expected a divisor of the {len(states)} ranks, got {shards!r}")
    slots = [find_slots(state, f"merge: rank {rank}") for rank, state in enumerate(states)]
    leaves = _common_leaves(states, slots, ignore)
    try:
        partitions = find_partitions(states, slots[0], len(states), shards, widths, whole=False)
    except ValueError as error:
        raise ValueError(f"merge: {error}") from None
    joined = {}
    for path in progress(leaves, len(leaves)):
        slot = slots[0][path]
        parts = [at(state, path).detach() for state in states]
        _check_parts(path, slot, parts, shards)
        joined[path] = partitions[slot.home].whole(slot.field, parts)
    return _replaced(states[0], joined, ())


@torch.no_grad()
def split_state(
    state: Mapping[str, Any], ranks: int, *, shards: int = 1, widths: Widths = None
) -> list[dict[str, Any]]:
    """The checkpoints of ``ranks`` expert-parallel ranks from that of one process: the way back of `merge_states`.

    Args:
        state: as one of those that :func:`merge_states` takes.
        ranks: W, shards included.
        shards: every so many consecutive ranks get slices along F of the same experts.
        widths: see :func:`merge_states`.

    Returns:
        W states. Experts' tensors have memory of their own; everything else is the given state's, on all ranks.

    Raises:
        ValueError: a state without experts, or with experts that cannot be divided.
        TypeError: a state that is no dict, or tensors that are no plain ones.
    """
    cut = Cut(state, ranks, shards=shards, widths=widths)
    return [cut.part(rank) for rank in range(ranks)]


class Cut:
    """A whole checkpoint, checked, whose parts are made one at a time.

    Args:
        state, ranks, shards, widths: see :func:`split_state`.
    """

    def __init__(self, state: Mapping[str, Any], ranks: int, *, shards: int = 1, widths: Widths = None) -> None:
        _check_states("split", [("the state", state)])
        self.state, self.ranks = state, ranks
        self.slots = find_slots(state, "split")
        try:
            Partition((shards,) * max(1, ranks), False, ranks, shards)  # whether the numbers fit, before any layer
            self.partitions = find_partitions([state], self.slots, ranks, shards, widths, whole=True)
        except ValueError as error:
            raise ValueError(f"split: {error}") from None

    @torch.no_grad()
    def part(self, rank: int) -> dict[str, Any]:
        """A rank's checkpoint."""
        parts = {}
        for path, slot in self.slots.items():
            tensor = at(self.state, path).detach()
            parts[path] = self.partitions[slot.home].part(slot.field, tensor, rank)
        return _replaced(self.state, parts, ())


def _check_states(operation: str, states: Sequence[tuple[str, Any]]) -> None:
    for owner, state in states:
        if not isinstance(state, Mapping):
            raise TypeError(f"{operation}: {owner}: expected a state dict, got {type(state).__name__}")
        check_plain(state, f"{operation}: {owner}")


def _replaced(node: Any, tensors: Mapping[Path, Tensor], path: Path) -> Any:
    """A tree with the tensors at some paths replaced."""
    if path in tensors:
        return tensors[path]
    if not isinstance(node, Mapping) and not is_list(node):
        return node
    return rebuilt(node, {key: _replaced(value, tensors, (*path, key)) for key, value in children(node)})


def _common_leaves(states: Sequence[Any], slots: Sequence[Mapping[Path, Slot]], ignore: Sequence[str]) -> list[Path]:
    """The paths that are cut, after a look at whether everything else is equal."""
    cut: list[Path] = []

    def walk(nodes: list[Any], path: Path) -> None:
        if any(fnmatchcase(shown(path), pattern) for pattern in ignore):
            return
        owners = {rank: slot.get(path) for rank, slot in enumerate(slots)}
        if any(owner is not None for owner in owners.values()):
            if len(set(owners.values())) > 1:
                _differ(path, [describe(node) for node in nodes])
            cut.append(path)
            return
        kinds = ["dict" if isinstance(n, Mapping) else "list" if is_list(n) else "leaf" for n in nodes]
        if len(set(kinds)) > 1:
            _differ(path, [describe(node) for node in nodes])
        if kinds[0] == "leaf":
            if not all(same_leaf(nodes[0], node) for node in nodes[1:]):
                groups: list[Any] = []
                numbers = [_class(node, groups) for node in nodes]
                _differ(path, [describe(node) for node in nodes], numbers)
            return
        by_key = [dict(children(node)) for node in nodes]
        for key in dict.fromkeys(key for node in by_key for key in node):
            if any(key not in node for node in by_key):
                _differ((*path, key), [describe(node[key]) if key in node else "nothing" for node in by_key])
            walk([node[key] for node in by_key], (*path, key))

    walk(list(states), ())
    return cut


def _class(leaf: Any, seen: list[Any]) -> int:
    """The number of a leaf's equals among those seen."""
    for number, other in enumerate(seen):
        if same_leaf(leaf, other):
            return number
    seen.append(leaf)
    return len(seen) - 1


def _differ(path: Path, values: Sequence[str], classes: Sequence[int] | None = None) -> None:
    """Say which ranks hold what at a path."""
    holders: dict[Any, list[int]] = {}
    for rank, value in enumerate(values):
        holders.setdefault((None if classes is None else classes[rank], value), []).append(rank)
    said = []
    for (_, value), ranks in holders.items():
        said.append(f"{value} on {'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks))}")
    other = " (with other values)" if len({value for _, value in holders}) == 1 else ""
    raise ValueError(
        f"merge: {shown(path)}: expected the same on all ranks, got {'; '.join(said)}{other}. What may differ is named "
        "by ignore (--ignore)"
    )


def _check_parts(path: Path, slot: Slot, parts: Sequence[Tensor], shards: int) -> None:
    dtypes = [str(part.dtype).removeprefix("torch.") for part in parts]
    if len(set(dtypes)) > 1:
        _differ(path, dtypes)
    if slot.field != "down_bias":
        return
    for first in range(0, len(parts), shards):  # not cut along F, so a block's shards hold it alike
        for rank in range(first + 1, first + shards):
            if not same_leaf(parts[first], parts[rank]):
                raise ValueError(
                    f"merge: {shown(path)}: expected the same on the shards of a block, got other values on rank "
                    f"{rank} than on rank {first}"
                )
