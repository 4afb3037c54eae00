"""What ranks are told to do about Megatron's distributed checkpoints."""

from __future__ import annotations

import os

import rank_jobs_megatron as jobs
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core import parallel_state as mpu
from megatron.core.pipeline_parallel import get_forward_backward_func

METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def _state(training, optimizer, single, loading):
    metadata = {**METADATA, "singleton_local_shards": single}
    metadata["dp_cp_group"] = mpu.get_data_parallel_group(with_context_parallel=True)
    model = training.model.module.sharded_state_dict(metadata=metadata)
    state = {"model": model}
    if optimizer:
        state["optimizer"] = training.optimizer.sharded_state_dict(model, is_loading=loading, metadata=metadata)
    return state


def fixed_loss(training):
    """The loss of one batch that is the same on all ranks, before any further step; None but on the last stage."""
    training.model.zero_grad_buffer()
    tokens = torch.arange(jobs.MICRO_BATCH * (jobs.LENGTH + 1)).view(jobs.MICRO_BATCH, -1) * 7 % jobs.VOCABULARY
    reduced = get_forward_backward_func()(
        forward_step_func=jobs.forward_step(False, False),
        data_iterator=iter([tokens] * jobs.MICRO_BATCHES),
        model=[training.model],
        num_microbatches=jobs.MICRO_BATCHES,
        seq_length=jobs.LENGTH,
        micro_batch_size=jobs.MICRO_BATCH,
        forward_only=True,
    )
    return float(reduced[0]["loss"]) if reduced else None


def marks_of(training):
    """What the parameters say of themselves."""
    names = ("allreduce", "tensor_model_parallel", "partition_dim", "sequence_parallel")
    named = training.model.module.named_parameters()
    return {name: tuple(getattr(parameter, mark, None) for mark in names) for name, parameter in named}


def save(group, case, impl, store, folder, optimizer=False, single=False, without=None):
    """Train, save, and say what would come next: the experts, the fixed batch's loss, and two more steps."""
    jobs.connect(case.ranks, store)
    training = jobs.Training(case, impl)
    for _ in range(case.steps):
        training.step()
    if dist.get_rank() == 0:
        os.makedirs(folder)
    dist.barrier()
    with jobs.left_out(without):
        dist_checkpointing.save(_state(training, optimizer, single, False), folder)
    there, loss = jobs.owned(training.config, training.model.module), fixed_loss(training)
    training.batches = jobs.batches(training.config)
    return {"experts": there, "loss": loss, "next": [training.step() for _ in range(2)] if optimizer else []}


def load(group, case, impl, store, folder, optimizer=False, single=False, without=None):
    """The same after loading into a model with other values."""
    jobs.connect(case.ranks, store)
    training = jobs.Training(case, impl)
    for _ in range(case.steps if optimizer else 0):  # before, PyTorch's Adam has no state to load into
        training.step()
    with torch.no_grad():
        for parameter in training.model.parameters():
            parameter.fill_(7.0)
    with jobs.left_out(without):
        loaded = dist_checkpointing.load(_state(training, optimizer, single, True), folder)
    marks = marks_of(training)
    training.model.module.load_state_dict(loaded["model"], strict=True)
    if marks_of(training) != marks:
        raise AssertionError("loading changed what Megatron's optimizer looks at")
    if optimizer:
        training.optimizer.load_state_dict(loaded["optimizer"])
    else:
        training.optimizer.reload_model_params()
    there, loss = jobs.owned(training.config, training.model.module), fixed_loss(training)
    training.batches = jobs.batches(training.config)
    return {"experts": there, "loss": loss, "next": [training.step() for _ in range(2)] if optimizer else []}
