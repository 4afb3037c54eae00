"""``RoutingRecord``: which experts each token took in each layer, as a value that can be cut, joined, kept and sent."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from dmoe.record_file import read_tensors, write_tensors

Selection: TypeAlias = slice | Tensor | Sequence[int]
_VERSION = "1"


def compact_dtype(num_experts: int) -> torch.dtype:
    """The narrowest dtype for ids in [0, E], where E marks "no expert": uint8 up to E = 255, int16, int32."""
    return torch.uint8 if num_experts <= 255 else torch.int16 if num_experts <= 32767 else torch.int32


class RoutingRecord:
    """The choices of tokens, by layer: ``(tokens, K)`` ids in [0, E], E where a choice takes no expert.

    Tokens are those that a layer's ``token_mask`` leaves in, in the order in which forwards had them: padding is no
    token, and which batches, micro-batches or ranks they came in is not part of a record. Layers are named as a whole
    model names them, so parts of a model find theirs.

    Args:
        choices: by layer, in the layers' order, ``(tokens, K)`` integers; the same number of tokens in each.
        num_experts: E, of all layers or by layer.

    Raises:
        ValueError: ids outside [0, E], an expert that a token chose twice, or layers that differ in their tokens.
    """

    def __init__(self, choices: Mapping[str, Tensor], num_experts: int | Mapping[str, int]) -> None:
        sizes = num_experts if isinstance(num_experts, Mapping) else dict.fromkeys(choices, num_experts)
        if set(sizes) != set(choices):
            raise ValueError(
                f"RoutingRecord: num_experts: expected one for each of the layers {list(choices)}, got {list(sizes)}"
            )
        self._num_experts = {str(layer): int(sizes[layer]) for layer in choices}
        self._pieces = {str(layer): [_checked(str(layer), ids, int(sizes[layer]))] for layer, ids in choices.items()}
        self._check_tokens("RoutingRecord")

    @classmethod
    def from_array(
        cls, array: Any, num_experts: int, layers: Iterable[Any] | None = None, *, where: Sequence[int] | None = None
    ) -> RoutingRecord:
        """A record of what an inference engine returned: vLLM's ``routed_experts``, or SGLang's once it is an array.

        Args:
            array: ``(tokens, layers, K)`` integers, anything that ``torch.tensor`` takes.
            num_experts: E.
            layers: the layers' names, as ``dmoe.moe_layers(model)`` has them; None numbers them, ``"0"``, ``"1"``, ...
            where: which of the array's layers they are, for engines that number those without experts, too (and fill
                them with zeros); None is all.

        Raises:
            ValueError: another shape, other numbers, or another number of layers.
        """
        ids = torch.as_tensor(array) if isinstance(array, Tensor) else torch.tensor(array)
        if ids.dim() != 3 or ids.is_floating_point() or ids.dtype == torch.bool:
            raise ValueError(
                f"RoutingRecord.from_array: expected integers of shape (tokens, layers, K), got {ids.dtype} "
                f"{tuple(ids.shape)}"
            )
        places = list(range(ids.shape[1])) if where is None else list(where)
        if any(not 0 <= place < ids.shape[1] for place in places):
            raise ValueError(
                f"RoutingRecord.from_array: where: expected layers of the array, 0 to {ids.shape[1] - 1}, got {places}"
            )
        names = list(map(str, range(len(places)) if layers is None else layers))
        if len(names) != len(places):
            raise ValueError(
                f"RoutingRecord.from_array: layers: expected {len(places)} names, one for each layer of the array, got "
                f"{len(names)}; `where` says which of an engine's layers have experts"
            )
        return cls({name: ids[:, place].long() for name, place in zip(names, places, strict=True)}, num_experts)

    def to_array(self, layers: Iterable[str] | None = None) -> Tensor:
        """``(tokens, layers, K)`` int32, as :meth:`from_array` takes it; ``.numpy()`` is what engines return.

        Raises:
            ValueError: layers that the record has not, or that differ in K.
        """
        chosen = self if layers is None else self.select(layers)
        widths = {ids.shape[1] for ids in chosen.choices.values()}
        if len(widths) != 1:
            raise ValueError(f"RoutingRecord.to_array: expected layers of one K, got K in {sorted(widths)}")
        return torch.stack([ids.int() for ids in chosen.choices.values()], 1)

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers' names, in order."""
        return tuple(self._pieces)

    @property
    def num_experts(self) -> dict[str, int]:
        """E, by layer."""
        return dict(self._num_experts)

    @property
    def num_tokens(self) -> int:
        """Tokens of each layer.

        Raises:
            ValueError: layers differ, as inside :func:`dmoe.record_routing` they may.
        """
        self._check_tokens("RoutingRecord.num_tokens")
        return next((sum(map(len, pieces)) for pieces in self._pieces.values()), 0)

    @property
    def choices(self) -> dict[str, Tensor]:
        """By layer ``(tokens, K)`` on the CPU: uint8 up to E = 255, then int16 (int32 from E = 32768 on)."""
        for layer, pieces in self._pieces.items():
            if len(pieces) != 1 or pieces[0].device.type != "cpu":
                self._pieces[layer] = [torch.cat([piece.cpu() for piece in pieces])]
        return {layer: pieces[0] for layer, pieces in self._pieces.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all choices."""
        return sum(ids.nbytes for ids in self.choices.values())

    def tokens(self, selection: Selection) -> RoutingRecord:
        """The record of some of the tokens.

        Args:
            selection: a slice, ids of tokens in any order, or a bool tensor ``(tokens,)``.

        Raises:
            ValueError: tokens that are not there.
        """
        count, index = self.num_tokens, _index(selection)
        if isinstance(index, Tensor):
            wrong = index.dim() != 1 or (index.dtype == torch.bool and len(index) != count)
            if not wrong and index.dtype != torch.bool and len(index):
                wrong = bool(index.min() < -count) or bool(index.max() >= count)
            if wrong:
                raise ValueError(
                    f"RoutingRecord.tokens: expected a slice, a mask ({count},) or ids of {count} tokens, got "
                    f"{index.dtype} {tuple(index.shape)}"
                    + (f" up to {int(index.max())}" if index.dim() == 1 and index.dtype != torch.bool else "")
                )
        return self._of({layer: ids[index] for layer, ids in self.choices.items()})

    def padded(self, count: int) -> RoutingRecord:
        """The same with ``count`` more tokens behind, which take no expert: the last, sampled token of a sequence.

        Engines return one token's choices less than there are tokens, as the last one never ran through the model.
        """
        return self._of(
            {
                layer: torch.cat([ids, ids.new_full((count, ids.shape[1]), self._num_experts[layer])])
                for layer, ids in self.choices.items()
            }
        )

    def select(self, layers: Iterable[str]) -> RoutingRecord:
        """The record of some of the layers, in this order: a pipeline stage's.

        Raises:
            ValueError: a layer that the record has not.
        """
        names, choices = list(map(str, layers)), self.choices
        if missing := [name for name in names if name not in choices]:
            raise ValueError(f"RoutingRecord.select: layers: expected some of {list(choices)}, got {missing}")
        return self._of({name: choices[name] for name in names})

    def renamed(self, layers: Iterable[str]) -> RoutingRecord:
        """The same under other names, one for each layer in order: a record of numbered layers, for a model.

        Raises:
            ValueError: another number of names.
        """
        names = list(map(str, layers))
        if len(set(names)) != len(self.layers) or len(names) != len(self.layers):
            raise ValueError(
                f"RoutingRecord.renamed: layers: expected {len(self.layers)} different names for {list(self.layers)}, "
                f"got {names}"
            )
        sizes = dict(zip(names, self._num_experts.values(), strict=True))
        return _made(dict(zip(names, self.choices.values(), strict=True)), sizes)

    @staticmethod
    def cat(records: Iterable[RoutingRecord]) -> RoutingRecord:
        """The tokens of several records of the same layers, one behind the other: those of ranks, or of sequences.

        Raises:
            ValueError: none, or records of other layers, K or E.
        """
        records = list(records)
        if not records:
            raise ValueError("RoutingRecord.cat: expected at least one record, got none")
        for record in records[1:]:
            if record._kind() != records[0]._kind():
                raise ValueError(
                    "RoutingRecord.cat: expected records of the same layers, with the same (E, K), got "
                    f"{records[0]._kind()} and {record._kind()}"
                )
        first = records[0]
        return first._of({layer: torch.cat([each.choices[layer] for each in records]) for layer in first.layers})

    @staticmethod
    def merge(records: Iterable[RoutingRecord]) -> RoutingRecord:
        """The layers of several records of the same tokens: those of pipeline stages, in order.

        Raises:
            ValueError: a layer twice, or records of other numbers of tokens.
        """
        choices: dict[str, Tensor] = {}
        sizes: dict[str, int] = {}
        for record in records:
            if twice := choices.keys() & set(record.layers):
                raise ValueError(f"RoutingRecord.merge: expected each layer once, got {sorted(twice)} twice")
            choices |= record.choices
            sizes |= record.num_experts
        merged = _made(choices, sizes)
        merged._check_tokens("RoutingRecord.merge")
        return merged

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the record; a crash leaves the old file or the new one. Safetensors' layout: any reader opens it."""
        self._check_tokens("RoutingRecord.save")
        about = {"format": "dmoe.RoutingRecord", "version": _VERSION, "num_experts": json.dumps(self._num_experts)}
        write_tensors(path, self.choices, about)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RoutingRecord:
        """Read what :meth:`save` wrote. Nothing in the file is executed.

        Raises:
            ValueError: another file, or a damaged one.
            OSError: it cannot be read.
        """
        tensors, about = read_tensors(path, "RoutingRecord.load")
        try:
            if about.get("format") != "dmoe.RoutingRecord" or about.get("version") != _VERSION:
                raise ValueError(f"format {about.get('format')!r}, version {about.get('version')!r}")
            sizes = json.loads(about["num_experts"])
            if not isinstance(sizes, dict) or not all(type(size) is int for size in sizes.values()):
                raise ValueError(f"num_experts {sizes!r:.80}")
            if sizes.keys() == tensors.keys():  # in the layers' order
                tensors = {layer: tensors[layer] for layer in sizes}
            return cls(tensors, sizes)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"RoutingRecord.load: {os.fspath(path)}: expected a record of version {_VERSION}, got {error}"
            ) from None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RoutingRecord):
            return NotImplemented
        same = self.layers == other.layers and self._num_experts == other._num_experts
        return same and all(torch.equal(ids, other.choices[layer]) for layer, ids in self.choices.items())

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        counts = {sum(map(len, pieces)) for pieces in self._pieces.values()}
        kinds = {(self._num_experts[layer], pieces[0].shape[1]) for layer, pieces in self._pieces.items() if pieces}
        return f"RoutingRecord({len(self._pieces)} layers, tokens {sorted(counts)}, (E, K) {sorted(kinds)})"

    def _of(self, choices: dict[str, Tensor]) -> RoutingRecord:
        return _made(choices, {layer: self._num_experts[layer] for layer in choices})

    def _kind(self) -> dict[str, tuple[int, int]]:
        return {layer: (self._num_experts[layer], ids.shape[1]) for layer, ids in self.choices.items()}

    def _check_tokens(self, what: str) -> None:
        counts = {layer: sum(map(len, pieces)) for layer, pieces in self._pieces.items()}
        if len(set(counts.values())) > 1:
            raise ValueError(f"{what}: expected as many tokens in each layer, got {counts}")


def empty_record(kinds: Mapping[str, tuple[int, int]]) -> RoutingRecord:
    """A record without tokens, for layers of such (E, K); :func:`append` gives it some."""
    none = {layer: torch.empty(0, k, dtype=compact_dtype(e), device="cpu") for layer, (e, k) in kinds.items()}
    return _made(none, {layer: e for layer, (e, _) in kinds.items()})


def append(record: RoutingRecord, layer: str, ids: Tensor) -> None:
    """Add tokens ``(T, K)`` to a layer; they stay on their device until somebody reads them."""
    record._pieces[layer].append(ids.to(compact_dtype(record._num_experts[layer])))


def _made(choices: dict[str, Tensor], sizes: Mapping[str, int]) -> RoutingRecord:
    """A record of choices that are known to be sound."""
    record = object.__new__(RoutingRecord)
    record._num_experts = dict(sizes)
    record._pieces = {layer: [ids] for layer, ids in choices.items()}
    return record


def _index(selection: Selection) -> slice | Tensor:
    if isinstance(selection, slice):
        return selection
    index = torch.as_tensor(selection).cpu()
    return index.long() if index.dtype != torch.bool else index


def _checked(layer: str, ids: Tensor, num_experts: int) -> Tensor:
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
        got = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"RoutingRecord: layer {layer}: expected integers of shape (tokens, K), got {got}")
    if num_experts < 1:
        raise ValueError(f"RoutingRecord: layer {layer}: num_experts: expected at least 1, got {num_experts}")
    wide = ids.detach().long().cpu()
    if wide.numel() and (wide.min() < 0 or wide.max() > num_experts):
        raise ValueError(
            f"RoutingRecord: layer {layer}: expected ids in [0, {num_experts}], where {num_experts} takes no expert, "
            f"got {int(wide.min())} to {int(wide.max())}"
        )
    ordered = wide.sort(1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != num_experts)
    if twice.any():
        token = int(twice.any(1).nonzero()[0])
        raise ValueError(
            f"RoutingRecord: layer {layer}: expected different experts for a token, got {wide[token].tolist()} for "
            f"token {token} (engines write zeros for layers without experts: from_array's `where` leaves these out)"
        )
    return wide.to(compact_dtype(num_experts))
