"""A training checkpoint as a tree of dicts and lists: its paths, its model and optimizer states, equality of leaves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dmoe.checkpoint.layout import expert_key

Path = tuple[Any, ...]  # keys and positions from the root


def shown(path: Path) -> str:
    """A path for people: its keys with slashes between, as dots are inside parameters' names."""
    return "/".join(map(str, path)) or "the top level"


def is_list(node: object) -> bool:
    """Whether a node is a list or a tuple: a branch whose keys are positions."""
    return isinstance(node, list | tuple)


def children(node: Any) -> Iterator[tuple[Any, Any]]:
    """Keys and values of a dict, positions and items of a list; nothing of a leaf."""
    if isinstance(node, Mapping):
        yield from node.items()
    elif is_list(node):
        yield from enumerate(node)


def rebuilt(node: Any, items: Mapping[Any, Any]) -> Any:
    """A branch of the same type with these children; what hangs on a ``state_dict()`` (``_metadata``) comes along."""
    if is_list(node):
        values = list(items.values())
        return values if isinstance(node, list) else tuple(values)
    if type(node).__name__ == "OrderedDict":
        copy = type(node)(items)
        copy.__dict__.update(vars(node))
        return copy
    return dict(items)


def branches(node: Any, path: Path = ()) -> Iterator[tuple[Path, Mapping[Any, Any]]]:
    """Every dict of a tree with its path, the outer ones first."""
    if isinstance(node, Mapping):
        yield path, node
    for key, value in children(node):
        yield from branches(value, (*path, key))


def is_model_state(node: Mapping[Any, Any]) -> bool:
    """Whether a dict is a model's ``state_dict()`` with experts in it."""
    return any(expert_key(key) is not None and isinstance(value, Tensor) for key, value in node.items())


def is_optimizer_state(node: Mapping[Any, Any]) -> bool:
    """Whether a dict is an optimizer's ``state_dict()``, by position or by name."""
    return isinstance(node.get("state"), Mapping) and isinstance(node.get("param_groups"), Sequence)


def check_plain(tree: Any, owner: str) -> None:
    """Refuse tensors that are parts of a distributed whole.

    Args:
        tree: anything.
        owner: whose it is, for the message.

    Raises:
        TypeError: a DTensor or a ShardedTensor.
    """
    for path, node in branches(tree):
        for key, value in node.items():
            kind = type(value).__name__
            if kind in ("DTensor", "ShardedTensor"):
                raise TypeError(
                    f"{owner}: {shown((*path, key))}: expected a plain tensor, got a {kind}: files of those are read "
                    "and written by torch.distributed.checkpoint, which knows their parts; or save value.to_local()"
                )


def same_leaf(first: Any, other: Any) -> bool:
    """Whether two leaves are equal: tensors in dtype, shape and every bit (NaN equals itself), the rest by ``==``."""
    if isinstance(first, Tensor) or isinstance(other, Tensor):
        return isinstance(first, Tensor) and isinstance(other, Tensor) and _same_bits(first, other)
    return type(first) is type(other) and (first == other or (first != first and other != other))


def _same_bits(first: Tensor, other: Tensor) -> bool:
    if first.dtype != other.dtype or first.shape != other.shape:
        return False
    if first.numel() == 0:
        return True
    a, b = (tensor.detach().to(first.device).contiguous().reshape(-1).view(torch.uint8) for tensor in (first, other))
    return torch.equal(a, b)


def describe(value: Any) -> str:
    """A leaf in a few words, for messages."""
    if isinstance(value, Tensor):
        number = f" {value.item()}" if value.numel() == 1 and not value.is_meta else ""
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}{number}"
    if isinstance(value, Mapping):
        return f"a dict of {len(value)}"
    if is_list(value):
        return f"a {type(value).__name__} of {len(value)}"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
