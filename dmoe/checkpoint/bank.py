"""The fields of a MoE layer, between layouts: as dmoe's state dict, from the parts of ranks, and cut into them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from dmoe.checkpoint.layers import BIASES, Bank, Layout, check_bank, is_gated
from dmoe.checkpoint.layout import FFN_DIM
from dmoe.checkpoint.stored import Stored, concatenated, cut, held, mapped, reshaped, same

_SHARED = "shared_expert.mlp."
# Fields that are of no expert, in dmoe's names.
_RENAMED = {
    "shared_gate": "shared_expert.gate.weight",
}
_EXPERTS = ("up", "down", *BIASES)


def to_dmoe(bank: Bank, where: str, *, sliced: bool = False) -> dict[str, Stored]:
    """A layer's tensors by the names, and in the shapes, of :class:`dmoe.MoE`'s state dict.

    Args:
        bank, where, sliced: see :func:`dmoe.checkpoint.layers.check_bank`.

    Raises:
        ValueError: shapes that do not belong together.
    """
    check_bank(bank, where, sliced=sliced)
    gated = is_gated(bank)
    named: dict[str, Stored] = {}
    for name, stored in bank.items():
        if name in _EXPERTS:
            named["experts." + _field(name, gated)] = _two(stored) if gated and name.startswith("up") else stored
        elif name.startswith("shared_") and name != "shared_gate":
            kind = name.removeprefix("shared_")
            whole = reshaped(stored, (1, *stored.shape))
            named[_SHARED + _field(kind, gated)] = _two(whole) if gated and kind.startswith("up") else whole
        else:
            named[_RENAMED.get(name, name)] = stored
    return named


def from_dmoe(tensors: Mapping[str, Stored], where: str, *, sliced: bool = False) -> Bank:
    """The way back of :func:`to_dmoe`.

    Raises:
        ValueError: experts that are missing, or of widths that differ.
    """
    bank: Bank = {}
    fields = {"gate_up_proj": "up", "up_proj": "up", "down_proj": "down"}
    fields |= {"gate_up_bias": "up_bias", "up_bias": "up_bias", "down_bias": "down_bias"}
    back = {ours: name for name, ours in _RENAMED.items()}
    for name, stored in tensors.items():
        prefix = next((each for each in ("experts.", _SHARED) if name.startswith(each)), "")
        kind = fields.get(name[len(prefix) :]) if prefix else None
        if kind is None:
            bank[back.get(name, name)] = stored
            continue
        if len(stored.shape) < (2 if "bias" in kind else 3):
            raise ValueError(
                f"{where}: expected experts of one width, whose {name} has a dimension for experts, got {stored.shape}"
            )
        one = mapped([stored], lambda t: t[0].flatten(1, 2), by_rows=True) if "gate_up" in name else stored
        bank[("shared_" if prefix == _SHARED else "") + kind] = (
            reshaped(one, one.shape[1:]) if prefix == _SHARED else one
        )
    for needed in ("up", "down"):
        if needed not in bank:
            raise ValueError(f"{where}: expected experts.{needed}_proj, found none beside {', '.join(tensors)}")
    return check_bank(bank, where, sliced=sliced)


def with_both_biases(bank: Bank, slices: int) -> Bank:
    """A bank whose experts have one bias, with zeros (in ``slices`` along H) for the other: dmoe has both or none."""
    (there, *more), gone = [name for name in BIASES if name in bank] or [""], [b for b in BIASES if b not in bank]
    if not there or more:
        return bank
    experts, hidden, _ = bank["down"].shape
    shape = (experts, hidden // slices) if gone[0] == "down_bias" else bank["up"].shape[:2]
    return {**bank, gone[0]: held(torch.zeros(shape, dtype=bank[there].dtype))}


def _field(name: str, gated: bool) -> str:
    told = {"up": "gate_up_proj" if gated else "up_proj", "down": "down_proj"}
    return told.get(name) or ("gate_" + name if gated and name == "up_bias" else name)


def _two(stored: Stored) -> Stored:
    return mapped([stored], lambda tensors: tensors[0].unflatten(1, (2, -1)), by_rows=True)


def whole_layer(
    parts: Sequence[Mapping[str, Stored]], layout: Layout, num_experts: int, where: str
) -> dict[str, Stored]:
    """One layer from the parts of all ranks, under dmoe's names.

    Args:
        parts: each rank's, in dmoe's names.
        layout: says how ranks divide experts among them where there are more ranks than experts.
        num_experts: E, over all ranks.
        where: the layer, for messages.

    Raises:
        ValueError: parts that do not make E experts, or differ where ranks hold the same.
    """
    ranks = len(parts)
    layout.check_ranks(ranks, num_experts, where)
    here = parts[0]["experts.down_proj"].shape[0]
    if ranks == 1:
        if here != num_experts:
            raise ValueError(f"{where}: expected {num_experts} experts, which its router chooses from, got {here}")
        return dict(parts[0])
    if ranks * here % num_experts or num_experts % here:
        raise ValueError(
            f"{where}: expected the {num_experts} experts that its router chooses from in {ranks} ranks' files, got "
            f"{here} in each: a rank's file is missing, or one too many"
        )
    blocks = num_experts // here
    whole: dict[str, Stored] = {}
    for name in parts[0]:
        if missing := [rank for rank, part in enumerate(parts) if name not in part]:
            raise ValueError(f"{where}: {name}: expected it on all ranks, got none on rank {missing[0]}")
        of_ranks = [part[name] for part in parts]
        field = name.removeprefix("experts.")
        if field == name:
            whole[name] = alike(of_ranks, f"{where}: {name}")
            continue
        by_block = [[of_ranks[r] for r in _ranks_of(block, blocks, ranks, layout)] for block in range(blocks)]
        dim = FFN_DIM[field]
        if layout.replicated:
            joined = [alike(block, f"{where}: {name}") for block in by_block]
        elif dim is None:
            joined = [_bias(block, layout, f"{where}: {name}") for block in by_block]
        else:
            joined = [concatenated(block, dim) for block in by_block]
        whole[name] = concatenated(joined, 0)
    from_dmoe(whole, where)  # which looks at all shapes
    return whole


def part_of_layer(whole: Mapping[str, Stored], layout: Layout, rank: int, ranks: int, where: str) -> dict[str, Stored]:
    """What one rank holds of a layer, under dmoe's names: the way back of :func:`whole_layer`.

    Raises:
        ValueError: experts, or widths, that so many ranks cannot share evenly.
    """
    experts = whole["experts.down_proj"].shape[0]
    layout.check_ranks(ranks, experts, where)
    blocks = min(ranks, experts)
    slices = ranks // blocks
    width = whole["experts.down_proj"].shape[2]
    if experts % blocks or ranks % blocks or (width % slices and not layout.replicated):
        raise ValueError(
            f"{where}: expected experts, or slices of them, that {ranks} ranks can share evenly, got {experts} of "
            f"width {width}"
        )
    each = experts // blocks
    block = next(b for b in range(blocks) if rank in _ranks_of(b, blocks, ranks, layout))
    place = _ranks_of(block, blocks, ranks, layout).index(rank)
    part = {}
    for name, stored in whole.items():
        field = name.removeprefix("experts.")
        if field != name:
            stored = cut(stored, 0, block * each, (block + 1) * each)
            dim = FFN_DIM[field] if layout.bias_sliced is False or field != "down_bias" else 1
            if dim is not None and slices > 1 and not layout.replicated:
                length = stored.shape[dim] // slices
                stored = cut(stored, dim, place * length, (place + 1) * length)
        part[name] = stored
    return part


def alike(parts: Sequence[Stored], where: str) -> Stored:
    """What all ranks hold alike.

    Raises:
        ValueError: they do not; the message names both files.
    """
    for rank, part in enumerate(parts[1:], 1):
        if not same(parts[0], part):
            raise ValueError(
                f"{part.where or f'rank {rank}'}: {where}: expected the same as in {parts[0].where or 'rank 0'}, got "
                f"{'other values' if part.shape == parts[0].shape else f'{part.shape} beside {parts[0].shape}'}"
            )
    return parts[0]


def _bias(block: Sequence[Stored], layout: Layout, where: str) -> Stored:
    """Of the down projection: cut along H as Tutel does, or the same in every slice."""
    return concatenated(block, 1) if layout.bias_sliced else alike(block, where)


def _ranks_of(block: int, blocks: int, ranks: int, layout: Layout) -> list[int]:
    """Which ranks hold a block of experts, in the order of their slices."""
    if layout.slices_first:
        return list(range(block * (ranks // blocks), (block + 1) * (ranks // blocks)))
    return list(range(block, ranks, blocks))
