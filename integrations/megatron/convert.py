"""Plain state dicts of Megatron's own MoE layers, and of MegaBlocks' fork, in dmoe's names and shapes, and back.

Distributed checkpoints need none of this: dmoe's layer saves and loads Megatron's own names there. This is for
``torch.save``'s files and for state dicts in memory. A file of an expert-parallel rank holds that rank's experts under
local numbers in every layout, so ranks are converted one by one; :func:`convert_ranks` also brings them to another
number of ranks. What a state dict holds besides MoE layers passes through, below any prefix.

Layouts are described in ``expert_layouts.py``. ``_extra_state``, what Transformer Engine's linears keep beside their
weights, has no counterpart and is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dmoe.checkpoint import merge_states, split_state
from dmoe.integrations.megatron.expert_layouts import LAYOUTS, RENAMED, Found, Layout, classify, read, write


@torch.no_grad()
def convert_state(
    state: Mapping[str, Any], to: Layout, *, expert_parallel_size: int = 1, num_experts: int | None = None
) -> dict[str, Any]:
    """A model's state dict with every MoE layer in another layout.

    Args:
        state: ``model.state_dict()`` of one rank, with experts in any layout; their names tell which.
        to: ``dmoe`` (``DmoeLayer``), ``dmoe_experts`` (``DmoeExperts``), ``sequential``, ``te`` or ``grouped``.
        expert_parallel_size: ranks that the experts of each layer are spread over. ``grouped`` and MegaBlocks keep no
            dimension for experts: how many are here is the number of the router's rows over this.
        num_experts: of a layer on all ranks together, for states without routers.

    Returns:
        A new dict in the order of the old one. Experts have memory of their own; other values are the given ones.

    Raises:
        ValueError: a layer whose experts are in no known layout or incomplete, or a state without any.
    """
    if to not in LAYOUTS:
        raise ValueError(f"convert: to: expected one of {', '.join(LAYOUTS)}, got {to!r}")
    layers = _find(state)
    if not layers:
        raise ValueError("convert: expected experts of Megatron, MegaBlocks or dmoe in the state dict, found none")
    converted: dict[str, Any] = {}
    done: set[str] = set()
    for key, value in state.items():
        prefix = _layer_of(key, layers)
        if prefix is None:
            converted[key] = value
        elif not _is_of_experts(key[len(prefix) :]):
            converted[prefix + _renamed(key[len(prefix) :], layers[prefix].layout, to)] = value
        elif prefix not in done:
            done.add(prefix)
            here = _experts_here(state, prefix, layers[prefix].layout, expert_parallel_size, num_experts)
            bank = read(layers[prefix], here)
            for name, tensor in write(bank, to, layers[prefix].where).items():
                # A file would hold all the memory that a view is of.
                converted[prefix + name] = tensor.clone(memory_format=torch.contiguous_format)
            if bank.output_bias is not None and layers[prefix].layout == "megablocks":
                # A model with biases in its linears: here the router has one, too.
                rows = len(bank.up) * expert_parallel_size
                converted[prefix + _renamed("router.bias", "megablocks", to)] = bank.output_bias.new_zeros(rows)
    return converted


def convert_ranks(
    states: Sequence[Mapping[str, Any]], to: Layout, *, ranks: int | None = None, num_experts: int | None = None
) -> list[dict[str, Any]]:
    """The state dicts of all expert-parallel ranks, in another layout and for another number of ranks.

    Rank r of W holds experts ``r E / W`` to ``(r + 1) E / W - 1``, in order.

    Args:
        states: of each rank, in order.
        to: see :func:`convert_state`.
        ranks: how many states to make; None for as many as were given. Where it is another number, what is no expert
            must be alike on all ranks.
        num_experts: see :func:`convert_state`.

    Raises:
        ValueError: see :func:`convert_state` and :func:`dmoe.checkpoint.merge_states`.
    """
    given = len(states)
    if ranks is None or ranks == given:
        return [convert_state(state, to, expert_parallel_size=given, num_experts=num_experts) for state in states]
    parts = [convert_state(state, "dmoe", expert_parallel_size=given, num_experts=num_experts) for state in states]
    whole = merge_states(parts) if given > 1 else parts[0]
    parts = split_state(whole, ranks) if ranks != 1 else [whole]
    return parts if to == "dmoe" else [convert_state(part, to) for part in parts]


def _find(state: Mapping[str, Any]) -> dict[str, Found]:
    """The experts of each layer by the layer's prefix."""
    layers: dict[str, Found] = {}
    for key, value in state.items():
        named = classify(key) if isinstance(key, str) and isinstance(value, Tensor) else None
        if named is None:
            continue
        prefix, layout, name, expert = named
        found = layers.setdefault(prefix, Found(f"convert: {prefix or 'the layer'}", layout))
        if found.layout != layout:
            raise ValueError(f"{found.where}: expected one layout, found {found.layout} and, in {key}, {layout}")
        if expert is None:
            found.tensors[name] = value
        else:
            found.numbered.setdefault(name, {})[expert] = value
    for key in state:
        found_in = _layer_of(key, layers)
        if found_in is None or not _is_of_experts(key[len(found_in) :]) or key.endswith("._extra_state"):
            continue
        if classify(key) is None:
            raise ValueError(
                f"{layers[found_in].where}: {key}: expected a name of the layout {layers[found_in].layout}"
            )
    return layers


def _layer_of(key: Any, layers: Mapping[str, Found]) -> str | None:
    """Which of the layers a key belongs to: the prefix that it starts with, at any dot."""
    if not isinstance(key, str):
        return None
    ends = [position + 1 for position, letter in enumerate(key) if letter == "."]
    return next((key[:end] for end in (0, *ends) if key[:end] in layers), None)


def _is_of_experts(name: str) -> bool:
    return name.startswith(("experts.", "moe.experts.", "moe.output_bias"))


def _renamed(name: str, layout: str, to: str) -> str:
    """What else a layer has, in the words of another layout."""
    in_megatron = RENAMED.get(layout, {}).get(name, name)
    return {native: own for own, native in RENAMED.get(to, {}).items()}.get(in_megatron, in_megatron)


def _router(state: Mapping[str, Any], prefix: str, layout: str) -> Tensor | None:
    names = {native: own for own, native in RENAMED.get(layout, {}).items()}
    return state.get(prefix + names.get("router.weight", "router.weight"))


def _experts_here(
    state: Mapping[str, Any], prefix: str, layout: str, ranks: int, num_experts: int | None
) -> int | None:
    """How many experts of a layer this state holds; None if nothing tells."""
    router = _router(state, prefix, layout)
    total = num_experts if num_experts is not None else None if router is None else len(router)
    if total is not None and total % ranks:
        raise ValueError(f"convert: {prefix}: expected experts that {ranks} ranks can share evenly, got {total}")
    return None if total is None else total // ranks
