"""Systems whose checkpoint is a state dict in a file, or a file for each expert-parallel rank with its own experts."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from dmoe.checkpoint.bank import alike, to_dmoe, whole_layer, with_both_biases
from dmoe.checkpoint.formats.base import Options
from dmoe.checkpoint.formats.rank_contents import (
    SHARED,
    Content,
    expanded,
    filled,
    in_order_of_ranks,
    values_of,
)
from dmoe.checkpoint.formats.rank_writing import write_ranks
from dmoe.checkpoint.layers import BIASES, Found, Layout
from dmoe.checkpoint.model import Model
from dmoe.checkpoint.stored import Stored
from dmoe.checkpoint.together import finish_writing
from dmoe.config import MoEConfig


@dataclass(frozen=True)
class RankFiles:
    """A :class:`Format` of files of ranks.

    Attributes:
        name, about: see :class:`Format`.
        tables: of the names of its layers: they exclude each other.
        config: ``config(beside, **facts)`` is its layer with what the tensors tell, and else with what the file says
            beside the model, or the system's defaults.
        shared_file: from a rank's file to the one that holds what all ranks have, if the system keeps that apart.
        rank_file: from the target and a rank to the name of its file; None: the target has ``{rank}`` in it.
        container: the key under which the state dict lies in its files; "" for none.
        inner: what every layer's prefix ends with, and no other system's (Swin-MoE's ``_moe_layer.``); "" for nothing.
        not_inner: what no layer's prefix ends with.
        nested: what is ours behind the prefix of a layer that has ``coefficient.weight``, as :class:`dmoe.ResidualMoE`
            has: ``moe.``; empty where a system has no such layers.
        one_bias: whether its experts may have one bias alone.
        constants: tensors that it keeps beside a layer's, by name behind its prefix, and how they follow from these.
    """

    name: str
    about: str
    tables: tuple[Layout, ...]
    config: Callable[..., MoEConfig]
    shared_file: Callable[[Path], Path | None] = lambda path: None
    rank_file: Callable[[Path, int | str], Path] | None = None
    container: str = ""
    nested: str = ""
    one_bias: bool = False
    inner: str = ""
    not_inner: str = ""
    constants: Mapping[str, Callable[[Mapping[str, Stored]], Stored]] = field(default_factory=dict)

    def fits(self, sources: Sequence[Path]) -> bool:
        """See :class:`Format`."""
        try:
            files = self._named(sources)  # any of them tells, and what is wrong with others is said when all are read
            return bool(files) and any(self._find(table, Content.of(files[0]).tensors()) for table in self.tables)
        except (OSError, ValueError, TypeError):
            return False

    def _find(self, table: Layout, state: Mapping[str, Stored]) -> dict[str, Found]:
        """Its layers in a state dict, by prefix."""
        return {
            prefix: found
            for prefix, found in table.find(state).items()
            if f".{prefix}".endswith(f".{self.inner}" if self.inner else "")
            and not (self.not_inner and f".{prefix}".endswith(f".{self.not_inner}"))
        }

    def files(self, sources: Sequence[Path], options: Options) -> list[Path]:
        """Every rank's file, in order, from what the user names; without the one that all share."""
        found = self._named(sources)
        shared = {self.shared_file(file) for file in found}
        found = [file for file in found if file not in shared]
        return found if options.as_given else in_order_of_ranks(found)

    def _named(self, sources: Sequence[Path]) -> list[Path]:
        found = [file for source in sources for file in expanded(source)]
        if len(found) == 1 and self.rank_file is not None and not found[0].exists():
            pattern = self.rank_file(found[0], "{rank}")
            found = expanded(pattern) if Path(filled(str(pattern), 0)).exists() else found
        return found

    def read(self, sources: Sequence[Path], options: Options) -> Model:
        """See :class:`Format`."""
        files = self.files(sources, options)
        if not files:
            raise FileNotFoundError(f"{', '.join(map(str, sources))}: expected files of ranks, got none")
        for folder in {file.parent for file in files}:
            finish_writing(folder)
        contents = [self._content(file) for file in files]
        states = [content.tensors() for content in contents]
        model = self.of_states(files, states, contents[0].beside, options)
        model.origin["containers"] = list(contents[0].states)
        model.beside = {"ranks": [content.beside for content in contents], "values": values_of(contents[0])}
        return model

    def of_states(
        self,
        files: Sequence[Path],
        states: Sequence[Mapping[str, Stored]],
        beside: Mapping[str, Any],
        options: Options,
        told: Mapping[str, Callable[..., MoEConfig]] | None = None,
    ) -> Model:
        """The model of the tensors of each rank.

        Args:
            files: of the ranks, for messages.
            states: tensors by name.
            beside: what else stands in the first file.
            options: of the user.
            told: by prefix, what makes the config of a layer whose options stand in the files.

        Raises:
            ValueError: layers that are not whole, or ranks that do not belong together.
        """
        table, layers = self._layers(files, states)
        model = Model({}, {}, origin={"layout": self.name, "table": table.name, "ranks": len(files)})
        model.origin["constants"] = all(prefix + name in states[0] for prefix in layers[0] for name in self.constants)
        if self.one_bias and layers[0]:
            fields = {row.field for row, _ in next(iter(layers[0].values())).names}
            absent = [name for name in BIASES if name not in fields]
            model.origin["absent"] = absent if len(absent) == 1 else []
        owners = [{name: prefix for prefix, found in of.items() for name in self._names(found)} for of in layers]
        for name in states[0]:
            prefix = owners[0].get(name)
            if prefix is None:
                if table.left_out is None or not re.search(table.left_out, name):
                    self._keep(model, {name: self._on_all_ranks(name, files, states)}, files[0])
                continue
            ours = prefix + (self.nested if f"{prefix}coefficient.weight" in states[0] else "")
            if ours not in model.layers:
                layer = self._layer(model, table, prefix, files, states, layers, options)
                model.layers[ours] = None
                self._keep(model, {ours + each: stored for each, stored in layer.items()}, files[0])
        for file, state, owned in zip(files, states, owners, strict=True):
            if more := [name for name in state if name not in states[0] and name not in owned]:
                raise ValueError(f"{file}: {more[0]}: expected tensors that {files[0]} has as well, got this one")
        told = told or {}
        for prefix in model.layers:
            by_default = partial(self.config, beside)
            model.set_config(prefix, told.get(prefix, by_default), {} if prefix in told else options.settings)
        if model.layers.keys() - told.keys():
            self._say_what_is_assumed(model, options)
        return model

    def _keep(self, model: Model, tensors: Mapping[str, Stored], file: Path) -> None:
        if twice := model.tensors.keys() & tensors.keys():
            raise ValueError(
                f"{file}: {min(twice)}: expected one tensor that has this name in dmoe, got another beside the MoE "
                "layer's"
            )
        model.tensors.update(tensors)

    def _say_what_is_assumed(self, model: Model, options: Options) -> None:
        config = next(iter(model.layers.values()))
        names = [name for name in ("top_k", "activation", "gate_normalization") if name not in options.settings]
        if config is not None and names:
            said = ", ".join(f"{name}={getattr(config, name)}" for name in names)
            model.note(
                f"{said} in the config: {self.name}'s defaults or what stands beside the model; --set changes it"
            )

    def _content(self, file: Path) -> Content:
        """A rank's file, with what all share; ``SHARED`` of its ``beside`` is what stands beside that."""
        content, shared = Content.of(file), self.shared_file(file)
        if shared is None:
            return content
        if not shared.exists():
            raise FileNotFoundError(f"{shared}: expected this file beside {file.name}, got none")
        rest = Content.of(shared)
        for key, state in rest.states.items():
            content.states[key] = {**state, **content.states.get(key, {})}
        return Content(content.states, {**content.beside, SHARED: rest.beside})

    def _layers(
        self, files: Sequence[Path], states: Sequence[Mapping[str, Stored]]
    ) -> tuple[Layout, list[dict[str, Found]]]:
        found = [table for table in self.tables if self._find(table, states[0])]
        if not found:
            raise ValueError(f"{files[0]}: expected MoE layers of {self.name}, got none")
        # Of tables that differ in little, the one that knows all names; else the first, which says what it lacks.
        whole = [t for t in found if not any(each.unknown(states[0]) for each in self._find(t, states[0]).values())]
        table = (whole or found)[0]
        layers = [self._find(table, state) for state in states]
        for file, of_rank in zip(files, layers, strict=True):
            if list(of_rank) != list(layers[0]):
                odd = sorted(set(of_rank) ^ set(layers[0]))
                raise ValueError(f"{file}: expected the MoE layers of {files[0]}, got other ones: {', '.join(odd)}")
        return table, layers

    def _layer(
        self,
        model: Model,
        table: Layout,
        prefix: str,
        files: Sequence[Path],
        states: Sequence[Mapping[str, Stored]],
        layers: Sequence[Mapping[str, Found]],
        options: Options,
    ) -> dict[str, Stored]:
        """One layer under dmoe's names, from all ranks."""
        where = prefix.removesuffix(".") or "the layer"
        ranks = len(files)
        total = options.num_experts or layers[0][prefix].routed(states[0])
        if total is None and table.routerless:
            total = layers[0][prefix].length_of("down", states[0]) * ranks
        if total is None:
            raise ValueError(
                f"{files[0]}: {where}: expected a router beside the experts, which tells how many there are on all "
                "ranks, or --num-experts, got neither"
            )
        if table.counted and ranks > 1:
            model.note(
                f"{self.name} does not say how many ranks there are: {total} experts were read from {ranks} files, as "
                "is right if these are all"
            )
        here = max(1, total // ranks)
        parts = []
        for file, state, found in zip(files, states, layers, strict=True):
            bank, _ = found[prefix].read(state, here, f"{file}: {where}")
            bank = with_both_biases(bank, max(1, ranks // total)) if self.one_bias else bank
            parts.append(to_dmoe(bank, f"{file}: {where}", sliced=table.bias_sliced))
        return whole_layer(parts, table, total, f"{files[0]}: {where}")

    def _names(self, found: Found) -> set[str]:
        return {name for of_row in found.names.values() for name in of_row.values()} | {
            found.prefix + name for name in self.constants
        }

    def _on_all_ranks(self, name: str, files: Sequence[Path], states: Sequence[Mapping[str, Stored]]) -> Stored:
        for file, state in zip(files, states, strict=True):
            if name not in state:
                raise ValueError(f"{file}: expected {name}, which {files[0]} has, got none")
        return alike([state[name] for state in states], name)

    def write(self, model: Model, target: Path, options: Options) -> list[Path]:
        """See :class:`Format`."""
        return write_ranks(self, model, target, options)
