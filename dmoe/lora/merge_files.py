"""An adapter merged into the model folder that it belongs to: files in, files out, a tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from dmoe.checkpoint import Model, Options
from dmoe.checkpoint.formats.hf import HF
from dmoe.checkpoint.formats.hf_families import Family, named
from dmoe.checkpoint.hub_beside import copy_beside
from dmoe.checkpoint.maps import TURNS, TURNS_TRANSPOSED, Sizes
from dmoe.checkpoint.new_folder import new_folder
from dmoe.checkpoint.stored import Stored, mapped
from dmoe.expert_targets import PATHS
from dmoe.lora.adapter_file import AdapterFile, Update, joined, merged_rows

_SHARED = f"{PATHS['shared_expert']}."


def merge_folder(
    base: Path,
    adapter: AdapterFile,
    target: Path,
    *,
    overwrite: bool = False,
    progress: Callable[[int], object] = lambda count: None,
) -> list[str]:
    """Write ``W + scale * B A`` of every adapted weight into a new model folder, and all else as it is.

    Sums are computed in float32 (float64 for weights of that dtype), expert by expert, and rounded once to the weight's
    dtype. Names, files, and what lies beside the tensors are the base's; weights that were MXFP4 are bfloat16 then.

    Args:
        base: a folder of one of Hugging Face's families of MoE models that :mod:`dmoe.checkpoint` knows.
        adapter: whose targets all have to be in it.
        target: a new folder, which is there as a whole or not at all.
        overwrite: whether a model in it is replaced.
        progress: told the bytes of each tensor that has been written.

    Returns:
        Sentences about what differs from the base besides.

    Raises:
        ValueError: a target that the base does not have, or of another shape; the message names file and target.
        OSError: a file cannot be read, or written.
    """
    model = HF.read([base], Options())
    family = named(model.origin["family"])
    merged = dict(model.tensors)
    for module, projections in adapter.experts.items():
        layer = _layer_of(module, model, family)
        if layer is None:
            raise _unknown(adapter, module, base)
        _merge_experts(merged, layer, module, projections, family, adapter.where)
    for path, update in adapter.linear.items():
        name, half = _tensor_of(path, model, family)
        if name not in merged:
            raise _unknown(adapter, path, base)
        merged[name] = _merged(merged[name], update.expanded(), half, f"{adapter.where}: {path}")
    model.tensors = merged
    options = Options(overwrite=overwrite, progress=progress)
    with new_folder(target, overwrite=overwrite) as folder:
        HF.write_into(folder, model, target, options)
        copy_beside(base, folder)
    return model.notes


def _unknown(adapter: AdapterFile, target: str, base: Path) -> ValueError:
    return ValueError(f"{adapter.where}: {target}: expected a module of the model in {base}, which has none so named")


def _layer_of(module: str, model: Model, family: Family) -> str | None:
    """The MoE layer that an experts' module of the adapter is in; blocks have other names in files and in memory."""
    block = module.removesuffix(".experts")
    stem, _, name = block.rpartition(".")
    blocks = {form.block for form in family.forms.values()}
    names = [name, *sorted(blocks - {name})] if name in blocks else [name]
    return next((each for n in names if (each := f"{stem}.{n}.".lstrip(".")) in model.layers), None)


def _merge_experts(
    merged: dict[str, Stored],
    layer: str,
    module: str,
    projections: Mapping[str, Update],
    family: Family,
    where: str,
) -> None:
    gated = f"{layer}experts.gate_up_proj" in merged
    for projection, given in projections.items():
        update, place = given.expanded(), f"{where}: {module}.{projection}"
        name = projection
        if projection == "up_proj" and gated:  # of one half, from files with experts one by one
            update, name = joined(None, update, place), "gate_up_proj"
        elif projection == "gate_up_proj":
            update = replace(update, b=_by_halves(update.b, family))
        if f"{layer}experts.{name}" not in merged:
            raise ValueError(f"{place}: expected experts {'with' if gated else 'without'} a gate, as {layer} has them")
        base = merged[f"{layer}experts.{name}"]
        flat = (base.shape[0], base.shape[1] * base.shape[2], base.shape[3]) if len(base.shape) == 4 else base.shape
        if update.shape != flat:
            raise ValueError(f"{place}: expected an update of {flat}, as the weight is, got one of {update.shape}")
        merged[f"{layer}experts.{name}"] = Stored(base.shape, base.dtype, _Sum(base, update, place), base.where)


def _by_halves(b: Stored, family: Family) -> Stored:
    """Rows of ``b`` as the parameter has them, as gates and then ups."""
    by_turns = any(row.map is TURNS_TRANSPOSED for form in family.forms.values() for row in form.layout.rows)
    return TURNS.join([b], Sizes(b.shape[0], 0)) if by_turns else b


class _Sum:
    """Rows of experts' weights with what is added to them; factors are read once for all experts."""

    def __init__(self, base: Stored, update: Update, where: str) -> None:
        self.base, self.update, self.where = base, update, where
        self._factors: tuple[Tensor, Tensor] | None = None

    def __call__(self, start: int, stop: int) -> Tensor:
        if self._factors is None:
            self._factors = self.update.a.read(), self.update.b.read()
        (a, b), rows = self._factors, self.base.rows(start, stop)
        out = torch.empty_like(rows)
        for place, expert in enumerate(range(start, stop)):
            flat = rows[place].flatten(0, -2)
            merged = _finite(
                merged_rows(flat, a[expert], b[expert], self.update.scale), f"{self.where}, expert {expert}"
            )
            out[place] = merged.view(rows[place].shape)
        if stop == self.base.shape[0]:
            self._factors = None
        return out


def _finite(merged: Tensor, where: str) -> Tensor:
    if not merged.isfinite().all():
        raise ValueError(f"{where}: expected finite weights with the adapter in them, got others")
    return merged


def _tensor_of(path: str, model: Model, family: Family) -> tuple[str, int | None]:
    """The name of a linear layer's weight among the model's tensors, and which half of it that is, if it has two."""
    for layer in model.layers:
        stem, _, block = layer.removesuffix(".").rpartition(".")
        for form in family.forms.values():
            for row in form.layout.rows:
                for place, theirs in enumerate(row.theirs):
                    for name in {block, form.block}:
                        if f"{path}.weight" == f"{stem}.{name}.{theirs}".lstrip(".") and not row.by_expert:
                            return layer + _dmoe_name(row.field), place if len(row.theirs) == 2 else None
    return f"{path}.weight", None


def _dmoe_name(field: str) -> str:
    known = {
        "shared_up": f"{_SHARED}gate_up_proj",
        "shared_down": f"{_SHARED}down_proj",
        "shared_gate": "shared_expert.gate.weight",
    }
    return known.get(field, field)


def _merged(base: Stored, update: Update, half: int | None, where: str) -> Stored:
    """A weight ``(out, in)``, of the first dimensions of which one half may be meant."""
    shape = base.shape[-2:]
    if len(base.shape) < 2 or update.shape != shape:
        raise ValueError(f"{where}: expected an update of {shape}, as the weight is, got one of {update.shape}")

    def added(tensors: list[Tensor]) -> Tensor:
        weight = tensors[0]
        if weight.is_meta:
            return weight
        a, b = update.a.read(), update.b.read()
        if weight.dim() == 2:
            return _finite(merged_rows(weight, a, b, update.scale), where)
        whole = weight.clone()
        place = (0,) if half is None else (0, half)
        whole[place] = _finite(merged_rows(weight[place], a, b, update.scale), where)
        return whole

    return mapped([base], added)  # type: ignore[arg-type]
