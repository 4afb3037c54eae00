"""What a checkpoint of any layout holds, for people: layers with their configs, the model around, what is beside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dmoe.checkpoint.inspection import inspect_state, line_of
from dmoe.checkpoint.model import Model
from dmoe.checkpoint.stored import total_bytes
from dmoe.config_json import config_to_json

_TOLD = ("hidden_size", "ffn_hidden_size", "num_experts", "gated", "bias")  # by the line of the layer


def describe_model(model: Model, name: str, layout: str) -> str:
    """Lines about a model in files; no tensor is read.

    Args:
        model: that was read.
        name: of its files.
        layout: that they are in.
    """
    origin = model.origin.get("layout", layout)
    source = f" (from {origin})" if origin != layout else ""
    size = total_bytes(model.tensors)
    lines = [
        f"{name}: layout {layout}{source}, {len(model.layers)} MoE layers, {len(model.tensors)} tensors, {size:,} "
        f"bytes, of which {sum(total_bytes(model.of_layer(layer)) for layer in model.layers):,} in MoE layers"
    ]
    if model.gpt is not None:
        lines.append(f"  a GPT: {_settings({k: v for k, v in model.gpt.items() if k not in ('moe', 'residual')})}")
    last = ""
    for layer, config in model.layers.items():
        state = {layer + each: stored.meta() for each, stored in model.of_layer(layer).items()}
        (part,) = inspect_state(state)
        lines.append(f"  {line_of(part)}")
        told = "" if config is None else _settings({k: v for k, v in config_to_json(config).items() if k not in _TOLD})
        lines.append(f"    {'the same' if told == last and told else told or 'without a config'}")
        last = told
    if beside := _names(model.beside):
        lines.append(f"  beside the model: {', '.join(beside)}")
    lines += [f"  {what}: {path}" for what, path in model.files.items()]
    return "\n".join([*lines, *(f"  note: {note}" for note in model.notes)])


def _settings(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())


def _names(beside: Mapping[str, Any]) -> list[str]:
    """Of what stands beside a model in the first of its files that have anything."""
    inner: Any = beside.get("ranks") or beside.get("states") or beside
    files = list(inner.values()) if isinstance(inner, Mapping) and inner is not beside else inner
    first = files[0] if isinstance(files, list) and files else beside
    skipped = ("dmoe", "beside", "values", "module", "model")
    return [str(name) for name in first if name not in skipped and str(name).strip() == str(name)]
