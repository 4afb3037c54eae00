"""What the experts in a checkpoint are: sizes and bytes of each layer, and which rank holds which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dmoe.checkpoint.layout import expert_key, is_packed
from dmoe.checkpoint.tree import branches, check_plain, is_model_state, shown


@dataclass(frozen=True)
class LayerPart:
    """The experts of one layer in one file, or in one state.

    Attributes:
        name: path of the layer, as ``model/blocks.0.ffn.experts``.
        num_experts: how many are here; None where they are packed and without biases: then nothing tells.
        ffn_size: F of each expert, or the sum of all widths where they are packed side by side.
        packed: whether they are.
        hidden_size: H.
        gated, biased: whether the experts have a gate, and biases.
        dtypes: of the parameters, as ``float32``; more than one is unusual.
        parameters: numbers in all of the layer's experts here, without an optimizer's states.
        bytes: the same, in bytes.
        routed_experts: E of the router beside them; None without one.
    """

    name: str
    num_experts: int | None
    ffn_size: int
    packed: bool
    hidden_size: int
    gated: bool
    biased: bool
    dtypes: tuple[str, ...]
    parameters: int
    bytes: int
    routed_experts: int | None


def inspect_state(state: Mapping[str, Any]) -> list[LayerPart]:
    """The MoE layers of a checkpoint in its order: one process's, or one rank's.

    Args:
        state: a model's ``state_dict()``, or dicts and lists around some.

    Raises:
        ValueError: a layer whose ``down_proj`` is missing or has an impossible shape.
        TypeError: DTensors.
    """
    check_plain(state, "inspect")
    found = []
    for path, model in branches(state):
        if not is_model_state(model):
            continue
        layers: dict[str, dict[str, Tensor]] = {}
        for key, value in model.items():
            named = expert_key(key)
            if named is not None and isinstance(value, Tensor):
                layers.setdefault(named[0], {})[named[1]] = value
        for layer, fields in layers.items():
            router = model.get(f"{layer.removesuffix('experts')}router.weight")
            found.append(_layer(shown((*path, layer)), fields, router))
    return found


def _layer(name: str, fields: Mapping[str, Tensor], router: object) -> LayerPart:
    down = fields.get("down_proj")
    if down is None or down.dim() not in (2, 3):
        got = "none" if down is None else f"shape {tuple(down.shape)}"
        raise ValueError(f"inspect: {name}.down_proj: expected (E, H, F), or (H, sum F), got {got}")
    packed, bias = is_packed("down_proj", down), fields.get("down_bias")
    experts = None if bias is None else bias.shape[0]
    return LayerPart(
        name=name,
        num_experts=experts if packed else down.shape[0],
        ffn_size=down.shape[-1],
        packed=packed,
        hidden_size=down.shape[-2],
        gated="gate_up_proj" in fields,
        biased=bias is not None,
        dtypes=tuple(dict.fromkeys(str(tensor.dtype).removeprefix("torch.") for tensor in fields.values())),
        parameters=sum(tensor.numel() for tensor in fields.values()),
        bytes=sum(tensor.numel() * tensor.element_size() for tensor in fields.values()),
        routed_experts=router.shape[0] if isinstance(router, Tensor) and router.dim() == 2 else None,
    )


def report(files: Sequence[str], states: Sequence[Sequence[LayerPart]]) -> str:
    """Lines for people: a table of the layers of each file, and for several files who holds which experts.

    Args:
        files: names, in the order of the ranks.
        states: what `inspect_state` found in each.
    """
    lines = []
    for rank, (file, parts) in enumerate(zip(files, states, strict=True)):
        head = f"rank {rank}: " if len(files) > 1 else ""
        total, size = sum(part.parameters for part in parts), sum(part.bytes for part in parts)
        lines.append(f"{head}{file}: {len(parts)} MoE layers, {total:,} parameters of experts, {size:,} bytes")
        lines += [f"  {line_of(part)}" for part in parts]
    if len(files) > 1:
        lines.append("who holds what:")
        for name in dict.fromkeys(part.name for parts in states for part in parts):
            by_rank = [next((part for part in parts if part.name == name), None) for parts in states]
            lines.append(f"  {name}: " + "; ".join(_holdings(by_rank)))
    return "\n".join(lines)


def line_of(part: LayerPart) -> str:
    """A layer in a line."""
    count = "experts side by side" if part.num_experts is None else f"{part.num_experts} experts"
    of = "" if part.routed_experts in (None, part.num_experts) else f" of {part.routed_experts}"
    width = f"widths that sum to {part.ffn_size}" if part.packed else f"width {part.ffn_size}"
    kind = ("gated" if part.gated else "plain") + (" with biases" if part.biased else "")
    return (
        f"{part.name}: {count}{of}, {width}, hidden size {part.hidden_size}, {kind}, {' and '.join(part.dtypes)}, "
        f"{part.parameters:,} parameters, {part.bytes:,} bytes"
    )


def _holdings(by_rank: Sequence[LayerPart | None]) -> list[str]:
    """Which experts each rank holds, if ranks hold equal blocks in order, and several of them slices of one block."""
    known = [part for part in by_rank if part is not None]
    first = known[0]
    each, total = first.num_experts, first.routed_experts
    shards = 1
    if each and total and len(by_rank) * each % total == 0:  # more than the router knows: slices along F
        shards = max(1, len(by_rank) * each // total)
    said = []
    for rank, part in enumerate(by_rank):
        if part is None:
            said.append(f"rank {rank} nothing")
        elif each is None or part.num_experts != each:
            said.append(f"rank {rank} {line_of(part).split(': ', 1)[1].split(',')[0]}")
        else:
            start = rank // shards * each
            experts = f"expert {start}" if each == 1 else f"experts {start} to {start + each - 1}"
            said.append(f"rank {rank} {experts}" + (f", slice {rank % shards} of {shards}" if shards > 1 else ""))
    return said
