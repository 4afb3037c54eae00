"""What the tensors of Hugging Face's models are called in files, and which of them one is made of there.

In the model a layer's experts are stacked, ``model.layers.0.mlp.experts.gate_up_proj (E, 2 F, H)``. In files they are
so too, or one by one: ``...mlp.experts.3.gate_proj.weight (F, H)``, ``...block_sparse_moe.experts.3.w1.weight``.
Transformers has a table of renamings and conversions for each family, which PEFT reads as well
(``transformers.conversion_mapping.get_model_conversion_mapping``); it is followed here for some of the experts alone.

Names: *native* ones are those of Hugging Face's model, *keys* those of files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightConverter, revert_weight_conversion

from dmoe.checkpoint.hub_folder import HubFolder

_NUMBER = re.compile(r"(experts\.)(\d+)(\.)")
_KEPT = "_dmoe_conversions"


def class_name(model: Any) -> str:
    """That of a model, which FSDP changes."""
    return type(model).__name__.removeprefix("FSDP")


@dataclass(frozen=True)
class Source:
    """Where a native tensor comes from.

    Attributes:
        keys: by pattern of the converter that takes them, "" where there is none; in the order of the experts.
        converter: Transformers' ``WeightConverter``; None where the file's tensor is the native one.
        target: the first of the native tensors that the converter makes.
        by_expert: whether each key is an expert, and some experts' keys make those rows of the native tensor.
        by_row: whether rows of the keys' tensors make those rows of the native one.
    """

    keys: Mapping[str, tuple[str, ...]]
    converter: Any
    target: str
    by_expert: bool
    by_row: bool

    @property
    def takes_rows(self) -> bool:
        """Whether no more of the files is read for some rows of the native tensor than those rows."""
        return self.converter is None or self.by_expert or self.by_row

    def read(self, files: HubFolder, native: str, box: tuple[slice, ...], model: Any) -> Tensor:
        """The part of the native tensor that a slice of each dimension takes.

        No more of the files is read where their tensor is the native one; where experts are keys, or stacked, those
        experts; otherwise all of it.
        """
        if self.converter is None:
            (key,) = self.keys[""]
            return files.read(key, *box)
        converter = deepcopy(self.converter)
        for pattern, keys in self.keys.items():
            for key in keys[box[0]] if self.by_expert else keys:
                converter.add_tensor(self.target, key, pattern, files.read(key, *(box[:1] if self.by_row else ())))
        made = converter.convert(self.target, model=model, config=model.config)[native]
        tensor = made[0] if isinstance(made, list) else made
        return tensor[(slice(None), *box[1:]) if self.by_expert or self.by_row else box]


@dataclass(frozen=True)
class Found:
    """What files hold of a model.

    Attributes:
        sources: where each native tensor comes from, of those that the files hold.
        unknown: keys that are nobody's.
        conversions: those of Transformers' that were needed. Transformers keeps them as ``_weight_conversions`` on the
            model, which is then saved in the form in which it came.
    """

    sources: dict[str, Source]
    unknown: list[str]
    conversions: list[Any]


def keep_conversions(model: Any) -> None:
    """Let a model know its conversions, while its class has the name that they are listed under: FSDP changes it."""
    model.__dict__.setdefault(_KEPT, get_model_conversion_mapping(model))
    if getattr(model, "_weight_conversions", None) is None:
        # As Transformers has it: of prefixes, only the model that was loaded knows whether they were there.
        every = get_model_conversion_mapping(model, add_legacy=False)
        model._weight_conversions = [each for each in every if not isinstance(each, PrefixChange)]


def find_sources(model: Any, keys: Iterable[str], native: Mapping[str, Tensor]) -> Found:
    """Where native tensors come from.

    Args:
        model: Hugging Face's.
        keys: of the files.
        native: what the model has; shapes only are looked at.

    Raises:
        ValueError: an expert that is missing, or a tensor that is there twice.
    """
    conversions = model.__dict__.get(_KEPT) or get_model_conversion_mapping(model)
    renamings = [each for each in conversions if not isinstance(each, WeightConverter)]
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    used: set[int] = set()
    found: dict[str, tuple[Any, dict[str, dict[int, str]]]] = {}
    unknown = []
    for key in sorted(keys):
        name = key
        for renaming in renamings:
            before, (name, _) = name, renaming.rename_source_key(name)
            used |= {id(renaming)} if name != before else set()
        target, pattern, converter = name, "", None
        for each in converters:
            target, matched = each.rename_source_key(name)
            if matched is not None:
                pattern, converter = matched, each
                used.add(id(each))
                break
        target = _with_prefix(target, model.base_model_prefix, native)
        if target not in native:
            target, pattern, converter = _with_prefix(key, model.base_model_prefix, native), "", None
        if target not in native:
            unknown.append(key)
            continue
        experts = re.search(pattern.replace("*.", r"(\d+)\."), name) if "*." in pattern else None
        of_pattern = found.setdefault(target, (converter, {}))[1].setdefault(pattern, {})
        other = of_pattern.setdefault(int(experts[1]) if experts else 0, key)
        if other != key or found[target][0] is not converter:
            raise ValueError(f"{target}: expected to be in the files once, got {key} beside another form of it")
    made = {}
    for target, (converter, patterns) in found.items():
        stacked = any("*." in pattern for pattern in patterns)
        if stacked:
            _check_experts(target, converter, patterns, native[target])
        in_order = {pattern: tuple(of[n] for n in sorted(of)) for pattern, of in patterns.items()}
        alone = converter is not None and all(map(_is_by_expert, converter.operations))
        for name in _targets(target, converter):
            made[name] = Source(in_order, converter, target, stacked and alone, not stacked and alone)
    return Found(made, unknown, [each for each in conversions if id(each) in used])


class Keys:
    """The way back: native tensors as what Transformers' ``save_pretrained`` writes of this model.

    Args:
        model: Hugging Face's.
        native: every tensor that is to be written; shapes and dtypes only are looked at.

    Attributes:
        of: the keys of each native tensor, with empty tensors of their shapes on ``meta``.
        tensors: all of these, in the order of the native ones.

    Raises:
        ValueError: files of this model have tensors for which several native ones have to be joined.
    """

    def __init__(self, model: Any, native: Mapping[str, Tensor]) -> None:
        keep_conversions(model)
        self._model = model
        self._back: list[Any] = [
            each.reverse_transform() for each in model._weight_conversions[::-1] if isinstance(each, WeightConverter)
        ]
        meta = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in native.items()}
        self.of: dict[str, dict[str, Tensor]] = {name: self._made(name, tensor) for name, tensor in meta.items()}
        self.tensors = {key: tensor for made in self.of.values() for key, tensor in made.items()}
        together = revert_weight_conversion(model, meta)
        if {key: t.shape for key, t in together.items()} != {key: t.shape for key, t in self.tensors.items()}:
            raise ValueError(
                f"save_pretrained: expected a model whose tensors are written one by one, got {class_name(model)}, "
                "for whose files several have to be joined"
            )
        self._how = {name: self._kind(name) for name in native}

    def takes_rows(self, native: str) -> bool:
        """Whether :meth:`parts` can do with some rows of a tensor, so that nobody needs all of it."""
        return self._how[native] != "whole"

    def parts(self, native: str, tensor: Tensor, first: int = 0) -> dict[str, tuple[int, Tensor]]:
        """A native tensor, or consecutive rows of it, as parts of what is written.

        Args:
            native: its name.
            tensor: the rows.
            first: the number of the first one.

        Returns:
            By key: the first row of the key's tensor that the part is, and the part.
        """
        how = self._how[native]
        if how == "plain":
            (key,) = self.of[native]
            return {key: (first, tensor)}
        made = self._made(native, tensor)
        if how == "rows":
            return {key: (first, part) for key, part in made.items()}
        if how == "experts":
            made = {_NUMBER.sub(lambda m: f"{m[1]}{int(m[2]) + first}{m[3]}", key): part for key, part in made.items()}
        return {key: (0, part) for key, part in made.items()}

    def _made(self, native: str, tensor: Tensor) -> dict[str, Tensor]:
        return revert_weight_conversion(self._model, {native: tensor})

    def _kind(self, native: str) -> str:
        whole = self.of[native]
        converter = next((each for each in self._back if each.rename_source_key(native)[1] is not None), None)
        if converter is None:
            return "plain"
        if not all(map(_is_by_expert, converter.operations)):
            return "whole"
        if not any(type(operation).__name__ == "SplitModulelist" for operation in converter.operations):
            return "rows"
        numbers = {int(match[2]) for key in whole if (match := _NUMBER.search(key))}
        fine = all(map(_NUMBER.search, whole)) and numbers == set(range(len(numbers)))
        return "experts" if fine else "whole"


def _is_by_expert(operation: Any) -> bool:
    """Whether a conversion does the same to each expert, in the first dimension, alone."""
    kind = type(operation).__name__
    if kind in ("MergeModulelist", "SplitModulelist"):
        return operation.dim == 0
    if kind in ("Concatenate", "Chunk", "Interleave"):
        return operation.dim > 0 and getattr(operation, "num_shards_attribute", None) is None
    return kind == "Transpose" and operation.dim0 > 0 and operation.dim1 > 0


def _with_prefix(name: str, prefix: str, native: Mapping[str, Tensor]) -> str:
    """A name as the model has it: files of a model without a head have none of the prefix, or the other way round."""
    if name in native or not prefix:
        return name
    other = name.removeprefix(f"{prefix}.") if name.startswith(f"{prefix}.") else f"{prefix}.{name}"
    return other if other in native else name


def _check_experts(target: str, converter: Any, patterns: Mapping[str, Mapping[int, str]], whole: Tensor) -> None:
    """Whether all experts are there, in each of the tensors that one is made of."""
    for pattern in converter.source_patterns:
        there = patterns.get(pattern, {})
        wrong = [n for n in range(whole.shape[0]) if n not in there] or [n for n in there if n >= whole.shape[0]]
        if wrong:
            got = f"none of {pattern}" if not there else f"{len(there)}, {'with' if wrong[0] in there else 'without'} "
            if there:
                got += _NUMBER.sub(rf"\g<1>{wrong[0]}\3", next(iter(there.values())))
            raise ValueError(f"{target}: expected {whole.shape[0]} experts in the files, got {got}")


def _targets(target: str, converter: Any) -> list[str]:
    """All native tensors that a converter makes; keys are renamed to the first."""
    if converter is None or len(converter.target_patterns) == 1:
        return [target]
    return [target.replace(converter.target_patterns[0], pattern) for pattern in converter.target_patterns]
