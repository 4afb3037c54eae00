"""Model folders of Hugging Face: eleven MoE families, by the names of published files or of modules in memory.

``Model.origin`` has what writing the same folder again needs: ``layout`` (``hf``), ``family``, ``form`` (of names),
``config`` (of ``config.json``), ``max_shard_bytes`` (None of a single file).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dmoe.checkpoint.bank import to_dmoe
from dmoe.checkpoint.formats.base import Options, as_asked
from dmoe.checkpoint.formats.hf_config import Said, notes_on
from dmoe.checkpoint.formats.hf_families import FAMILIES, by_config, by_names, named
from dmoe.checkpoint.formats.hf_files import CONFIG, model_file, open_files, read_config
from dmoe.checkpoint.formats.hf_layers import (
    check_whole,
    family_of,
    find_layers,
    layer_config,
    natural,
    renamed_to,
    unsure,
)
from dmoe.checkpoint.formats.hf_packed import unpacked
from dmoe.checkpoint.model import Model
from dmoe.checkpoint.new_folder import new_folder
from dmoe.checkpoint.stored import Stored
from dmoe.config import MoEConfig


class HuggingFace:
    """The layout ``hf``, see :class:`dmoe.checkpoint.formats.base.Format`."""

    name = "hf"
    about = f"a model folder of Hugging Face ({', '.join(FAMILIES)})"

    def fits(self, sources: Sequence[Path]) -> bool:
        """A folder, or a file, with a config of a known family, or with a family's names."""
        if len(sources) != 1 or model_file(Path(sources[0])) is None:
            return False
        try:
            config = read_config(Path(sources[0]))
            if config is not None and by_config(config) is not None:
                return True
            return bool(by_names(open_files(Path(sources[0])).tensors))
        except (OSError, ValueError, ImportError):
            return False

    def read(self, sources: Sequence[Path], options: Options) -> Model:
        """A folder, or its one file of tensors beside which a ``config.json`` may lie.

        Raises:
            OSError: no model there, or a part of one missing.
            ValueError: damaged files, a family that is not known, layers that are incomplete or that ``config.json``
                contradicts.
        """
        if len(sources) != 1:
            raise ValueError(f"hf: expected one folder, got {len(sources)} sources")
        files = open_files(Path(sources[0]))
        tensors, packed = unpacked(files.tensors, files.where)
        config = dict(files.config) if files.config is not None else None
        family, sure = family_of(files, tensors, options)
        notes: list[str] = []
        if packed:
            if config is not None:
                config.pop("quantization_config", None)
            notes.append(f"{packed} tensors of {files.where} were MXFP4 and are bfloat16 now, with the same values.")
        form, found = find_layers(family, tensors, files.where)
        renamed: dict[str, dict[str, Stored]] = {}  # by the first name of a layer's tensors
        inside: set[str] = set()
        layers: dict[str, MoEConfig | None] = {}
        said = Said(config) if config is not None and sure else None
        for prefix, layer in sorted(found.items(), key=lambda item: natural(item[0])):
            where = f"{files.where}: {prefix}"
            bank, used = layer.read(tensors, layer.routed(tensors), where)
            check_whole(family, bank, where)
            renamed[next(name for name in tensors if name in used)] = {
                prefix + name: tensor for name, tensor in to_dmoe(bank, where).items()
            }
            inside |= used
            layers[prefix], problem = layer_config(family, said, bank, files, prefix)
            if problem and problem not in notes:
                notes.append(problem)
        if said is None:
            notes.append(unsure(files, family))
        else:
            notes += notes_on(family.name, said)
        ordered: dict[str, Stored] = {}
        for name, tensor in tensors.items():
            ordered |= renamed.get(name, {} if name in inside else {name: tensor})
        origin: dict[str, Any] = {"layout": self.name, "family": family.name, "form": form}
        origin |= {"config": config, "max_shard_bytes": files.max_shard_bytes}
        return Model(ordered, layers, origin=origin, notes=notes)

    def write(self, model: Model, target: Path, options: Options) -> list[Path]:
        """A folder with ``model.safetensors``, or several files and their index, and ``config.json``.

        MoE layers get the names of ``options.family``, or of the family and the form that they were read from. A
        ``config.json`` is written where that family's was read.

        Raises:
            OSError: it cannot be written, or is there already.
            ValueError: no family given, or a layer that it has no names for.
        """
        # A folder without a config may be replaced as well, if it holds a model.
        there = model_file(target) if target.is_dir() else None
        marker = CONFIG if there is None or (target / CONFIG).is_file() else there.name
        with new_folder(target, overwrite=options.overwrite, marker=marker) as folder:
            self.write_into(folder, model, target, options)
        return [target]

    def write_into(self, folder: Path, model: Model, target: Path, options: Options) -> None:
        """The same into an empty folder that will be ``target``.

        Raises:
            OSError, ValueError: as :meth:`write`.
        """
        from dmoe.checkpoint.hub_writer import MAX_SHARD_BYTES, write_json
        from dmoe.checkpoint.shared_files import SharedFiles

        origin = model.origin
        name = options.family or origin.get("family")
        if name is None:
            raise ValueError(f"{target}: hf: expected a family to name layers by (--family), got none")
        family = named(name)
        same = origin.get("family") == family.name
        tensors = renamed_to(model, family, origin.get("form") if same else None, str(target))
        tensors = {name: as_asked(each, options) for name, each in tensors.items()}
        limit = (origin.get("max_shard_bytes") if same else None) or MAX_SHARD_BYTES
        files = SharedFiles({name: tensor.meta() for name, tensor in tensors.items()}, limit)
        config = origin.get("config") if same else None
        files.create(folder)
        with files.writer(folder) as writer:
            for name, tensor in tensors.items():
                writer.write(name, 0, tensor.read())
                options.progress(tensor.nbytes)
        if config is not None:
            write_json(folder / CONFIG, _with_dtype(config, options))


def _with_dtype(config: Mapping[str, Any], options: Options) -> dict[str, Any]:
    if options.dtype is None:
        return dict(config)
    name = str(options.dtype).removeprefix("torch.")
    return {key: name if key in ("dtype", "torch_dtype") else value for key, value in config.items()}


HF = HuggingFace()
