"""DeepSpeed's ``MoE``: a folder that ``save_checkpoint`` wrote, or a state dict of a rank.

==================================================  ================================================================
file in ``DIR``, or in ``DIR/TAG``                  what it holds
==================================================  ================================================================
``latest``                                          TAG
``mp_rank_00_model_states.pt``                      under ``module`` everything but experts, by the model's names
``layer_{n}_expert_{e}_mp_rank_00_model_states.pt`` expert e of the n-th MoE layer, by its names in the whole model
``expert_{e}_mp_rank_00_model_states.pt``           the same of all layers (DeepSpeed's first versions)
==================================================  ================================================================

Where the layers are dmoe's own (``dmoe.integrations.deepspeed``), their configs stand in ``ds_config`` under ``dmoe``.
A layer ``X`` has ``X.deepspeed_moe.gate.wg.weight`` and ``X.deepspeed_moe.experts.deepspeed_experts.{e}.``, behind
which the names are those of the user's own expert; ``X.mlp`` and ``X.coefficient`` beside them make it
:class:`dmoe.ResidualMoE`, whose mixture is ``X.moe``. Layers of AutoEP have ``X.experts.w1.{e}``, ``w3``, ``w2``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dmoe.checkpoint.bank import from_dmoe
from dmoe.checkpoint.formats.base import Options, as_asked
from dmoe.checkpoint.formats.deepspeed_names import (
    DMOES_NAMES,
    GATE,
    KEY,
    OF_EXPERT,
    layout_again,
    layout_for,
    remember,
)
from dmoe.checkpoint.formats.dmoe_files import config_again
from dmoe.checkpoint.formats.megatron_deepspeed import MEGATRON_DEEPSPEED
from dmoe.checkpoint.formats.megatron_files import LATEST, tagged_folder
from dmoe.checkpoint.formats.rank_contents import ENDINGS, OPTIMIZERS, Content, expanded
from dmoe.checkpoint.formats.rank_files import RankFiles
from dmoe.checkpoint.layers import Layout, write_layer
from dmoe.checkpoint.model import Model
from dmoe.checkpoint.new_folder import is_name, new_folder
from dmoe.checkpoint.stored import Stored
from dmoe.checkpoint.torch_reader import read_lazily
from dmoe.checkpoint.torch_writer import write_lazily
from dmoe.presets import get

DENSE = re.compile(r"mp_rank_(\d\d)_model_states\.pt")
EXPERT = re.compile(r"(?:layer_(\d+)_)?expert_(\d+)_mp_rank_(\d\d)_model_states\.pt")


def _config(beside: Mapping[str, Any], **facts: Any) -> Any:
    """One expert, as DeepSpeed's default has it, and no capacity in evaluation."""
    activation = "silu" if facts["gated"] else "gelu_tanh"
    return get("deepspeed", **{"capacity_factor": None, "activation": activation, **facts})


class DeepSpeed:
    """The :class:`Format`."""

    name = "deepspeed"
    about = "DeepSpeed's MoE: a folder of save_checkpoint, or a state dict"

    def fits(self, sources: Sequence[Path]) -> bool:
        """See :class:`Format`."""
        try:
            if MEGATRON_DEEPSPEED.fits(sources):
                return False
            if len(sources) == 1 and sources[0].is_dir() and (dense := _dense_files(folder_of(sources[0]))):
                names = Content.of(dense[0]).tensors()
                return any("deepspeed_moe.gate" in name for name in names) or bool(_expert_files(dense[0].parent))
            files = [file for source in sources for file in expanded(source)]
            return bool(files) and any(OF_EXPERT.fullmatch(name) for name in Content.of(files[0]).tensors())
        except (OSError, ValueError):
            return False

    def read(self, sources: Sequence[Path], options: Options) -> Model:
        """See :class:`Format`."""
        if len(sources) == 1 and sources[0].is_dir() and _dense_files(folder_of(sources[0])):
            return self._read_folder(sources[0], options)
        files = [file for source in sources for file in expanded(source)]
        if not files:
            raise FileNotFoundError(f"{', '.join(map(str, sources))}: expected files of DeepSpeed, got none")
        layout = layout_for(Content.of(files[0]).tensors(), str(files[0]))
        model = self._of_ranks(layout).read(files, options)
        return remember(model, layout, {"folder": False})

    def _of_ranks(self, layout: Layout) -> RankFiles:
        return RankFiles(self.name, self.about, (layout,), _config, nested="moe.")

    def _read_folder(self, source: Path, options: Options) -> Model:
        folder = folder_of(source)
        dense = _dense_files(folder)
        if len(dense) > 1:
            raise ValueError(
                f"{dense[1]}: expected one file of all that is no expert, got {len(dense)}: tensor parallelism cuts "
                "the user's own modules, and only those of Megatron's GPT are known"
            )
        content = Content.of(dense[0])
        key = next(iter(content.states))
        tensors, old = dict(content.tensors()), False
        order = [name.removesuffix(GATE) for name in tensors if name.endswith(GATE)]
        for file, layer, expert in _expert_files(folder):
            old = old or layer is None
            tensors |= _experts_of(file, layer, expert, order)
        layout = layout_for(tensors, str(folder))
        _refuse_missing(folder, tensors)
        ordered = _in_order(tensors)
        told = _configs(content.beside, str(dense[0]))
        model = self._of_ranks(layout).of_states([dense[0]], [ordered], content.beside, options, told)
        model.beside = {"ranks": [content.beside], "values": {}}
        about = {"folder": True, "old": old, "key": key, "tag": folder.name if folder != source else None}
        return remember(model, layout, about)

    def write(self, model: Model, target: Path, options: Options) -> list[Path]:
        """See :class:`Format`."""
        if model.gpt is not None:
            return MEGATRON_DEEPSPEED.write(model, target, options)
        again = model.origin if model.origin.get("layout") == self.name else {}
        if target.suffix in ENDINGS:
            layout = layout_again(again) if again else _fresh(model)
            return self._of_ranks(layout).write(model, target, options)
        with new_folder(target, overwrite=options.overwrite, marker=LATEST) as folder:
            self._write_folder(model, folder, again, options)
        return [target]

    def _write_folder(self, model: Model, folder: Path, again: Mapping[str, Any], options: Options) -> None:
        tag = again.get("tag", "converted") if again else "converted"
        if tag is not None and not is_name(tag):
            raise ValueError(f"deepspeed: tag: expected the name of a folder, got {tag!r:.80}")
        inside = folder / tag if tag else folder
        inside.mkdir(exist_ok=True)
        of_expert: dict[str, str] = {}  # the files of experts' tensors

        def made(prefix: str) -> dict[str, Stored]:
            its = self._layer(model, prefix, list(model.layers).index(prefix), again)
            of_expert.update({name: file for name, (file, _) in its.items() if file is not None})
            return {name: stored for name, (_, stored) in its.items()}

        state: dict[str, Stored] = {}
        by_file: dict[str, dict[str, Stored]] = {}
        for name, stored in model.with_layers(made).items():
            place = by_file.setdefault(of_expert[name], {}) if name in of_expert else state
            place[name] = as_asked(stored, options)
        for file, tensors in by_file.items():
            _save(inside / file, tensors, options)
        beside = model.beside.get("ranks", [{}])[0] if again else {}
        key = again.get("key") or "module"
        dense = {
            key: state,
            **{name: value for name, value in beside.items() if name not in OPTIMIZERS},
        }
        _save(inside / "mp_rank_00_model_states.pt", dense, options)
        if tag:
            (folder / LATEST).write_text(tag, encoding="utf-8")

    def _layer(
        self, model: Model, prefix: str, number: int, again: Mapping[str, Any]
    ) -> dict[str, tuple[str | None, Stored]]:
        """A layer's tensors by their names in the whole model, each with the file of its expert, if it is one's."""
        where = f"deepspeed: {prefix.removesuffix('.') or 'the layer'}"
        bank = from_dmoe(model.of_layer(prefix), where)
        layout = layout_again(again) if again else _fresh(model)
        theirs, found = model.their_prefix(prefix, "moe."), {}
        for name, stored in write_layer(layout, bank, where).items():
            match, file = KEY.match(name), None
            if match is not None:
                file = f"expert_{match['e'] or match['auto']}_mp_rank_00_model_states.pt"
                file = file if again.get("old") else f"layer_{number}_{file}"
            found[theirs + name] = (file, stored)
        return found


def _configs(beside: Mapping[str, Any], where: str) -> dict[str, Any]:
    """By prefix, what makes the config of each of dmoe's layers: it stands in DeepSpeed's config.

    Layers that :class:`dmoe.ResidualMoE` has inside have their own prefix here, as in the files of DeepSpeed's engine.
    """
    told: Any = beside
    for key in ("ds_config", "dmoe", "layers"):
        told = told.get(key) if isinstance(told, Mapping) else None
    if not isinstance(told, Mapping):
        return {}
    return {prefix: config_again(values, where) for prefix, values in told.items() if values is not None}


def _fresh(model: Model) -> Layout:
    """Names for experts that come from elsewhere: Megatron's, or Mixtral's where they are gated."""
    gated = any(name.endswith("experts.gate_up_proj") for name in model.tensors)
    return DMOES_NAMES[gated].layout()


def folder_of(source: Path) -> Path:
    """The folder that ``latest`` names, or the given one."""
    folder, tag = tagged_folder(source)
    if not folder.is_dir():
        raise ValueError(f"{source / LATEST}: expected the name of a folder beside it, got {tag!r:.80}")
    return folder


def _dense_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if DENSE.fullmatch(file.name))


def _expert_files(folder: Path) -> list[tuple[Path, int | None, int]]:
    """Files of experts, with the layer and the expert that their names say, in order."""
    found = []
    for file in folder.iterdir():
        if match := EXPERT.fullmatch(file.name):
            found.append((file, None if match[1] is None else int(match[1]), int(match[2])))
    return sorted(found, key=lambda each: (-1 if each[1] is None else each[1], each[2], each[0].name))


def _experts_of(file: Path, layer: int | None, expert: int, order: Sequence[str]) -> dict[str, Stored]:
    """The tensors of a file of one expert.

    Args:
        file: of the expert.
        layer, expert: as its name says; no layer: of all.
        order: prefixes of the model's layers; empty where nothing tells.

    Raises:
        ValueError: it holds something else than its name says.
    """
    content = read_lazily(file)
    if not isinstance(content, Mapping):
        raise ValueError(f"{file}: expected an expert's state dict, got {type(content).__name__}")
    tensors = {name: value for name, value in content.items() if isinstance(value, Stored)}
    prefixes = set()
    for name in tensors:
        found = KEY.match(name)
        if found is None or int(found["e"] or found["auto"]) != expert:
            raise ValueError(f"{file}: expected tensors of expert {expert}, as its name says, got {name}")
        prefixes.add(found["layer"] or "")
    if not tensors or (layer is not None and len(prefixes) > 1):
        raise ValueError(f"{file}: expected tensors of one layer, got those of {len(prefixes)}")
    if layer is not None and order and (layer >= len(order) or prefixes != {order[layer]}):
        expected = f"the layer {order[layer]}" if layer < len(order) else f"one of {len(order)} layers"
        raise ValueError(f"{file}: expected {expected}, as its name says, got {next(iter(tensors))}")
    return tensors


def _refuse_missing(folder: Path, tensors: Mapping[str, Stored]) -> None:
    """Raise FileNotFoundError for the first expert that a gate chooses and no file has."""
    there = {name[: found.end()] for name in tensors if (found := KEY.match(name))}
    gates = [name for name in tensors if name.endswith(GATE)]
    for number, gate in enumerate(gates):
        prefix = gate.removesuffix(GATE)
        for expert in range(tensors[gate].shape[0]):
            if f"{prefix}deepspeed_moe.experts.deepspeed_experts.{expert}." not in there:
                raise FileNotFoundError(
                    f"{folder}: expected layer_{number}_expert_{expert}_mp_rank_00_model_states.pt, with expert "
                    f"{expert} of {prefix.removesuffix('.')}, got none"
                )


def _in_order(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """Experts behind their layer's gate rather than at the end."""
    experts: dict[str, dict[str, Stored]] = {}
    for name, stored in tensors.items():
        if match := KEY.match(name):
            experts.setdefault(match["layer"] or "", {})[name] = stored
    ordered: dict[str, Stored] = {}
    for name, stored in tensors.items():
        ordered.setdefault(name, stored)
        if name.endswith(GATE):
            ordered |= experts.get(name.removesuffix(GATE), {})
    return ordered


def _save(path: Path, content: Mapping[str, Any], options: Options) -> None:
    with open(path, "xb") as file:
        write_lazily(file, dict(content), options.progress)


DEEPSPEED = DeepSpeed()
