"""dmoe's own files: tensors under dmoe's names, and beside them the config of every MoE layer.

==================  ================================================================================================
in a folder         what it is
==================  ================================================================================================
``dmoe.json``       ``{"format", "layers": {prefix: config}, "gpt", "origin", "files"}``
``model*``          the tensors, as ``safetensors``, in several files with an index where they are many
``vocab.json`` ...  a tokenizer's files, if there are any
``beside.pt``       what stood beside the model in the files that it comes from, if anything
==================  ================================================================================================

A target with the ending of a file becomes one file: of ``torch.save``, with tensors under ``model`` and the JSON under
``dmoe``; or, as ``.safetensors``, tensors with the JSON in the header. With ``{rank}`` in its name there is one for
each rank with its own experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dmoe.checkpoint.files import plain_classes
from dmoe.checkpoint.formats.base import FILES, Options, as_asked, copy_files, files_beside
from dmoe.checkpoint.formats.dmoe_layers import LAYOUT
from dmoe.checkpoint.formats.rank_contents import ENDINGS, OPTIMIZERS, Content, expanded
from dmoe.checkpoint.formats.rank_files import RankFiles
from dmoe.checkpoint.model import Model
from dmoe.checkpoint.new_folder import is_name, new_folder
from dmoe.checkpoint.torch_reader import read_lazily
from dmoe.checkpoint.torch_writer import write_lazily
from dmoe.config import MoEConfig
from dmoe.config_json import config_from_json, config_to_json

FORMAT = "dmoe checkpoint 1"
FILE, BESIDE = "dmoe.json", "beside.pt"


def _config(beside: Mapping[str, Any], **facts: Any) -> MoEConfig:
    """That which stands as ``config`` beside a state dict, where somebody put it there; else the defaults."""
    config = beside.get("config")
    if not isinstance(config, MoEConfig):
        return MoEConfig(**facts)
    return replace(config, **{name: value for name, value in facts.items() if name != "router"})


_PLAIN = RankFiles("dmoe", "", (LAYOUT,), _config, container="model")


class DmoeFiles:
    """The :class:`Format`."""

    name = "dmoe"
    about = "dmoe's own: safetensors with dmoe.json beside, or files of torch.save"

    def fits(self, sources: Sequence[Path]) -> bool:
        """See :class:`Format`."""
        try:
            if len(sources) == 1 and sources[0].is_dir():
                return (sources[0] / FILE).is_file() or _PLAIN.fits(sources)
            files = [file for source in sources for file in expanded(source)]
            content = Content.of(files[0])
            return "dmoe" in content.beside or bool(LAYOUT.find(content.tensors()))
        except (OSError, ValueError):
            return False

    def holds_configs(self, sources: Sequence[Path]) -> bool:
        """Whether files of this layout say what their layers are, as those that :meth:`write` makes do."""
        return "dmoe" in Content.of(expanded(sources[0])[0]).beside

    def read(self, sources: Sequence[Path], options: Options) -> Model:
        """See :class:`Format`."""
        if len(sources) == 1 and (sources[0] / FILE).is_file():
            return _read_folder(sources[0])
        model = _PLAIN.read(sources, options)
        of_ranks: list[dict[str, Any]] = model.beside.get("ranks", [{}])
        if (told := of_ranks[0].get("dmoe")) is None:
            return model
        kept = of_ranks[0].get("beside", {})
        found = _with(Model(model.tensors, {}), told, str(sources[0]))
        found.beside = dict(kept) if isinstance(kept, Mapping) else {}
        return found

    def write(self, model: Model, target: Path, options: Options) -> list[Path]:
        """See :class:`Format`."""
        if target.suffix in ENDINGS:
            told: dict[str, Any] = {"dmoe": _json_of(model)}
            if beside := _beside(model):
                told["beside"] = beside
            as_plain = Model(model.tensors, model.layers, origin={"layout": "dmoe", "containers": ["model"]})
            as_plain.beside = {"ranks": [told], "values": {}}
            return _PLAIN.write(as_plain, target, options)
        if (options.ranks or 1) > 1:
            raise ValueError(
                f"{target}: expected a file with {{rank}} in its name, as part{{rank}}.pt, for several ranks"
            )
        from dmoe.checkpoint.hub_writer import write_json
        from dmoe.checkpoint.shared_files import SharedFiles

        tensors = {name: as_asked(stored, options) for name, stored in model.tensors.items()}
        with new_folder(target, overwrite=options.overwrite, marker=FILE) as folder:
            shards = SharedFiles({name: stored.meta() for name, stored in tensors.items()})
            shards.create(folder)
            with shards.writer(folder) as writer:
                for name, stored in tensors.items():
                    writer.write(name, 0, stored.read())
                    options.progress(stored.nbytes)
            if beside := _beside(model):
                with open(folder / BESIDE, "xb") as file:
                    write_lazily(file, beside)
            copy_files(model, options, folder)
            write_json(folder / FILE, _json_of(model, {what: FILES[what] for what in files_beside(model, options)}))
        return [target]


def _beside(model: Model) -> dict[str, Any]:
    """What stood beside, without states of optimizers, which do not fit."""
    found = dict(model.beside)
    if isinstance(found.get("ranks"), list):
        ranks = found["ranks"]
        found["ranks"] = [{key: each[key] for key in each if key not in OPTIMIZERS} for each in ranks]
    return found if any(found.values()) else {}


def _json_of(model: Model, files: Mapping[str, str] | None = None) -> dict[str, Any]:
    layers = {prefix: None if config is None else config_to_json(config) for prefix, config in model.layers.items()}
    return {"format": FORMAT, "layers": layers, "gpt": model.gpt, "origin": model.origin, "files": files or {}}


def _read_folder(folder: Path) -> Model:
    from dmoe.checkpoint.hub_folder import read_json, stored_tensors

    model = _with(Model(stored_tensors(folder), {}), read_json(folder / FILE), str(folder / FILE))
    if (folder / BESIDE).exists():
        model.beside = dict(read_lazily(folder / BESIDE, known=plain_classes()))
    return model


def _with(model: Model, told: Any, where: str) -> Model:
    """A model with what the JSON beside its tensors says.

    Raises:
        ValueError: it is of another format, or says what the tensors are not.
    """
    if not isinstance(told, Mapping) or told.get("format") != FORMAT:
        got = told.get("format") if isinstance(told, Mapping) else told
        raise ValueError(f"{where}: expected the format {FORMAT!r}, got {got!r:.80}")
    layers, origin, files = told.get("layers") or {}, told.get("origin") or {}, told.get("files") or {}
    for name, value in (("layers", layers), ("origin", origin), ("files", files)):
        if not isinstance(value, Mapping):
            raise ValueError(f"{where}: {name}: expected an object with names, got {value!r:.80}")
    gpt = told.get("gpt")
    if gpt is not None and not isinstance(gpt, Mapping):
        raise ValueError(f"{where}: gpt: expected the config of a model, got {gpt!r:.80}")
    model.from_json = True
    model.gpt, model.origin = None if gpt is None else dict(gpt), dict(origin)
    for what, name in files.items():
        if what not in FILES or not is_name(name):
            raise ValueError(f"{where}: {what}: expected the name of a file beside this one, got {name!r:.80}")
        model.files[str(what)] = str(Path(where).parent / name)
    for prefix, values in layers.items():
        if not any(name.startswith(prefix) for name in model.tensors):
            raise ValueError(f"{where}: expected tensors of the layer {prefix.removesuffix('.')}, got none")
        model.layers[prefix] = None
        if values is not None:
            model.set_config(prefix, config_again(values, where), {})
    return model


def config_again(values: Any, where: str) -> Any:
    """Builds the config that a file holds, which has to be the one of its tensors, for :meth:`Model.set_config`."""

    def build(**facts: Any) -> MoEConfig:
        try:
            config = config_from_json(values)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        for name, value in facts.items():
            if name not in ("router", "top_k") and not _says_the_same(name, config, value):
                raise ValueError(
                    f"{where}: {name}: expected {value!r}, as its tensors have it, got {getattr(config, name)!r}"
                )
        return config

    return build


def _says_the_same(name: str, config: MoEConfig, value: Any) -> bool:
    if name == "ffn_hidden_size":
        return config.ffn_sizes == (value,) * config.num_experts
    return bool(getattr(config, name) == value)


DMOE = DmoeFiles()
