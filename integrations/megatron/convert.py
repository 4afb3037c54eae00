"""Plain state dicts of Megatron's own MoE layers, and of MegaBlocks' fork, in dmoe's names and shapes, and back.

Distributed checkpoints need none of this: dmoe's layer saves and loads Megatron's own names there. This is for
``torch.save``'s files and for state dicts in memory. A file of an expert-parallel rank holds that rank's experts under
local numbers in every layout, so ranks are converted one by one; :func:`convert_ranks` also brings them to another
number of ranks. What a state dict holds besides MoE layers passes through, below any prefix.

Layouts are described in ``expert_layouts.py``. ``_extra_state``, what Transformer Engine's linears keep beside their
weights, has no counterpart and is left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dmoe.checkpoint import merge_states, split_state
from dmoe.checkpoint.formats.megatron import LEFT_OUT
from dmoe.checkpoint.layers import Bank, Found, check_bank, write_layer
from dmoe.checkpoint.stored import Stored, held
from dmoe.integrations.megatron.expert_layouts import LAYOUTS, TABLES, LayoutName


@torch.no_grad()
def convert_state(
    state: Mapping[str, Any], to: LayoutName, *, expert_parallel_size: int = 1, num_experts: int | None = None
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
    tensors = {name: _stored(value) for name, value in state.items() if isinstance(value, Tensor | Stored)}
    layers = _find(tensors)
    if not layers:
        raise ValueError("convert: expected experts of Megatron, MegaBlocks or dmoe in the state dict, found none")
    owners = {name: prefix for prefix, found in layers.items() for of in found.names.values() for name in of.values()}
    converted: dict[str, Any] = {}
    done: set[str] = set()
    for key, value in state.items():
        prefix = owners.get(key)
        if prefix is None:
            if not _is_left_out(key, layers):
                converted[key] = value
        elif prefix not in done:
            done.add(prefix)
            found, where = layers[prefix], f"convert: {prefix or 'the layer'}"
            here = _experts_here(found, tensors, expert_parallel_size, num_experts)
            bank, _ = found.read(tensors, here, where)
            for name, stored in _written(check_bank(bank, where), found, to, where, expert_parallel_size).items():
                # In files they stay where they are; of tensors a file would hold all the memory that a view is of.
                in_memory = isinstance(value, Tensor)
                converted[prefix + name] = stored.read().to(value.device, copy=True) if in_memory else stored
    return converted


def convert_ranks(
    states: Sequence[Mapping[str, Any]], to: LayoutName, *, ranks: int | None = None, num_experts: int | None = None
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
    if ranks not in (None, given):  # what follows looks at values
        states = [
            {key: value.read() if isinstance(value, Stored) else value for key, value in s.items()} for s in states
        ]
    if ranks is None or ranks == given:
        return [convert_state(state, to, expert_parallel_size=given, num_experts=num_experts) for state in states]
    parts = [convert_state(state, "dmoe", expert_parallel_size=given, num_experts=num_experts) for state in states]
    whole = merge_states(parts) if given > 1 else parts[0]
    parts = split_state(whole, ranks) if ranks != 1 else [whole]
    return parts if to == "dmoe" else [convert_state(part, to, expert_parallel_size=len(parts)) for part in parts]


def _stored(value: Any) -> Stored:
    return value if isinstance(value, Stored) else held(value)


def _find(tensors: Mapping[str, Stored]) -> dict[str, Found]:
    """The experts of each layer by the layer's prefix, each in one layout.

    Raises:
        ValueError: a layer in several.
    """
    layers: dict[str, Found] = {}
    for table in TABLES.values():
        for prefix, found in table.find(tensors).items():
            if other := layers.get(prefix):
                odd = next(of[min(of)] for (row, _), of in found.names.items() if row.field in ("up", "down"))
                where = f"convert: {prefix or 'the layer'}"
                raise ValueError(f"{where}: expected one layout, found {other.layout.name} and, in {odd}, {table.name}")
            layers[prefix] = found
    return layers


def _is_left_out(key: Any, layers: Mapping[str, Found]) -> bool:
    """Whether a value is what experts keep beside their weights."""
    if not isinstance(key, str) or not re.search(LEFT_OUT, key):
        return False
    return any(key.startswith(f"{prefix}experts.") for prefix in layers)


def _written(bank: Bank, found: Found, to: LayoutName, where: str, ranks: int) -> dict[str, Stored]:
    output_bias = bank.get("output_bias")
    if output_bias is not None:
        if to != "dmoe":
            raise ValueError(
                f"{where}: {to}: a bias of the whole layer, as MegaBlocks has it, has no place in Megatron's layer, "
                "where gate weights multiply the experts' biases; only dmoe can hold it"
            )
        if found.layout.name != "dmoe":  # a model with biases in its linears: here the router has one, too
            zeros = torch.zeros(bank["up"].shape[0] * ranks, dtype=output_bias.dtype)
            bank = {"router.weight": bank["router.weight"], "router.bias": held(zeros), **bank}
    if to == "grouped" and "up_bias" in bank:
        raise ValueError(f"{where}: grouped: GroupedMLP has no biases, and these experts have; choose sequential or te")
    return write_layer(TABLES[to], bank, where)


def _experts_here(found: Found, tensors: Mapping[str, Stored], ranks: int, num_experts: int | None) -> int | None:
    """How many experts of a layer a state holds; None if nothing tells."""
    total = num_experts if num_experts is not None else found.routed(tensors)
    if total is not None and total % ranks:
        raise ValueError(f"convert: {found.prefix}: expected experts that {ranks} ranks can share evenly, got {total}")
    return None if total is None else total // ranks
