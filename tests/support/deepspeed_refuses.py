"""What the integration of DeepSpeed's engine refuses, on every rank alike: the sentences, by what was tried."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed_cases as cases
import pytest
import torch
import torch.distributed as dist
from torch import nn

import dmoe

CONFIG = {"train_micro_batch_size_per_gpu": 1, "optimizer": cases.SGD, "zero_allow_untested_optimizer": True}


def zero(stage: int) -> dict[str, Any]:
    return {**CONFIG, "zero_optimization": {"stage": stage}}


def layer(name: str = "ffn", **options: Any) -> nn.Module:
    from dmoe.integrations.deepspeed import expert_parallel_group

    given = {"hidden_size": 8, "ffn_hidden_size": 16, "num_experts": 4, "dtensor": False}
    given |= {"ep_group": expert_parallel_group(2)} | options
    return nn.ModuleDict({name: dmoe.MoE(**given)})


def sentences(out: Path) -> dict[str, str]:
    """What each attempt was told on this rank."""
    import deepspeed
    from deepspeed.pipe import PipelineModule

    from dmoe.integrations.deepspeed import expert_parallel_group, initialize, param_groups, prepare, to_universal

    def with_adapters() -> None:
        model = layer()
        dmoe.lora.add(model, rank=2)
        prepare(model, zero(2))

    def inside_zero_init() -> None:
        with deepspeed.zero.Init(config_dict_or_path=zero(3)):
            model = layer()
        prepare(model, zero(3))

    def whole_model() -> None:
        initialize(model=layer(), config=zero(3))[0].save_16bit_model(str(out / "whole"))

    def one_group() -> None:
        model = layer()
        initialize(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), config=zero(1))

    def an_older_deepspeed() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.delattr(deepspeed.DeepSpeedEngine, "_resolve_zero3_param_placement")
            prepare(layer(), zero(3))

    world = dist.get_world_size()
    saved = out / "2"
    across = [dist.new_group(list(range(first, world, world // 2))) for first in range(world // 2)]
    attempts: dict[str, Callable[[], Any]] = {
        "DTensor": lambda: prepare(layer(dtensor=True), zero(2)),
        "a name": lambda: prepare(layer("experts"), zero(2)),
        "main_grad": lambda: prepare(layer(accumulate_main_grad=True, expert_grad_scale="sum"), zero(2)),
        "a scale": lambda: prepare(layer(expert_grad_scale="sqrt_world_size"), zero(2)),
        "slices": lambda: prepare(layer(num_experts=1, top_k=1), zero(2)),
        "adapters": with_adapters,
        "fp16 without ZeRO": lambda: prepare(layer(), {**CONFIG, "fp16": {"enabled": True}}),
        "a pipeline": lambda: prepare(PipelineModule([nn.Linear(2, 2)], num_stages=1), zero(1)),
        "zero.Init": inside_zero_init,
        "an older DeepSpeed": an_older_deepspeed,
        "no divisor": lambda: expert_parallel_group(3),
        "no model": lambda: initialize(config=zero(1)),
        "no config": lambda: initialize(model=layer()),
        "one group": one_group,
        "not prepared": lambda: param_groups(layer()),
        "the whole model": whole_model,
        "no checkpoint": lambda: to_universal(out / "nothing", out / "universal"),
        "a target that is there": lambda: to_universal(saved / "universal/ckpt/global_step3", saved),
        "a checkpoint without ZeRO": lambda: to_universal(saved / "ZeRO 0, saved/ckpt/global_step3", out / "universal"),
    }
    if world > 2:  # what two ranks cannot show
        mine = across[dist.get_rank() % (world // 2)]
        attempts = {
            "other ranks": lambda: prepare(layer(ep_group=mine), zero(2)),
            "another layout": lambda: expert_parallel_group(2, use_data_before_expert_parallelism=True),
        }
    told = {}
    for name, attempt in attempts.items():
        try:
            attempt()
            told[name] = "nothing was refused"
        except Exception as error:
            told[name] = f"{type(error).__name__}: {error}"
    return told
