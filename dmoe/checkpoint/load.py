"""MoE layers from a checkpoint of any layout, ready to run."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from dmoe.checkpoint.convert_command import read_model
from dmoe.checkpoint.formats.base import Options
from dmoe.checkpoint.model import Model
from dmoe.layer import MoE


def load_layers(
    sources: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    layout: str | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    **settings: Any,
) -> dict[str, MoE]:
    """The MoE layers of a checkpoint by their names in its model, in evaluation mode; nothing has to be typed again.

    Args:
        sources: a folder or a file, or the files of all ranks.
        layout: a name of ``python -m dmoe.checkpoint convert --help``; None finds it.
        dtype: of the parameters; None is the files'. Routers keep theirs.
        device: where to put them; None is the CPU.
        **settings: fields of :class:`dmoe.MoEConfig` that the files do not tell, for all layers.

    Returns:
        ``{"blocks.1.ffn": MoE, ...}`` in the model's order.

    Raises:
        OSError, ValueError: see :func:`dmoe.checkpoint.read_model`; or a layer that :class:`dmoe.MoE` cannot be.
    """
    model = read_model(sources, layout=layout, options=Options(settings=settings))
    return {prefix.removesuffix("."): build_layer(model, prefix, dtype=dtype, device=device) for prefix in model.layers}


def build_layer(
    model: Model, prefix: str, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> MoE:
    """One MoE layer of a model that was read.

    Args:
        model: see :func:`dmoe.checkpoint.read_model`.
        prefix: of the layer, a key of ``model.layers``.
        dtype, device: see :func:`load_layers`.

    Raises:
        ValueError: a layer without a config, or whose tensors are not those of its config.
    """
    config = model.layers[prefix]
    name = prefix.removesuffix(".") or "the layer"
    if config is None:
        raise ValueError(
            f"load_layers: {name}: expected a layer that dmoe.MoE can be, got: "
            f"{'; '.join(model.notes) or 'no config beside its tensors; say its options, as top_k=2'}"
        )
    layer = MoE(config, device="meta")
    stored, expected = model.of_layer(prefix), layer.state_dict()
    for key in dict.fromkeys((*expected, *stored)):
        shapes = [None if key not in each else tuple(each[key].shape) for each in (expected, stored)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"load_layers: {name}: {key}: expected {shapes[0] or 'none'}, got {shapes[1] or 'none'}")
    state: Mapping[str, Any] = {
        key: _placed(each.read(), None if key.startswith("router.") else dtype, device) for key, each in stored.items()
    }
    layer.load_state_dict(state, assign=True)
    return layer.eval()


def _placed(tensor: torch.Tensor, dtype: torch.dtype | None, device: torch.device | str | None) -> torch.Tensor:
    return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)
