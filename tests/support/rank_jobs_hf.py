"""Jobs of a :class:`rank_pool.RankPool` in which ranks share a model of Transformers, by that library's own plans."""

from __future__ import annotations

import os
from unittest.mock import patch

import hf_families
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import dmoe.integrations.transformers as on_transformers


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def loaded(group, folder, fields, grads):
    """Logits, and gradients of all parameters, of a model that this rank loads its part of.

    The model of one process, without ``fields``, sees the batch of all ranks; others see what ``fields`` give them.
    """
    on_transformers.register()
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    torch.use_deterministic_algorithms(False)
    with patch.dict(os.environ, {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}):
        config = DistributedConfig(**fields)
        model = AutoModelForCausalLM.from_pretrained(
            folder, distributed_config=config, experts_implementation="dmoe", dtype=torch.float32
        )
        ids = hf_families.token_ids()
        if config.dp_size > 1:
            ids = ids[rank : rank + 1]
        model.train(grads)
        with torch.set_grad_enabled(grads):
            y = hf_families.run(model, ids)
        if not grads:
            return whole(y), {}
        y.square().mean().backward()
        return whole(y), {n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}
