"""Expert parallelism for a model of Transformers by one call: :func:`parallelize`."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import dmoe
from dmoe.checkpoint.hub_folder import local_folder
from dmoe.integrations.transformers.blocks import find_blocks, to_dmoe
from dmoe.integrations.transformers.blocks_table import config_of
from dmoe.integrations.transformers.files_names import keep_conversions
from dmoe.integrations.transformers.parallel_load import CountedFolder, fill
from dmoe.integrations.transformers.parallel_mesh import Grid, grid_of, keep_grid
from dmoe.integrations.transformers.parallel_save import save_pretrained
from dmoe.integrations.transformers.parallel_shard import spread

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def parallelize(
    model_or_path: Any,
    *,
    ep: int | None = None,
    fsdp: int | None = None,
    mesh: DeviceMesh | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    fsdp_options: dict[str, Any] | None = None,
    progress: bool = True,
    **options: Any,
) -> Any:
    """A MoE model of Transformers whose experts are spread over ranks; every rank calls this, under ``torchrun``.

    ::

        dist.init_process_group()
        model = parallelize("Qwen/Qwen3-30B-A3B", ep=8, fsdp=2).train()
        optimizer = AdamW([{"params": group} for group in dmoe.parallel.split_parameters(model)], lr=1e-5)
        for batch in loader:  # this rank's share of the global batch
            loss = model(input_ids=batch, labels=batch).loss + dmoe.aux_loss(model)
            loss.backward()  # leaves the gradients of the mean over all ranks
            dmoe.parallel.clip_grad_norm(model, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        save_pretrained(model, "tuned", optimizer=optimizer)

    The ranks are a grid: ``ep`` share the experts of each layer, and ``fsdp`` such groups stand beside each other. Each
    rank brings sequences of its own, of any length; a step equals that of one process on all of them, as far as their
    losses count alike (for labels of unlike numbers Transformers has ``num_items_in_batch``). Every forward and
    backward of a rank needs the same on all others: ``generate`` with as many tokens, or ``synced_gpus``.

    With a path, the model is built without memory, and each rank reads of the files what it holds: of the experts its
    own, of what FSDP cuts its slice. MoE blocks become :class:`dmoe.MoE`; everything else, and names in
    ``state_dict()``, stay Hugging Face's. With ``fsdp=1`` what is no expert is whole on every rank, and averaged when a
    backward ends; else it is cut over all ranks by ``fully_shard``.

    Args:
        model_or_path: a folder in Hugging Face's format, the name of a hub model that is in the local cache, or a model
            with the same values on all ranks, which is changed.
        ep: ranks that share the experts; None: those of the mesh, or 1.
        fsdp: ranks that hold the same ones; None: as many as there are.
        mesh: of the dimensions "fsdp" and "ep" instead, where the ranks are part of something larger.
        device: of this rank; None: its GPU if there is one.
        dtype: of the weights, as ``torch.bfloat16``, or its name; None: as the config says. For a path alone.
        fsdp_options: of ``fully_shard``, such as ``mp_policy``.
        progress: show a bar, on the first rank.
        **options: fields of :class:`dmoe.MoEConfig` that the model does not settle, such as ``wire_dtype``,
            ``overlap_degree``, or the coefficients of losses. Without ``load_balancing_coefficient``,
            :func:`dmoe.aux_loss` is Transformers' loss of one layer, averaged over layers, of the tokens of all ranks,
            times the config's ``router_aux_loss_coef``; or 0, where the model adds its own (``output_router_logits``).

    Returns:
        The model, in evaluation mode where it came from files. Its ``save_pretrained`` is :func:`save_pretrained`.

    Raises:
        ValueError: sizes that do not fit the ranks or the experts, a family that ``to_dmoe`` does not know, a tensor
            that is missing or has another shape, an unknown dtype.
        OSError: files are missing or damaged.
        RuntimeError: several ranks without a process group; or another rank raised.
    """
    home = _device_of(device)
    grid = grid_of(ep, fsdp, mesh, home)
    files = None
    if isinstance(model_or_path, nn.Module):
        model = model_or_path
        grid.together(lambda: _check_built(model, dtype))
    else:
        files, model = grid.together(lambda: opened(model_or_path, dtype))
    grid.together(lambda: _exchange_blocks(model, grid, options))
    spread(model, grid, home, **(fsdp_options or {}))
    if files is not None:
        with files:
            grid.together(lambda: fill(model, files, progress=progress and grid.first))
        model.eval()
    keep_grid(model, grid)
    if grid.group is not None:
        model.__dict__["save_pretrained"] = functools.partial(save_pretrained, model)  # theirs knows of no ranks
    return model


def opened(path: Any, dtype: torch.dtype | str | None) -> tuple[CountedFolder, Any]:
    """The files at a path, and a model for them: its parameters on ``meta``, its buffers with their values."""
    folder = folder_of(path)
    files = CountedFolder(folder)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"parallelize: {folder}: expected weights that are not quantised, got a quantization_config")
    wanted = _dtype_of(dtype) or config.dtype or _dtype_in(files)
    with parameters_on_meta():
        model = _class_of(config)._from_config(config, dtype=wanted)
    if (folder / "generation_config.json").exists() and model.can_generate():
        model.generation_config = type(model.generation_config).from_pretrained(folder)
    return files, model


def folder_of(path: Any) -> Path:
    """The folder that a path or the name of a hub model in the local cache means.

    Raises:
        FileNotFoundError: there is none, or it has no config.json.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"parallelize: expected a path or a model of Transformers, got {type(path).__name__}")
    folder = local_folder(path)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"parallelize: {folder}: expected a config.json, got none")
    return folder


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules that are built inside have their parameters on ``meta``; buffers are what ``__init__`` makes of them.

    (Under ``torch.device("meta")`` buffers that no file has, as a rotary embedding's frequencies, would be lost.)
    """
    register = nn.Module.register_parameter

    @functools.wraps(register)
    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:  # one that is there already may be tied to another
            new = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
            new.__dict__.update(parameter.__dict__)
            parameter = new
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _check_built(model: nn.Module, dtype: Any) -> None:
    if dtype is not None:
        raise ValueError(f"parallelize: dtype: expected None for a model that is built, and has one, got {dtype}")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("parallelize: expected a model with values, or a path; got a model on meta")


def _exchange_blocks(model: Any, grid: Grid, options: dict[str, Any]) -> None:
    blocks = find_blocks(model)
    if not blocks and dmoe.moe_layers(model):
        raise ValueError(
            f"parallelize: expected a {type(model).__name__} with Transformers' own MoE blocks, got one with dmoe's: "
            "parallelize puts them there"
        )
    for name, block in blocks.items():
        config = config_of(block)
        if config.num_experts % grid.ep:
            raise ValueError(
                f"parallelize: ep: expected a divisor of the {config.num_experts} experts of {name}, got {grid.ep}"
            )
        options = {**_losses(model.config.get_text_config(), config.top_k, grid), **options}
    ranks = {} if grid.ep == 1 else {"ep_group": grid.of("ep")}
    to_dmoe(model, loss_group=grid.everyone, **ranks, **options)
    keep_conversions(model)


def _losses(config: Any, top_k: int, grid: Grid) -> dict[str, Any]:
    """Transformers' balance loss in dmoe's terms, whose scale is 1 where it is K there; of the batch of all ranks."""
    own = getattr(config, "output_router_logits", False)
    coefficient = 0.0 if own else float(getattr(config, "router_aux_loss_coef", None) or 0.0)
    over = {} if grid.group is None else {"load_balancing_over": "global"}
    return {"load_balancing_coefficient": coefficient * top_k, **over}


def _class_of(config: Any) -> Any:
    name = (config.architectures or [""])[0]
    return getattr(transformers, name, None) or AutoModelForCausalLM._model_mapping[type(config)]


def _device_of(device: torch.device | str | None) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    home = torch.device(device)
    if home.type == "cuda" and home.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return home


def _dtype_of(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or dtype == "auto":
        return None
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"parallelize: dtype: expected a floating-point dtype of torch or its name, got {dtype!r}")
    return found


def _dtype_in(files: CountedFolder) -> torch.dtype:
    """That of the first tensor of numbers in files whose config says nothing, as Transformers has it."""
    return next((dtype for name in files if (dtype := files.dtype(name)).is_floating_point), torch.float32)
