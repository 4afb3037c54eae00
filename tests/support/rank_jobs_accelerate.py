"""Accelerate's loop on ranks that are a group already."""

from __future__ import annotations

import os
from dataclasses import replace
from unittest.mock import patch

import accelerate
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DataLoaderConfiguration, DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.device_mesh import init_device_mesh
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
    made = Accelerator(cpu=True, gradient_accumulation_steps=case.accumulate, dataloader_config=config, **options)
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


def fit_float16(group, case):
    """Under a grad scaler that begins too high; the values, and how many steps were skipped."""

    def run():
        accelerator = accelerator_of(replace(case, accumulate=1), "ddp", mixed_precision="fp16")
        accelerator.native_amp = True  # which Accelerate has for accelerators alone
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**21)
        net = on_accelerate.parallelize(accelerator, Net(replace(case, dtype=torch.float32)), ep=2)
        assert isinstance(accelerator.scaler, dmoe.parallel.GradScaler)
        model, optimizer = accelerator.prepare(net, optimizer_of(net))
        skipped = 0
        for x in data_of(case).float().split(case.batch)[: case.steps]:
            loss = model(x[dist.get_rank() :: 2]).square().mean() + dmoe.aux_loss(model)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), case.clip)
            optimizer.step()
            skipped += optimizer.step_was_skipped
            optimizer.zero_grad()
        return whole(net), skipped

    return fresh(run)()


def refusals(group, case, folder):
    """What is said to what is not done."""

    def told(function, *arguments, **options):
        try:
            function(*arguments, **options)
        except ValueError as error:
            return str(error)

    def plain_experts():
        accelerator = on_accelerate.teach(accelerator_of(case, "ddp"))
        mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicas", "ep"))
        accelerator.expert_mesh = mesh
        accelerator.prepare(Net(case, ep_group=mesh["ep"], dtensor=False, loss_group=dist.group.WORLD))
        accelerator.save_state(folder)

    def prepared(optimizers):
        accelerator = accelerator_of(case, "ddp")
        net = on_accelerate.parallelize(accelerator, Net(case))
        accelerator.prepare(net, *(optimizer_of(net) for _ in range(optimizers)))
        return accelerator

    def fsdp(version, loading):
        accelerator = accelerator_of(case, "fsdp2")
        accelerator.state.fsdp_plugin.fsdp_version = version
        accelerator.state.fsdp_plugin.cpu_ram_efficient_loading = loading
        return accelerator

    cases = {
        "divisor": lambda: told(on_accelerate.parallelize, accelerator_of(case, "ddp"), Net(case), ep=3),
        "bool": lambda: told(on_accelerate.parallelize, accelerator_of(case, "ddp"), Net(case), ep=True),
        "prepared": lambda: told(on_accelerate.parallelize, prepared(1), Net(case)),
        "plain experts": lambda: told(plain_experts),
        "folder": lambda: told(prepared(1).load_state, folder),
        "optimizers": lambda: told(prepared(2).save_state, folder),
        "loading": lambda: told(on_accelerate.parallelize, fsdp(2, True), Net(case)),
        "fsdp1": lambda: told(on_accelerate.parallelize, fsdp(1, False), Net(case)),
    }
    return {name: fresh(run)() for name, run in cases.items()}
