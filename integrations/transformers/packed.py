"""GPT-OSS's published folders, whose experts are MXFP4, with experts that stay packed."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import dmoe
from dmoe.checkpoint.hub_folder import HubFolder
from dmoe.integrations.transformers.attached import guard
from dmoe.integrations.transformers.parallel import folder_of, parameters_on_meta
from dmoe.integrations.transformers.switch import use

_BLOCKS, _SCALES = "_blocks", "_scales"


@torch.no_grad()
def load_packed(path: Any, *, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A GPT-OSS model whose experts are the MXFP4 of its files, on the CPU, computed by dmoe.

    Transformers needs a GPU and a kernel from the hub for such experts, and makes bfloat16 of them elsewhere, of four
    times the size. Here products decode them block by block; values are the same. They are frozen, and
    :func:`dmoe.lora.add` puts adapters beside them. Everything else becomes parameters of ``dtype``.

    Args:
        path: a folder in Hugging Face's format, or the name of a hub model that is in the local cache.
        dtype: of what is not packed.

    Returns:
        The model, in evaluation mode; ``model.to(device)`` may follow.

    Raises:
        ValueError: no experts in MXFP4, or tensors that are missing, in the way, or of another shape.
        OSError: files are missing or damaged.
    """
    folder = folder_of(path)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with parameters_on_meta():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    use(model)
    with HubFolder(folder) as files:
        left = set(files)
        packed = {name.removesuffix(_BLOCKS) for name in left if name.endswith(_BLOCKS)}
        if not packed:
            raise ValueError(f"load_packed: {folder}: expected experts in MXFP4, tensors whose names end in {_BLOCKS}")
        tied = set(getattr(model, "_tied_weights_keys", None) or ()) if config.tie_word_embeddings else set()
        for name, parameter in list(model.named_parameters()):
            module, _, field = name.rpartition(".")
            holder = model.get_submodule(module)
            if name in packed and {name + _BLOCKS, name + _SCALES} <= left:
                value = dmoe.quant.from_mxfp4(
                    files.read(name + _BLOCKS).clone(), files.read(name + _SCALES).clone(), gated=field != "down_proj"
                )
                _check_shape(folder, name, value.shape, _as_dmoe(parameter.shape, field))
                guard(holder)
                delattr(holder, field)
                holder.register_module(field, dmoe.quant.QuantizedProjection(value, dtype))
                left -= {name + _BLOCKS, name + _SCALES}
            elif name in left:
                tensor = files.read(name)
                _check_shape(folder, name, tensor.shape, parameter.shape)
                holder.register_parameter(field, nn.Parameter(tensor.to(dtype, copy=True), requires_grad=True))
                left.remove(name)
            elif name not in tied:
                raise ValueError(f"load_packed: {folder}: expected a tensor {name}, got none of that name")
        if left:
            raise ValueError(f"load_packed: {folder}: expected tensors of {type(model).__name__}, got {min(left)} too")
    model.tie_weights()
    if (folder / "generation_config.json").exists() and model.can_generate():
        model.generation_config = type(model.generation_config).from_pretrained(folder)
    return model.eval()


def _as_dmoe(shape: torch.Size, field: str) -> tuple[int, ...]:
    """Of a parameter ``(E, in, out)``."""
    experts, inputs, results = shape
    return (experts, results, inputs) if field == "down_proj" else (experts, 2, results // 2, inputs)


def _check_shape(folder: Any, name: str, got: Any, expected: Any) -> None:
    if tuple(got) != tuple(expected):
        raise ValueError(f"load_packed: {folder}: {name}: expected shape {tuple(expected)}, got {tuple(got)}")
