"""A model from a checkpoint of any system that :mod:`dmoe.checkpoint` reads."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dmoe import checkpoint
from dmoe.models.config import MoEGPTConfig
from dmoe.models.gpt import MoEGPT


def load(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> MoEGPT:
    """The model in a folder, in evaluation mode.

    Args:
        path: of a dmoe, a Megatron-DeepSpeed or a FasterTransformer checkpoint.
        dtype: of the parameters; with float16 and bfloat16 routers stay float32, in which they compute.
        device: where to put them; None is the CPU.

    Raises:
        OSError, ValueError: what reading says; tensors that are missing, left over, or of another shape.
    """
    return load_with_extras(path, dtype=dtype, device=device)[0]


def load_with_extras(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> tuple[MoEGPT, dict[str, Any]]:
    """:func:`load`, and what else stands in the folder: ``end_id``, and the paths ``vocab`` and ``merges``."""
    found = checkpoint.read_model(path)
    if found.gpt is None:
        raise ValueError(
            f"{path}: expected a GPT, as in Megatron-DeepSpeed's and FasterTransformer's folders, got a checkpoint of "
            f"{found.origin.get('layout')} that says nothing of a model around its MoE layers"
        )
    extras: dict[str, Any] = dict(found.files)
    if isinstance(found.origin.get("end_id"), int):
        extras["end_id"] = found.origin["end_id"]
    return build(MoEGPTConfig.from_json(found.gpt), found.tensors, dtype=dtype, device=device), extras


def build(
    config: MoEGPTConfig,
    tensors: Mapping[str, Any],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> MoEGPT:
    """A model, in evaluation mode, whose state is read one tensor at a time.

    Args:
        config: of the model.
        tensors: by parameter name: a tensor, or anything with ``shape`` and ``read() -> Tensor``.
        dtype, device: see :func:`load`.

    Raises:
        ValueError: tensors that are missing, left over, or of another shape; nothing is read then.
    """
    model = MoEGPT(config, device="meta", dtype=dtype)
    expected = model.state_dict()
    missing, left = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or left:
        parts = [f"no {_few(missing)}"] * bool(missing) + [f"{_few(left)} besides"] * bool(left)
        raise ValueError(f"load: expected the tensors of the model that the config says, got {' and '.join(parts)}")
    for name, there in expected.items():
        if tuple(tensors[name].shape) != tuple(there.shape):
            raise ValueError(f"load: {name}: expected {tuple(there.shape)}, got {tuple(tensors[name].shape)}")
    model.to_empty(device="cpu" if device is None else device)
    for layer in model.moe_layers:
        if dtype.itemsize < 4:
            layer.router.float()
    state = model.state_dict()
    with torch.no_grad():
        for name, there in state.items():
            stored = tensors[name]
            there.copy_(stored if isinstance(stored, Tensor) else stored.read())
    return model.eval()


def _few(names: list[str]) -> str:
    """Some names, and how many more there are."""
    more = len(names) - 3
    return ", ".join(names[:3]) + (f" and {more} more" if more > 0 else "")
