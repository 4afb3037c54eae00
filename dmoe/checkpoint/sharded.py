"""Distributed checkpoints of models whose experts are on several ranks: every rank writes its part, any number reads.

The files are those of ``torch.distributed.checkpoint``; values lie there by name, an optimizer's by the names of its
model's parameters. Frameworks' checkpoints use this.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from dmoe.parallel import split_parameters

Optimizers = Mapping[str, tuple[nn.Module, torch.optim.Optimizer]]


def refuse_plain_experts(operation: str, model: nn.Module) -> None:
    """That a distributed checkpoint can tell the experts of this rank from those of others.

    Raises:
        ValueError: they are plain tensors.
    """
    plain = [p for p in split_parameters(model)[1] if not hasattr(p, "to_local")]
    if plain:
        raise ValueError(
            f"{operation}: expected experts whose parameters are DTensor, got {len(plain)} plain tensors, of which a "
            "distributed checkpoint would keep the first rank's alone: build the layer with dtensor=True and with "
            "experts of one width"
        )


def save_sharded(folder: Path, models: Mapping[str, nn.Module], optimizers: Optimizers, **values: Any) -> None:
    """Write models, optimizers with the models that they are of, and other values by name; every rank calls this.

    Raises:
        ValueError: experts that are plain tensors.
    """
    parts = dict(values)
    for name, model in models.items():
        refuse_plain_experts("save_sharded", model)
        parts[name] = get_model_state_dict(model)
    for name, (model, optimizer) in optimizers.items():
        parts[name] = get_optimizer_state_dict(model, optimizer)
    write_parts(folder, parts)


def write_parts(folder: Path, parts: Mapping[str, Any]) -> None:
    """Write states that were collected already, in the place of what is there; every rank calls this."""
    save(dict(parts), storage_writer=FileSystemWriter(folder, overwrite=True))


def load_sharded(
    folder: Path, models: Mapping[str, nn.Module], optimizers: Optimizers, *, strict: bool = True, **values: Any
) -> dict[str, Any]:
    """Read into models and optimizers what :func:`save_sharded` wrote, on any number of ranks; every rank calls this.

    Args:
        folder: of the files.
        models, optimizers: by the names that were given there.
        strict: whether the models may have nothing that is not in the files.
        **values: others that are looked for, of their kinds.

    Returns:
        Those values.
    """
    for name, model in models.items():
        part = {name: get_model_state_dict(model)}
        load(part, checkpoint_id=folder)
        model.load_state_dict(part[name], strict=strict)
    for name, (model, optimizer) in optimizers.items():
        of_optimizer = {name: get_optimizer_state_dict(model, optimizer)}
        load(of_optimizer, checkpoint_id=folder)
        set_optimizer_state_dict(model, optimizer, of_optimizer[name])
    found = dict(values)
    if found:
        load(found, checkpoint_id=folder)
    return found


def whole_state(model: nn.Module) -> dict[str, Any]:
    """A model's state with all experts, on the first rank's CPU; nothing on the others. Every rank calls this."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
