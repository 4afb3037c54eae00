"""How the tensors of a layout lie beside a field of a bank: pairs of functions that undo each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from dmoe.checkpoint.stored import Stored, concatenated, cut, mapped, reshaped


class Sizes(NamedTuple):
    """What a layer's tensors do not all tell by themselves.

    Attributes:
        experts: that are in them.
        hidden: H, by the router; 0 where there is none.
    """

    experts: int
    hidden: int


@dataclass(frozen=True)
class Map:
    """How the tensors of a layout lie beside a field of the bank.

    Attributes:
        join: their tensors to the field.
        split: the field to their tensors: the same numbers in the same shapes as before.
    """

    join: Callable[[list[Stored], Sizes], Stored]
    split: Callable[[Stored, Sizes], list[Stored]]

    def after(self, first: Map) -> Map:
        """This map of tensors that ``first`` has been applied to, each of them."""
        return Map(
            lambda parts, sizes: self.join([first.join([part], sizes) for part in parts], sizes),
            lambda ours, sizes: [each for part in self.split(ours, sizes) for each in first.split(part, sizes)],
        )


def by_rows(join: Callable[[Tensor], Tensor], split: Callable[[Tensor], Tensor]) -> Map:
    """One tensor to one, where an expert's rows are made of the same expert's."""
    return Map(
        lambda parts, _: mapped(parts, lambda tensors: join(tensors[0]), by_rows=True),
        lambda ours, _: [mapped([ours], lambda tensors: split(tensors[0]), by_rows=True)],
    )


def _halves(ours: Stored, _: Sizes) -> list[Stored]:
    width = ours.shape[1] // 2
    return [cut(ours, 1, 0, width), cut(ours, 1, width, 2 * width)]


SAME = Map(lambda parts, _: parts[0], lambda ours, _: [ours])
TRANSPOSED = by_rows(lambda theirs: theirs.mT, lambda ours: ours.mT)
# a matrix of no expert, (H, E) beside (E, H): a row of one needs all rows of the other
TURNED = Map(
    lambda parts, _: mapped(parts, lambda tensors: tensors[0].mT),
    lambda ours, _: [mapped([ours], lambda tensors: tensors[0].mT)],
)
# (E Y, ...) in a row beside (E, Y, ...)
FLAT = Map(
    lambda parts, sizes: reshaped(parts[0], (sizes.experts, parts[0].shape[0] // sizes.experts, *parts[0].shape[1:])),
    lambda ours, _: [reshaped(ours, (ours.shape[0] * ours.shape[1], *ours.shape[2:]))],
)
FLAT_TRANSPOSED = TRANSPOSED.after(FLAT)
# a gate's and an up projection's rows, (E, F, ...) each, beside (E, 2F, ...)
PAIR = Map(
    lambda parts, _: concatenated(parts, 1),
    _halves,
)
PAIR_FLAT = PAIR.after(FLAT)
# (E, 2, F, ...) beside (E, 2F, ...)
TWO = by_rows(lambda theirs: theirs.flatten(1, 2), lambda ours: ours.unflatten(1, (2, -1)))
# rows gate 0, up 0, gate 1, up 1 ... beside the gate's and then up's
TURNS = by_rows(
    lambda theirs: theirs.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2),
    lambda ours: ours.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2),
)
TURNS_TRANSPOSED = TURNS.after(TRANSPOSED)
# a row, (1, ...), beside (...)
ROW = Map(lambda parts, _: reshaped(parts[0], parts[0].shape[1:]), lambda ours, _: [reshaped(ours, (1, *ours.shape))])
# two (F, H) beside (2F, H)
PAIR_OF_ONE = Map(
    lambda parts, _: concatenated(parts, 0),
    lambda ours, _: [cut(ours, 0, 0, ours.shape[0] // 2), cut(ours, 0, ours.shape[0] // 2, ours.shape[0])],
)
