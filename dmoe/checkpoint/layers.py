"""How a layout keeps the tensors of one MoE layer: a table of its names, and of how their shapes differ from ours.

Whatever a layout does, its table turns it into the same *bank* of fields, of the experts of one rank or of all:

===================  ==================  ==========================================================================
field                shape               what
===================  ==================  ==========================================================================
``router.*``         as in dmoe          the router's tensors, by dmoe's names
``up``               ``(E, X, H)``       X = F, or 2 F where experts are gated: the gate's rows, then up's
``down``             ``(E, H, F)``
``up_bias``          ``(E, X)``
``down_bias``        ``(E, H)``
``output_bias``      ``(H,)``            one bias of the whole layer
``shared_*``         without E           ``shared_up (X, H)``, ``shared_down (H, F)``, biases, ``shared_gate (1, H)``
===================  ==================  ==========================================================================

Any other field passes through under its own name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice

from dmoe.checkpoint.maps import SAME, Map, Sizes
from dmoe.checkpoint.stored import Stored, stacked, taken

Bank = dict[str, Stored]
BIASES = ("up_bias", "down_bias")  # of the experts: a bank has both or none


@dataclass(frozen=True)
class Row:
    """One field of the bank in a layout.

    Attributes:
        field: of the bank.
        theirs: names behind the layer's prefix; with ``{e}`` for an expert's number, a tensor for each expert.
        map: how they become the field: of all experts, those with ``{e}`` stacked first.
        gated: for writing: only where experts are gated, or are not; None for both.
        counted: whether the map needs to know how many experts there are.
        dims: of each of their tensors, without the dimension of experts where the name has ``{e}``; None for any.
    """

    field: str
    theirs: tuple[str, ...]
    map: Map = SAME
    gated: bool | None = None
    dims: int | None = None
    counted: bool = False

    @cached_property
    def patterns(self) -> tuple[re.Pattern[str], ...]:
        """Of whole names, with the groups ``layer`` and, maybe, ``e``."""
        escaped = (re.escape(name).replace(re.escape("{e}"), r"(?P<e>\d+)") for name in self.theirs)
        return tuple(re.compile(rf"(?P<layer>(?:.*\.)?){name}") for name in escaped)

    @property
    def by_expert(self) -> bool:
        """Whether each expert has tensors of its own."""
        return "{e}" in self.theirs[0]


@dataclass(frozen=True)
class Layout:
    """The names of a system's MoE layer.

    Attributes:
        name: of the layout.
        rows: the table; of several rows for one field the first is taken whose tensors are all there, unless one with
            more tensors is there as well.
        inside: prefixes behind the layer's own under which no other names may be than the table's: an unknown one
            would be lost.
        left_out: names behind the layer's prefix that have no counterpart and are not taken over.
        slices_first: with more ranks than blocks of experts, whether neighbours hold slices of F of the same experts
            (dmoe, Tutel), or the same slice of different ones (MegaBlocks).
        routerless: whether a layer may have no router that would tell how many experts all ranks have (hash layers).
        bias_sliced: whether ``down_bias`` is cut along H then (Tutel), or whole on every slice.
        sliceable: whether more ranks than experts hold slices of F; elsewhere no rank is without an expert of its own.
        replicated: whether, with more ranks than experts, ranks hold copies of whole experts (fairseq).
    """

    name: str
    rows: tuple[Row, ...]
    inside: tuple[str, ...] = ("experts.",)
    left_out: str | None = None
    slices_first: bool = True
    bias_sliced: bool = False
    sliceable: bool = False
    routerless: bool = False
    replicated: bool = False

    @property
    def counted(self) -> bool:
        """Whether nothing but the router tells how many experts a file holds."""
        return any(row.counted for row in self.rows)

    def check_ranks(self, ranks: int, experts: int, where: str) -> None:
        """Raise ValueError where so many ranks cannot share a layer."""
        if ranks > experts and not (self.sliceable or self.replicated):
            raise ValueError(
                f"{where}: expected at most {experts} ranks, each with experts of its own, as {self.name} has it, got "
                f"{ranks}"
            )

    def find(self, names: Mapping[str, Stored] | Iterable[str]) -> dict[str, Found]:
        """The MoE layers among tensors, by prefix: every prefix with experts in this layout."""
        found: dict[str, Found] = {}
        dims = {name: len(tensor.shape) for name, tensor in names.items()} if isinstance(names, Mapping) else {}
        names = list(names)
        needed = [row for row in self.rows if row.field in ("up", "down")]
        for name in names:
            for row in needed:
                for pattern in row.patterns:
                    match = pattern.fullmatch(name)
                    if match and (row.dims is None or dims.get(name, row.dims) == row.dims):
                        found.setdefault(match["layer"], Found(self, match["layer"]))
        for name in names if found else ():
            for row in self.rows:
                for place, pattern in enumerate(row.patterns):
                    match = pattern.fullmatch(name)
                    if match and match["layer"] in found and (row.dims is None or dims.get(name, row.dims) == row.dims):
                        expert = int(match["e"]) if row.by_expert else 0
                        found[match["layer"]].names.setdefault((row, place), {})[expert] = name
        return found


@dataclass
class Found:
    """A MoE layer among tensors.

    Attributes:
        layout: in which it is.
        prefix: of its names.
        names: of each row's tensors, by row, place in the row and expert.
    """

    layout: Layout
    prefix: str
    names: dict[tuple[Row, int], dict[int, str]] = field(default_factory=dict)

    def has(self, row: Row) -> bool:
        """Whether all of a row's tensors are there, at least of one expert."""
        return all((row, place) in self.names for place in range(len(row.theirs)))

    def _hidden(self, tensors: Mapping[str, Stored]) -> int:
        for row in self.layout.rows:
            if row.field in ("router.projection", "router.weight") and row.map is SAME and self.has(row):
                return tensors[self.names[row, 0][0]].shape[-1]
        return 0

    def routed(self, tensors: Mapping[str, Stored]) -> int | None:
        """How many experts the router beside them chooses from; None without one."""
        for row in self.layout.rows:
            if row.field == "router.weight" and self.has(row):
                router = row.map.join([tensors[self.names[row, 0][0]]], Sizes(1, 0))
                return router.shape[0] if len(router.shape) == 2 else None
        return None

    def length_of(self, field: str, tensors: Mapping[str, Stored]) -> int:
        """The first dimension of a field's tensor; 0 where there is none."""
        rows = [row for row in self.layout.rows if row.field == field and self.has(row)]
        return tensors[self.names[rows[0], 0][0]].shape[0] if rows else 0

    def num_experts(self) -> int | None:
        """How many experts have tensors of their own; None where the layout has none such."""
        numbers = [e for (row, _), of_row in self.names.items() if row.by_expert for e in of_row]
        return max(numbers) + 1 if numbers else None

    def read(self, tensors: Mapping[str, Stored], num_experts: int | None, where: str) -> tuple[Bank, set[str]]:
        """The bank, and the names that it is made of.

        Args:
            tensors: by name.
            num_experts: how many are here; None where each has tensors of its own, or a dimension counts them.
            where: the operation and layer, for messages.

        Raises:
            ValueError: an expert or a tensor is missing, or names that the layout does not know.
        """
        count, hidden = self.num_experts() or num_experts, self._hidden(tensors)
        bank: Bank = {}
        used: set[str] = set()
        for row in self.layout.rows:
            if row.field in bank or not self.has(row) or not self._is_widest(row):
                continue
            parts = [self._part(row, place, tensors, count, where) for place in range(len(row.theirs))]
            if count is None and row.counted:
                raise ValueError(
                    f"{where}: {self.layout.name} does not tell how many experts it holds: expected a router beside "
                    f"it or the number of experts, got neither for {row.theirs[0]}"
                )
            sizes = Sizes(count or (parts[0].shape[0] if parts[0].shape else 1), hidden)
            try:
                bank[row.field] = row.map.join(parts, sizes)
            except (ValueError, RuntimeError, IndexError, ZeroDivisionError) as error:
                shapes = ", ".join(str(part.shape) for part in parts)
                raise ValueError(
                    f"{where}: {' and '.join(row.theirs)}: expected shapes of {self.layout.name}, got {shapes}: {error}"
                ) from None
            used |= {name for place in range(len(row.theirs)) for name in self.names[row, place].values()}
        self._refuse_missing(bank, where)
        if unknown := self.unknown(tensors):
            raise ValueError(f"{where}: {unknown[0]}: expected a name of the layout {self.layout.name}")
        return bank, used

    def _is_widest(self, row: Row) -> bool:
        """Whether no row of the same field with more tensors, a gate's as well, is all there."""
        others = [each for each in self.layout.rows if each.field == row.field and len(each.theirs) > len(row.theirs)]
        return not any(self.has(each) for each in others)

    def _part(self, row: Row, place: int, tensors: Mapping[str, Stored], count: int | None, where: str) -> Stored:
        names = self.names[row, place]
        if not row.by_expert:
            return tensors[names[0]]
        # The first few alone: a file may name expert 10**12.
        if missing := list(islice((e for e in range(count or 0) if e not in names), 6)):
            raise ValueError(
                f"{where}: expected {_any(row.theirs[place])} of experts 0 to {(count or 0) - 1}, found none of "
                f"{', '.join(map(str, missing[:5]))}{', ...' if len(missing) > 5 else ''}"
            )
        try:
            return stacked([tensors[names[e]] for e in range(len(names))])
        except ValueError as error:
            raise ValueError(f"{where}: expected {_any(row.theirs[place])} of one shape: {error}") from None

    def _refuse_missing(self, bank: Bank, where: str) -> None:
        for needed in ("up", "down"):
            if needed not in bank:
                rows = [row for row in self.layout.rows if row.field == needed]
                raise ValueError(
                    f"{where}: expected {' or '.join(' and '.join(map(_any, row.theirs)) for row in rows)} beside "
                    f"{', '.join(_any(row.theirs[place]) for row, place in self.names) or 'the others'}, found none"
                )

    def unknown(self, names: Iterable[str]) -> list[str]:
        """Names among the layer's experts' that the layout does not have."""
        mine = {name for of_row in self.names.values() for name in of_row.values()}
        inside = tuple(self.prefix + each for each in self.layout.inside)
        return [
            name
            for name in names
            if name.startswith(inside)
            and name not in mine
            and not (self.layout.left_out and re.search(self.layout.left_out, name))
        ]


def _any(name: str) -> str:
    """A name for people: of any expert."""
    return name.replace("{e}", "*")


def write_layer(layout: Layout, bank: Bank, where: str) -> dict[str, Stored]:
    """The tensors of a layer in a layout, by name behind the layer's prefix.

    Raises:
        ValueError: a field that the layout has no place for.
    """
    sizes, gated = Sizes(*bank["down"].shape[:2]), is_gated(bank)
    written: dict[str, Stored] = {}
    for name, stored in bank.items():
        row = next((r for r in layout.rows if r.field == name and r.gated in (None, gated)), None)
        if row is None:
            kind = "of gated experts " if gated and any(r.field == name for r in layout.rows) else ""
            raise ValueError(f"{where}: {layout.name} has no place for {name} {kind}{stored.shape}")
        parts = row.map.split(stored, sizes)
        for theirs, part in zip(row.theirs, parts, strict=True):
            if row.by_expert:
                written |= {theirs.replace("{e}", str(e)): taken(part, e) for e in range(sizes.experts)}
            else:
                written[theirs] = part
    return _by_expert(written, layout)


def _by_expert(written: dict[str, Stored], layout: Layout) -> dict[str, Stored]:
    """Experts one after the other, as state dicts have them, rather than kind by kind."""
    patterns = [pattern for row in layout.rows if row.by_expert for pattern in row.patterns]
    numbers = {name: int(m["e"]) for name in written for pattern in patterns if (m := pattern.fullmatch(name))}
    position = {name: number for number, name in enumerate(written)}
    first = min((position[name] for name in numbers), default=0)

    def place(name: str) -> tuple[int, int]:
        return (1, numbers[name]) if name in numbers else (0 if position[name] < first else 2, 0)

    return {name: written[name] for name in sorted(written, key=place)}


def is_gated(bank: Bank) -> bool:
    """Whether X is 2 F."""
    return bank["up"].shape[1] == 2 * bank["down"].shape[2]


def check_bank(bank: Bank, where: str, *, sliced: bool = False) -> Bank:
    """Itself, if the experts' shapes belong together.

    Args:
        bank: of a layer.
        where: it is, for messages.
        sliced: whether a rank may hold a slice along H of the bias of the down projection.

    Raises:
        ValueError: they do not.
    """
    up, down = bank["up"].shape, bank["down"].shape
    biases = [None if name not in bank else bank[name].shape for name in BIASES]
    fits = len(up) == len(down) == 3 and up[0] == down[0] and up[2] == down[1] and up[1] in (down[2], 2 * down[2])
    fits = fits and biases[0] in (None, up[:2])
    if fits and biases[1] is not None:
        slices = down[1] // biases[1][-1] if sliced and biases[1][-1] else 1
        fits = biases[1] == (down[0], down[1] // slices)
    if not fits or (biases[0] is None) != (biases[1] is None):
        raise ValueError(
            f"{where}: expected projections (E, F or 2 F, H) and (E, H, F), with two biases or none, got {up}, {down} "
            f"and {biases[0]}, {biases[1]}"
        )
    return bank
