"""Accelerate's loop on ranks that are a group already."""

from __future__ import annotations

import os
from unittest.mock import patch

import accelerate
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DataLoaderConfiguration, DistributedType, FullyShardedDataParallelPlugin
from torch.utils.data import DataLoader
from training_cases import Net, data_of, environment, optimizer_of, whole

import dmoe
import dmoe.integrations.accelerate as on_accelerate


def fresh(job):
    """Without what an Accelerator before has left in the process."""

    def run(*arguments):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        with patch.dict(os.environ, environment(dist.get_rank(), dist.get_world_size())):
            return job(*arguments)

    return run


def accelerator_of(case, how, **options):
    config = DataLoaderConfiguration(split_batches=True)
    made = Accelerator(
        cpu=True, gradient_accumulation_steps=case.accumulate, dataloader_config=config, **options
    )
    if how == "fsdp2":  # which Accelerate turns on where there are GPUs
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, cpu_ram_efficient_loading=False, auto_wrap_policy="no_wrap"
        )
        made.state.distributed_type, made.state.fsdp_plugin = DistributedType.FSDP, plugin
    return made


def mean_over_ranks(values):
    values = torch.stack(values)
    dist.all_reduce(values)
    return values / dist.get_world_size()


def fit(group, case, how, ep, folder=None, resume=None, options=None):
    """Train, from a folder or the start; what all ranks end with, and their losses' mean. A folder is of the half."""

    def run():
        accelerator = accelerator_of(case, how, **(options or {}))
        net = on_accelerate.parallelize(accelerator, Net(case), ep=ep)
        model, optimizer, loader = accelerator.prepare(
            net, optimizer_of(net), DataLoader(data_of(case), batch_size=case.batch)
        )
        half, losses = case.steps * case.accumulate // 2, []
        if resume is not None:
            accelerator.load_state(resume)
            loader = accelerate.skip_first_batches(loader, half)
        for x in loader:
            with accelerator.accumulate(model):
                loss = model(x).square().mean() + dmoe.aux_loss(model)
                losses.append(loss.detach())
                accelerator.backward(loss)
                if accelerator.sync_gradients and case.clip_by == "value":
                    accelerator.clip_grad_value_(model.parameters(), case.clip)
                elif accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), case.clip)
                optimizer.step()
                optimizer.zero_grad()
            if folder is not None and len(losses) == half:
                accelerator.save_state(folder)
        return whole(net), mean_over_ranks(losses), accelerator.get_state_dict(model)

    return fresh(run)()
