"""A model's adapter to PEFT's files, and from them: :func:`save_peft` and :func:`load_peft`.

The module that stands in a model in another one's place may say what names that one's parts had: an attribute
``their_modules``, ``{"moe.experts": "experts"}`` say, by which files call them, and ``interleaved``, whether their rows
of gate and up took turns.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dmoe.checkpoint.new_folder import new_folder
from dmoe.checkpoint.stored import held
from dmoe.expert_targets import half_of
from dmoe.layer import MoE
from dmoe.lora.adapter_file import AdapterFile, Update, joined
from dmoe.lora.config import LoRA
from dmoe.lora.model_types import LEAVES
from dmoe.lora.peft_config import CONFIG, PARAMETERS_AS_STORED_SINCE
from dmoe.lora.peft_read import read_adapter
from dmoe.lora.peft_write import write_adapter
from dmoe.lora.router import RouterAdapter
from dmoe.lora.states import put_values
from dmoe.lora.targets import PATHS, TARGETS, adapted_modules
from dmoe.other_experts import experts_in

_LEAVES_OF = {"gate_up_proj": LEAVES[:2], "up_proj": LEAVES[1:2], "down_proj": LEAVES[2:]}


@dataclass(frozen=True)
class _Named:
    """A module that can have adapters, and what files call it."""

    path: str
    theirs: str
    module: nn.Module
    interleaved: bool

    @property
    def is_shared(self) -> bool:
        return f".{self.path}".endswith(f".{PATHS['shared_expert']}")


def save_peft(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    name: str = "default",
    base: str | os.PathLike[str] | None = None,
    layout: str = "peft",
    version: tuple[int, int] = PARAMETERS_AS_STORED_SINCE,
    overwrite: bool = False,
) -> None:
    """Write an adapter as PEFT does: ``adapter_config.json`` and ``adapter_model.safetensors``, both or none.

    Names are those of the model's modules without dmoe, and without a ``PeftModel`` around it; of a model of Hugging
    Face PEFT reads them. Adapters of PEFT's own are not written, ``PeftModel.save_pretrained`` does that. Under expert
    parallelism and FSDP2 every rank calls this, experts are gathered, and the first rank writes.

    Of the options the files have the ranks, the scales and what is adapted. ``dropout`` is written in layouts that name
    experts one by one, where all adapted experts have the same, and 0 else: PEFT refuses any beside
    ``target_parameters``, and so does not load such files into models of Transformers 5, where it joins experts, unless
    ``lora_dropout`` is set to 0. Not carried are ``init``, ``rank_stabilized`` (the scale it leads to is),
    ``share_a`` and ``share_b`` (each expert gets its own), and the seed.

    Args:
        model: with the adapter.
        folder: a new one.
        name: of the adapter.
        base: name or path of the base model, for PEFT; None is what a model of Hugging Face says of itself.
        layout, version: see :func:`dmoe.lora.peft_write.write_adapter`.
        overwrite: whether an adapter in the folder is replaced.

    Raises:
        ValueError: no adapter of that name, experts of different widths, or a layout that cannot hold it.
        OSError: it cannot be written.
    """
    model = _unwrapped(model)
    adapter = file_of(model, name)
    config = getattr(model, "config", None)
    base = base if base is not None else getattr(config, "_name_or_path", None) or None
    ranks = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    problem: list[Any] = [None]
    if not ranks or dist.get_rank() == 0:
        try:
            with new_folder(folder, overwrite=overwrite, marker=CONFIG) as made:
                write_adapter(adapter, made, layout, base=None if base is None else str(base), version=version)
        except (OSError, ValueError) as error:
            problem[0] = error
    if ranks:
        dist.broadcast_object_list(problem, src=0)
    if problem[0] is not None:
        raise problem[0]


@torch.no_grad()
def load_peft(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    name: str = "default",
    dtype: torch.dtype | None = None,
    strict: bool = True,
) -> list[str]:
    """Read an adapter of PEFT's files beside the experts, routers and shared experts of a model; nothing is frozen.

    The adapter's options are the rank, the scale and the dropout that the files say (``load_peft`` again under the same
    name keeps those that the model has), and as ``targets`` the parts of layers that the files adapt; ``init`` and
    sharing, of which files say nothing, are the defaults, and so are those of what :func:`save_peft` has written.

    Factors of different ranks are padded with zeros to the largest of a module. All ranks call this under expert
    parallelism, and keep their own experts'.

    Args:
        model: of :class:`dmoe.MoE`, or of Hugging Face with experts that dmoe computes; or a ``PeftModel`` around it.
        folder: the adapter's.
        name: of the adapter in this model.
        dtype: of the parameters; None is that of the weights.
        strict: refuse an adapter that adapts other modules too, such as attention; they are left out else, and may
            be PEFT's.

    Returns:
        Names of modules in the files that were left out.

    Raises:
        ValueError: files that are damaged, modules that the model does not have, shapes that do not fit. Nothing has
            changed then.
        OSError: a file is missing.
    """
    model = _unwrapped(model)
    adapter = read_adapter(folder)
    named = {each.theirs: each for each in _named(model)}
    found: dict[str, dict[str, Any]] = {}
    for module, projections in adapter.experts.items():
        if module not in named:
            raise _unknown(adapter.where, module, named)
        for projection, update in projections.items():
            found.setdefault(module, {})[projection] = update.expanded()
    left: list[str] = []
    for path, update in adapter.linear.items():
        stem, _, leaf = path.rpartition(".")
        if path in named and not named[path].is_shared:
            found[path] = {"weight": update}
        elif stem in named and named[stem].is_shared and leaf in LEAVES:
            found.setdefault(stem, {})[leaf] = update
        else:
            left.append(path)
    if strict and left:
        raise _unknown(adapter.where, left[0], named)
    if not found:
        raise ValueError(f"{adapter.where}: expected adapters of experts, routers or shared experts, got none")
    configs: dict[str, LoRA] = {}
    tensors: dict[str, Tensor] = {}
    options: dict[str, Any] = {"dropout": adapter.dropout, "targets": _targets(named, found)}
    for theirs, updates in found.items():
        each = named[theirs]
        if each.is_shared and ("gate_proj" in updates or "up_proj" in updates):
            gate, up = updates.pop("gate_proj", None), updates.pop("up_proj", None)
            gated = experts_in(each.module).up_name == "gate_up_proj"
            updates["gate_up_proj" if gated else "up_proj"] = joined(gate, up, adapter.where) if gated else up
        rank, scale = max(update.rank for update in updates.values()), next(iter(updates.values())).scale
        configs[each.path] = LoRA(rank=rank, alpha=scale * rank, **options)
        tensors |= _tensors(each, updates, rank, scale, adapter.where)
    put_values(model, configs, tensors, name, dtype=dtype, operation="dmoe.lora.load_peft")
    return left


def file_of(model: nn.Module, name: str) -> AdapterFile:
    """A model's adapter as files have it; a collective call where it is spread out."""
    adapted = adapted_modules(model)
    linear: dict[str, Any] = {}
    experts: dict[str, dict[str, Any]] = {}
    dropouts: set[float] = set()
    for each in _named(model):
        module: Any = each.module
        if each.path not in adapted or name not in module.lora.names:
            continue
        adapter = module.lora.get_submodule(name)
        scale = adapter.config.scale
        if isinstance(adapter, RouterAdapter):
            factors = adapter.weight
            linear[each.theirs] = Update(held(_whole(factors.a)), held(_whole(factors.b)), scale)
            continue
        dropouts.add(adapter.config.dropout)
        for projection, factors in adapter.factors.items():
            if factors.projection.widths:
                widths = factors.projection.widths
                raise ValueError(f"save_peft: {each.path}: expected experts of one width, got {widths}")
            a, b = _whole(factors.a), _whole(factors.b)
            if each.is_shared:
                rows = b[0].unbind(0) if b.dim() == 4 else (b[0],)
                for leaf, part in zip(_LEAVES_OF[projection], rows, strict=True):
                    linear[f"{each.theirs}.{leaf}"] = Update(held(a[0]), held(part), scale)
                continue
            if b.dim() == 4:
                b = (b.transpose(1, 2) if each.interleaved else b).flatten(1, 2)
            experts.setdefault(each.theirs, {})[projection] = Update(held(a), held(b.contiguous()), scale)
    if not linear and not experts:
        known = sorted({each for module in adapted.values() for each in module.lora.names})
        raise ValueError(f"save_peft: name: expected one of the model's adapters {known}, got {name!r}")
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    return AdapterFile(
        linear,
        experts,
        {},
        "the model",
        model_type if isinstance(model_type, str) else None,
        dropouts.pop() if len(dropouts) == 1 else 0.0,
    )


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of a ``PeftModel``, whose names are those of files."""
    inside = getattr(model, "get_base_model", None)
    found: nn.Module = model if inside is None else inside()
    return found


def _whole(parameter: Tensor) -> Tensor:
    parameter = parameter.detach()
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def _named(model: nn.Module) -> Iterator[_Named]:
    """All modules that can have adapters."""
    standing: dict[str, tuple[str, bool]] = {}  # paths inside what stands in another's place -> theirs
    for path, module in model.named_modules():
        for ours, theirs in getattr(module, "their_modules", {}).items():
            standing[f"{path}.{ours}".lstrip(".")] = (f"{path}.{theirs}".lstrip("."), module.interleaved)
    for path, module in model.named_modules():
        layers = [f"{path}.router".lstrip(".")] if isinstance(module, MoE) else []
        for each in layers:
            theirs, _ = standing.get(each, (each, False))
            yield _Named(each, theirs, module.router, False)
        try:
            experts = experts_in(module)
        except ValueError:  # nothing that dmoe computes
            continue
        if experts is not None:
            plain = path.replace(".base_layer", "")  # PEFT's wrappers of parameters
            theirs, turns = standing.get(path, (plain, getattr(experts, "interleaved", False)))
            yield _Named(path, theirs, module, turns)


def _targets(named: Mapping[str, _Named], found: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
    """The parts of layers that updates are for, as :class:`LoRA` names them."""
    parts = set()
    for theirs, updates in found.items():
        each = named[theirs]
        if "weight" in updates:
            parts.add("router")
        else:
            part = "shared_expert" if each.is_shared else "experts"
            parts |= {f"{part}.{half_of(name)}" for name in updates}
    return tuple(target for target in TARGETS if target in parts)


def _tensors(named: _Named, updates: Mapping[str, Update], rank: int, scale: float, where: str) -> dict[str, Tensor]:
    """A module's updates, of one rank and scale, as :func:`dmoe.lora.state_dict` has them."""
    found: dict[str, Tensor] = {}
    experts = experts_in(named.module)
    gated = experts is not None and experts.up_name == "gate_up_proj"
    for given, update in updates.items():
        projection = given
        if projection == "up_proj" and gated:
            update, projection = joined(None, update, where), "gate_up_proj"
        update = update.padded(rank).with_scale(scale)
        a, b = update.a.read(), update.b.read()
        if experts is not None:
            a, b = (a[None], b[None]) if named.is_shared else (a, b)
            if projection == "gate_up_proj":
                b = b.unflatten(1, (-1, 2)).transpose(1, 2) if named.interleaved else b.unflatten(1, (2, -1))
        found |= {f"{named.path}.{projection}.a": a, f"{named.path}.{projection}.b": b}
    return found


def _unknown(where: str, module: str, named: Mapping[str, object]) -> ValueError:
    some = ", ".join(list(named)[:4])
    return ValueError(
        f"{where}: {module}: expected a module that dmoe adapts, as {some or 'the model has none of'}; read the rest "
        "with PEFT (strict=False), or merge it into the files (python -m dmoe.lora merge)"
    )
