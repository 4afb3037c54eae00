"""Adapters that are added into the weights, and taken out again: expert by expert, never a product of all experts."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dmoe.expert_slice import local_part
from dmoe.lora.targets import adapted_modules
from dmoe.other_experts import experts_in


@torch.no_grad()
def merge(model: nn.Module, names: str | Sequence[str] | None = None, *, keep_base: bool = False) -> None:
    """Add ``s B A`` to the weights, in float32 (float64 of float64), each number rounded once to the weight's dtype.

    The adapters cost nothing from then on, and stay where they are: in the model's state dict too, beside weights that
    have them already. :func:`remove` takes them out for good. At no time is there more than one expert's product.

    Args:
        model: whose weights change.
        names: adapters; None for those that are active.
        keep_base: keep a copy of the weights that change, so that :func:`unmerge` brings back their very bits.

    Raises:
        ValueError: weights held as codes, or sharded by FSDP; an adapter that is merged already, is named twice, or
            none; ``keep_base`` where another is in the weights already. Nothing has changed then.
    """
    wanted = None if names is None else [names] if isinstance(names, str) else list(names)
    held = adapted_modules(model)
    known = {name for module in held.values() for name in module.lora.names}
    if missing := [name for name in wanted or () if name not in known]:
        raise ValueError(f"dmoe.lora.merge: expected names of the model's adapters {sorted(known)}, got {missing}")
    todo: list[tuple[Any, list[str]]] = []
    for path, module in held.items():
        chosen = [name for name in (module.lora.active if wanted is None else wanted) if name in module.lora.names]
        if not module.lora.enabled:
            raise ValueError(
                f"dmoe.lora.merge: {path}: expected adapters that work, got disabled ones: enable(model) first"
            )
        if again := [name for name in chosen if name in module.lora.merged]:
            raise ValueError(f"dmoe.lora.merge: {path}: expected adapters that are not merged, got {again}")
        if len(set(chosen)) < len(chosen):
            raise ValueError(f"dmoe.lora.merge: expected each adapter once, got {chosen}")
        for name in chosen:
            _check_plain("merge", path, module, module.lora.get_submodule(name))
        late = _fields(module, chosen) & _fields(module, module.lora.merged) - module.lora.base.keys()
        if keep_base and late:
            raise ValueError(
                f"dmoe.lora.merge: keep_base: {path}: expected weights without adapters in them, got {sorted(late)} "
                f"with {list(module.lora.merged)}: unmerge first"
            )
        todo.append((module, chosen))
    if not any(chosen for _, chosen in todo):
        raise ValueError(f"dmoe.lora.merge: expected at least one adapter of {sorted(known)}, got none")
    for module, chosen in todo:
        adapters = module.lora
        if keep_base:
            new = _fields(module, chosen) - adapters.base.keys()
            kept = {field: local_part(getattr(module, field).detach()).clone() for field in sorted(new)}
            adapters.base = {**adapters.base, **kept}
        for name in chosen:
            _add(module, name, 1.0)
        adapters.merged = (*adapters.merged, *chosen)


@torch.no_grad()
def unmerge(model: nn.Module) -> None:
    """Take out of the weights all that :func:`merge` has added.

    With ``keep_base`` the weights are, bit by bit, what they were. Else the product is subtracted in float32 and each
    number rounded once more: what differs is at most the two roundings, a unit in the last place of the larger of
    the two weights.

    Raises:
        ValueError: weights that FSDP has sharded meanwhile, or that are codes now.
    """
    held = {path: module for path, module in adapted_modules(model).items() if module.lora.merged}
    for path, module in held.items():
        for name in module.lora.merged:
            _check_plain("unmerge", path, module, module.lora.get_submodule(name))
    for module in held.values():
        adapters = module.lora
        for name in adapters.merged[::-1]:
            _add(module, name, -1.0, without=adapters.base)
        for name, kept in adapters.base.items():
            local_part(getattr(module, name).detach()).copy_(kept)
        adapters.base, adapters.merged = {}, ()


def _check_plain(operation: str, path: str, module: Any, adapter: nn.Module) -> None:
    for name in adapter._modules:
        weight: Any = getattr(module, name)
        if not isinstance(weight, Tensor):
            raise ValueError(
                f"dmoe.lora.{operation}: {path}.{name}: expected a tensor, got codes "
                f"({weight.value().format}), to which nothing can be added: dmoe.quant.dequantize(model) first"
            )
        mesh: Any = getattr(getattr(module, "owned", None), "mesh", None)
        its_mesh: Any = getattr(weight, "device_mesh", mesh)
        if its_mesh != mesh:
            raise ValueError(
                f"dmoe.lora.{operation}: {path}.{name}: expected a weight that FSDP does not shard, got a DTensor on "
                f"{its_mesh}: merge before fully_shard, or save the adapter and merge it in one process"
            )


def _fields(module: Any, names: Sequence[str]) -> set[str]:
    """The parameters that adapters stand beside."""
    return {field for name in names for field in module.lora.get_submodule(name)._modules}


def _add(module: Any, name: str, sign: float, without: Collection[str] = ()) -> None:
    """``sign`` times an adapter's products to the weights beside it, but for those ``without``."""
    for part, product in _products(module, module.lora.get_submodule(name), without):
        wide = part.to(product.dtype)
        part.copy_(wide.add_(product, alpha=sign) if wide is not part else part.add(product, alpha=sign))


def _products(module: Any, adapter: Any, without: Collection[str]) -> Iterator[tuple[Tensor, Tensor]]:
    """An expert's part of a weight, and what is to be added to it, one after the other."""
    scale = adapter.config.scale
    experts = experts_in(module)
    if experts is None and "weight" in without:
        return
    if experts is None:
        yield module.weight.detach(), adapter.weight.product(scale)
        return
    weights = experts.weights()
    for position in range(weights.num_experts):
        of_expert = weights.of_expert(position)
        for field, factors in adapter.factors.items():
            if field in without:
                continue
            part = of_expert[f"{factors.projection.half}_proj"]
            yield part.detach(), factors.product(position, scale)
