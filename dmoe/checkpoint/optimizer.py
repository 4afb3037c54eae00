"""Which state of an optimizer belongs to which parameter of the model."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from torch import Tensor

from dmoe.checkpoint.layout import expert_key, is_packed
from dmoe.checkpoint.tree import Path, shown


def expert_states(optimizer: Mapping[str, Any], model: Mapping[str, Any], path: Path) -> dict[Any, str]:
    """The keys in ``optimizer["state"]`` that belong to expert parameters, and these parameters' names.

    By-name states (``torch.distributed.checkpoint.state_dict.get_optimizer_state_dict``) and groups with
    ``param_names`` (an optimizer made from ``model.named_parameters()``) say so. Otherwise positions are matched by the
    shapes of their states and, where several parameters have that shape, by order: each group is taken to list its
    parameters in the model's order.

    Args:
        optimizer: a dict with ``state`` and ``param_groups``.
        model: the ``state_dict()`` of the model that it trains.
        path: of the optimizer's state, for messages.

    Raises:
        ValueError: a position that could be an expert's or not, or that of two fields.
    """
    names: dict[Any, str] = {}
    groups: list[list[Any]] = []
    for group in optimizer["param_groups"]:
        keys = list(group["params"])
        if "param_names" in group:
            names |= dict(zip(keys, group["param_names"], strict=True))
        elif any(isinstance(key, str) for key in keys):
            names |= {key: key for key in keys}
        else:
            groups.append(keys)
    names |= {key: key for key in optimizer["state"] if isinstance(key, str)}
    found = {key: name for key, name in names.items() if key in optimizer["state"] and expert_key(name) is not None}
    for key, name in found.items():
        if name not in model:
            raise ValueError(f"{shown((*path, 'state', key))}: expected a parameter of the model, and it has no {name}")
    return found | _by_shape_and_order(optimizer["state"], groups, model, path)


def _by_shape_and_order(
    state: Mapping[Any, Any], groups: Sequence[Sequence[Any]], model: Mapping[str, Any], path: Path
) -> dict[Any, str]:
    names = [name for name, value in model.items() if isinstance(value, Tensor)]
    shapes = [tuple(model[name].shape) for name in names]
    by_shape: dict[Any, set[int]] = {}
    for key in (key for group in groups for key in group):
        own = {tuple(t.shape) for t in state.get(key, {}).values() if isinstance(t, Tensor) and t.dim()}
        # A parameter that made no step yet says nothing of its shape, and stands somewhere in the order all the same.
        by_shape[key] = {n for n, shape in enumerate(shapes) if shape in own} if own else set(range(len(names)))
    known = [[key for key in group if by_shape[key]] for group in groups]  # the others are of another model
    possible = _narrowed(known, by_shape) or by_shape
    found = {}
    for key, positions in possible.items():
        candidates = [names[position] for position in sorted(positions)]
        if key not in state or not any(expert_key(name) for name in candidates):
            continue
        if len({_cut_alike(name, model) for name in candidates}) > 1:
            shape = shapes[min(positions)]
            raise ValueError(
                f"{shown((*path, 'state', key))}: expected one parameter of shape {shape} that it can belong to, got "
                f"{', '.join(candidates)}. Make the optimizer from model.named_parameters(), or save its state by name "
                "(torch.distributed.checkpoint.state_dict.get_optimizer_state_dict)"
            )
        found[key] = candidates[0]
    return found


def _cut_alike(name: str, model: Mapping[str, Any]) -> Hashable:
    """Equal for parameters of one shape that are cut the same way, whichever of them it is."""
    found = expert_key(name)
    return found if found is None or is_packed(found[1], model[name]) else found[1]


def _narrowed(groups: Sequence[Sequence[Any]], by_shape: Mapping[Any, set[int]]) -> dict[Any, set[int]] | None:
    """What is still possible when groups are in the model's order and no parameter is in two; None if nothing is."""
    possible = {key: set(positions) for key, positions in by_shape.items()}
    while True:
        before = {key: len(positions) for key, positions in possible.items()}
        for group in groups:
            if not _ordered(group, possible):
                return None
        taken = {next(iter(positions)): key for key, positions in possible.items() if len(positions) == 1}
        for key, positions in possible.items():
            positions -= {position for position, owner in taken.items() if owner != key}
        if any(before[key] and not positions for key, positions in possible.items()):
            return None
        if before == {key: len(positions) for key, positions in possible.items()}:
            return possible


def _ordered(group: Sequence[Any], possible: dict[Any, set[int]]) -> bool:
    """Drop from ``possible`` what cannot be when the group's positions ascend; whether anything is left."""
    first = -1
    for key in group:
        possible[key] = {position for position in possible[key] if position > first}
        first = min(possible[key], default=-1)
        if not possible[key]:
            return False
    last: int | None = None
    for key in reversed(group):
        possible[key] = {position for position in possible[key] if last is None or position < last}
        if not possible[key]:
            return False
        last = max(possible[key])
    return True
