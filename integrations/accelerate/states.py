"""States of models and optimizers that every rank writes its part of, for any number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from dmoe.parallel import split_parameters

FOLDER = "sharded_state"  # in Accelerate's own folder


def save_parts(folder: Path, models: Sequence[nn.Module], optimizers: Sequence[Any], step: int) -> None:
    """Write models, the optimizers of the same places, and the number of the loop's step; every rank calls this.

    Raises:
        ValueError: experts that are plain tensors, or optimizers that are not one for each model.
    """
    for model in models:
        plain = [p for p in split_parameters(model)[1] if not hasattr(p, "to_local")]
        if plain:
            raise ValueError(
                f"save_state: expected experts whose parameters are DTensor, got {len(plain)} plain tensors, of which "
                "the first rank's alone would be written: build the layer with dtensor=True and experts of one width"
            )
    parts = {name: get() for name, get, _ in _parts(models, optimizers)}
    dcp.save({**parts, "step": step}, checkpoint_id=folder / FOLDER)


def load_parts(folder: Path, models: Sequence[nn.Module], optimizers: Sequence[Any]) -> int:
    """Read them into models and optimizers; the number of the step is returned.

    Raises:
        ValueError: nothing was written there.
    """
    if not (folder / FOLDER / ".metadata").is_file():
        raise ValueError(
            f"load_state: expected a folder that an Accelerator taught by dmoe wrote, with {FOLDER} in it, got {folder}"
        )
    step: dict[str, Any] = {"step": 0}
    dcp.load(step, checkpoint_id=folder / FOLDER)
    for name, get, put in _parts(models, optimizers):
        part = {name: get()}
        dcp.load(part, checkpoint_id=folder / FOLDER)
        put(part[name])
    return int(step["step"])


def whole_state(model: nn.Module) -> dict[str, Any]:
    """A model's state with every ``DTensor`` gathered from all ranks."""
    state = get_model_state_dict(model)
    return {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value.detach() if torch.is_tensor(value) else value
        for name, value in state.items()
    }


def _parts(models: Sequence[nn.Module], optimizers: Sequence[Any]) -> list[tuple[str, Any, Any]]:
    """Each part's name, what gives its state here, and what takes it."""
    if len(optimizers) not in (0, len(models)):
        raise ValueError(
            f"save_state, load_state: expected an optimizer for each of the {len(models)} models, or none, got "
            f"{len(optimizers)}"
        )
    parts: list[tuple[str, Any, Any]] = []
    for place, model in enumerate(models):
        parts.append((f"model_{place}", _getter(get_model_state_dict, model), model.load_state_dict))
    for place, (model, optimizer) in enumerate(zip(models, optimizers, strict=bool(optimizers))):
        own = getattr(optimizer, "optimizer", optimizer)  # Accelerate's has it inside
        put = _getter(set_optimizer_state_dict, model, own)
        parts.append((f"optimizer_{place}", _getter(get_optimizer_state_dict, model, own), put))
    return parts


def _getter(function: Any, *arguments: Any) -> Any:
    return lambda *more: function(*arguments, *more)
