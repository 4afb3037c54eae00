"""Jobs of a :class:`rank_pool.RankPool` that train dmoe's adapters on a model of Transformers, spread in some way."""

from __future__ import annotations

import torch
import torch.distributed as dist
from hub_cases import model_of
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import dmoe
from dmoe.integrations.transformers import parallelize, to_dmoe, use
from dmoe.parallel import fully_shard_experts

LR = 2e-2
_MESHES = {}


def spread(family, how):
    """A model whose experts have adapters: alone, over ranks by experts, by FSDP2, or both; their parameters."""
    torch.manual_seed(1)
    if how == "parallelize":
        model = parallelize(model_of(family), ep=4, fsdp=1, progress=False)
        return model, dmoe.lora.add(model, rank=3, alpha=6)
    model = model_of(family)
    if how in ("alone", "fsdp"):
        use(model)
    else:
        if "mesh" not in _MESHES:
            _MESHES["mesh"] = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "ep"))
            _MESHES["all"] = init_device_mesh("cpu", (4,))
        to_dmoe(model, ep_group=_MESHES["mesh"]["ep"])
    dmoe.lora.add(model, rank=3, alpha=6)
    if how == "both":
        fully_shard_experts(model, _MESHES["mesh"]["fsdp"])
    if how in ("fsdp", "both"):
        mesh = _MESHES["all"] if how == "both" else None
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model, {name: each for name, each in model.named_parameters() if ".lora." in name}


def train(model, parameters, batches, checkpointing=None):
    """Losses of steps on the adapter alone."""
    model.train()
    if checkpointing is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    torch.manual_seed(2)
    optimizer = torch.optim.AdamW(parameters.values(), lr=LR)
    losses = []
    for batch in batches:
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def trained(group, family, how, batches, folder, checkpointing):
    """This rank's losses; the adapter is in the folder then, gathered, and here again after loading it."""
    model, parameters = spread(family, how)
    assert all(each.requires_grad is (".lora." in name) for name, each in model.named_parameters())
    rank = dist.get_rank(group)
    losses = train(model, parameters, batches[:, rank : rank + 1], checkpointing)
    dmoe.lora.save_peft(model, folder, base="base")
    found = [losses]
    if how == "parallelize":
        again = parallelize(model_of(family), ep=4, fsdp=1, progress=False)
        dmoe.lora.load_peft(again, folder)
        both = [each.eval()(input_ids=batches[0, rank : rank + 1]).logits for each in (model, again)]
        found.append((both[0] - both[1]).abs().max().item())
    return found
