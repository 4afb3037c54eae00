"""``initialize``, and what an engine of DeepSpeed's has to be told once it is there."""

from __future__ import annotations

import argparse
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from torch import nn

import dmoe
from dmoe.integrations.deepspeed.layers import ep_size_of, layers_of, prepare
from dmoe.integrations.deepspeed.parameters import param_groups
from dmoe.parallel import clip_grad_norm, grad_norm


def initialize(
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: Any = None,
    model_parameters: Any = None,
    *more: Any,
    config: Any = None,
    config_params: Any = None,
    **options: Any,
) -> tuple[Any, Any, Any, Any]:
    """``deepspeed.initialize`` for models with dmoe's layers: :func:`prepare`, DeepSpeed's own, :func:`complete`.

    Args:
        args, model, optimizer, model_parameters, config, config_params: as in DeepSpeed. An optimizer that is there
            already has the groups of :func:`param_groups` where ZeRO is on.
        *more, **options: any other arguments of ``deepspeed.initialize``.

    Returns:
        Engine, optimizer, data loader and scheduler, as DeepSpeed returns them.

    Raises:
        ValueError: see :func:`prepare`; no model, or no config; an optimizer without those groups.
    """
    if model is None:
        raise ValueError("initialize: model: expected a module, got None")
    config = config_params if config is None else config
    if config is None and getattr(args, "deepspeed_config", None) is not None:
        config = args.deepspeed_config
        args = argparse.Namespace(**{**vars(args), "deepspeed_config": None})
    if config is None:
        raise ValueError("initialize: config: expected DeepSpeed's config, a dict or the path of a file, got None")
    config = prepare(model, config)
    if isinstance(optimizer, torch.optim.Optimizer):
        _check_groups(optimizer, config)
    else:
        model_parameters = param_groups(model if model_parameters is None else model_parameters)
    made = deepspeed.initialize(args, model, optimizer, model_parameters, *more, config=config, **options)
    complete(made[0])
    return made


def complete(engine: Any) -> None:
    """What ``deepspeed.initialize`` leaves to be said for a prepared model; :func:`initialize` calls it.

    Gradients are clipped by the norm of all of them, an expert's counted once, where DeepSpeed's own (0.19) is another:
    without ZeRO in float32 it takes the mean of the ranks' norms, and in bfloat16, with any optimizer but its own
    FusedAdam, it leaves experts out. Auxiliary losses that are attached follow the loss scale and the accumulation.
    Buffers, such as selection biases, come along with universal checkpoints.

    Args:
        engine: of DeepSpeed.
    """
    if isinstance(engine.optimizer, FP16_UnfusedOptimizer):
        _clip_half(engine.optimizer, engine.module)
    elif not engine.zero_optimization():
        engine.clip_fp32_gradients = lambda: _clip(engine)
    if any(layer.config.aux_loss == "attached" for layer in dmoe.moe_layers(engine.module).values()):
        engine.module.register_forward_pre_hook(lambda *_: _scale_attached(engine))
    if engine.load_universal_checkpoint():
        _load_buffers_too(engine)
    if engine.zero_optimization_stage() == 3 and any(ep_size_of(layer) > 1 for _, layer in layers_of(engine.module)):
        engine.save_16bit_model = engine.save_fp16_model = _refuse_whole_model


def _check_groups(optimizer: torch.optim.Optimizer, config: dict[str, Any]) -> None:
    stage = config.get("zero_optimization", {}).get("stage", 0)
    apart = [group.get("moe", False) for group in optimizer.param_groups]
    experts = [any(not getattr(p, "allreduce", True) for p in group["params"]) for group in optimizer.param_groups]
    if stage and experts != apart:
        raise ValueError(
            f"initialize: optimizer: expected experts in groups of their own with ZeRO {stage}, as "
            "param_groups(model) of a model after prepare() makes them, got them among others"
        )


def _clip(engine: Any) -> None:
    engine._global_grad_norm = clip_grad_norm(engine.module, engine.gradient_clipping())


def _clip_half(optimizer: Any, model: nn.Module) -> None:
    theirs = optimizer.unscale_and_clip_grads

    def unscale_and_clip_grads(total_norm: Any, apply_scale: bool = True) -> Any:
        optimizer._global_grad_norm = grad_norm(model)  # this optimizer scales no loss here: fp16 is refused
        return theirs(optimizer._global_grad_norm, apply_scale)

    optimizer.unscale_and_clip_grads = unscale_and_clip_grads


def _scale_attached(engine: Any) -> None:
    scale = getattr(engine.optimizer, "loss_scale", 1.0)
    dmoe.set_aux_loss_scale(engine.module, scale / engine.gradient_accumulation_steps())


def _load_buffers_too(engine: Any) -> None:
    theirs = engine.load_checkpoint

    def load_checkpoint(*args: Any, **options: Any) -> Any:
        path, client_state = theirs(*args, **options)
        if path is not None:
            state = torch.load(path, map_location="cpu", weights_only=False)["module"]
            engine.module.load_state_dict(state, strict=False)
        return path, client_state

    engine.load_checkpoint = load_checkpoint


def _refuse_whole_model(*_: Any, **__: Any) -> None:
    raise ValueError(
        "save_16bit_model: expected ZeRO 0, 1 or 2, or experts that no ranks share, got ZeRO 3 with experts that do, "
        "where DeepSpeed gathers the experts of one rank alone: save_checkpoint saves all"
    )
