"""Writing a model as files of ranks, as a system of :mod:`.rank_files` has them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmoe.checkpoint.bank import from_dmoe, part_of_layer
from dmoe.checkpoint.formats.base import Options, as_asked
from dmoe.checkpoint.formats.rank_contents import CHUNKS, CONTAINERS, OPTIMIZERS, SHARED, filled, nested
from dmoe.checkpoint.layers import Layout, write_layer
from dmoe.checkpoint.model import Model
from dmoe.checkpoint.stored import Stored
from dmoe.checkpoint.together import Written, name_of, write_together
from dmoe.checkpoint.torch_writer import write_lazily

if TYPE_CHECKING:
    from dmoe.checkpoint.formats.rank_files import RankFiles


def write_ranks(system: RankFiles, model: Model, target: Path, options: Options) -> list[Path]:
    """Write a file for each rank, and the one that all share: all of them or none.

    Args:
        system: whose files.
        model, target, options: see :class:`dmoe.checkpoint.formats.base.Format`.
    """
    again = model.origin if model.origin.get("layout") == system.name else {}
    ranks = options.ranks or (again.get("ranks", 1) if "{rank" in str(target) else 1)
    table = next((each for each in system.tables if each.name == again.get("table")), None)
    files = [_file(system, target, rank, ranks) for rank in range(ranks)]
    contents = {file: _of_rank(system, model, table, rank, ranks, again, options) for rank, file in enumerate(files)}
    shared = system.shared_file(files[0]) if ranks > 1 else None
    rests = [content.pop(SHARED, {}) for content in contents.values()]
    rest = rests[0]
    if shared is not None:
        contents[shared] = {**rest, **_divide(contents, files)}
    elif rest:
        contents = {file: {**rest, **content} for file, content in contents.items()}
    written = {file: _written(file, model, content, options) for file, content in contents.items()}
    following = _file(system, target, ranks, ranks) if ranks > 1 else None
    if following is not None and following.exists():
        raise FileExistsError(f"{following}: expected no file of a rank {ranks} beside those of {ranks} ranks, got one")
    write_together(name_of(target), written, overwrite=options.overwrite)
    return list(contents)


def _file(system: RankFiles, target: Path, rank: int, ranks: int) -> Path:
    if ranks > 1 and "{rank" not in str(target):
        if system.rank_file is not None:
            return system.rank_file(target, rank)
        raise ValueError(f"{target}: expected a name with {{rank}} in it for {ranks} files")
    return Path(filled(str(target), rank))


def _of_rank(
    system: RankFiles,
    model: Model,
    table: Layout | None,
    rank: int,
    ranks: int,
    again: Mapping[str, Any],
    options: Options,
) -> dict[str, Any]:
    """What goes into a rank's file."""

    def made(prefix: str) -> dict[str, Stored]:
        where = f"{system.name}: {prefix.removesuffix('.') or 'the layer'}"
        layer = model.of_layer(prefix)
        chosen = table or _table_for(system, from_dmoe(layer, where), where)
        bank = from_dmoe(part_of_layer(layer, chosen, rank, ranks, where), where, sliced=True)
        its = write_layer(chosen, {each: t for each, t in bank.items() if each not in again.get("absent", ())}, where)
        if again.get("constants", True):
            its |= {name: follows(layer) for name, follows in system.constants.items()}
        theirs = model.their_prefix(prefix, system.nested)
        if not f".{theirs}".endswith(f".{system.inner}"):
            theirs += system.inner
        return {theirs + name: stored for name, stored in its.items()}

    state = {name: as_asked(stored, options) for name, stored in model.with_layers(made).items()}
    values = model.beside.get("values", {}) if again else {}
    beside = _beside(system, model, rank, ranks) if again else {}
    return nested(state, values, again.get("containers", [system.container]), beside)


def _table_for(system: RankFiles, bank: Mapping[str, Stored], where: str) -> Layout:
    """The first of a system's tables that has a place for everything."""
    for table in system.tables[:-1]:
        try:
            write_layer(table, dict(bank), where)
        except ValueError:
            continue
        return table
    return system.tables[-1]


def _beside(system: RankFiles, model: Model, rank: int, ranks: int) -> dict[str, Any]:
    """What stood beside the model in that rank's file, or the first one's; an optimizer's state does not fit."""
    of_ranks = model.beside.get("ranks", [{}])
    kept = of_ranks[rank] if len(of_ranks) == ranks else of_ranks[0]
    if any(kept.get(name) is not None for name in OPTIMIZERS):
        model.note(f"{system.name}: written without the optimizer's state, which does not fit the converted model")
    return {key: value for key, value in kept.items() if key not in OPTIMIZERS}


def _written(file: Path, model: Model, content: dict[str, Any], options: Options) -> Written:
    if file.suffix != ".safetensors":
        return Written(partial(write_lazily, content=content, progress=options.progress))
    from dmoe.checkpoint.shared_files import write_safetensors

    if any(CHUNKS.fullmatch(str(key)) and isinstance(value, Mapping) for key, value in content.items()):
        raise ValueError(
            f"{file}: expected one state dict for a safetensors file, got the chunks of a virtual pipeline; write a .pt"
        )
    states = [content, *(content[key] for key in CONTAINERS if isinstance(content.get(key), Mapping))]
    tensors = {name: value for state in states for name, value in state.items() if isinstance(value, Stored)}
    metadata = {"dmoe": json.dumps(content["dmoe"])} if "dmoe" in content else {}
    if len(tensors) + len(metadata) < sum(len(state) for state in states) - (len(states) - 1):
        model.note(f"{file.name}: a safetensors file holds tensors alone: what stands beside the model is left out")
    return Written(partial(write_safetensors, tensors=tensors, progress=options.progress, metadata=metadata))


def _divide(contents: dict[Path, dict[str, Any]], files: Sequence[Path]) -> dict[str, Any]:
    """Take what all ranks have out of their files; returns it as the content of one of its own."""
    whole = contents[files[0]]
    key = next((key for key in CONTAINERS if isinstance(whole.get(key), dict)), "")
    states = [contents[file][key] if key else contents[file] for file in files]
    of_experts = [{name for name in state if ".experts." in f".{name}"} for state in states]
    rest = {name: value for name, value in states[0].items() if name not in of_experts[0]}
    shared = {key: rest} if key else rest
    for file, state, names in zip(files, states, of_experts, strict=True):
        mine = {name: value for name, value in state.items() if name in names}
        contents[file] = {**contents[file], key: mine} if key else mine
    return shared
