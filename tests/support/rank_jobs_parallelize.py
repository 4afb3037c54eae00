"""Jobs of a :class:`rank_pool.RankPool` with a model of Transformers that is spread over the ranks."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from hub_cases import model_of
from torch.distributed.device_mesh import init_device_mesh

import dmoe
from dmoe.checkpoint.hub_folder import HubFolder
from dmoe.integrations.transformers import parallel
from dmoe.integrations.transformers.parallel_optimizer import load_optimizer
from dmoe.integrations.transformers.parallel_save import save_pretrained
from dmoe.parallel import clip_grad_norm, split_parameters

LR, MAX_NORM = 1e-2, 0.5
_MESHES = {}


def optimizer_of(model):
    return torch.optim.AdamW([{"params": group} for group in split_parameters(model)], lr=LR)


def steps(model, optimizer, batches, clip, aux=True):
    """Losses of the task, and the gradients' norms, of training steps."""
    losses, norms = [torch.empty(0)], [torch.empty(0)]
    for batch in batches:
        loss = model(input_ids=batch, labels=batch).loss
        (loss + (dmoe.aux_loss(model) if aux else 0)).backward()
        norms.append(clip(model, MAX_NORM).view(1))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach().view(1))
    return torch.cat(losses), torch.cat(norms)


def whole(tensor):
    """On every rank, a copy of the whole."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


def halves():
    """The mesh of this rank's half of the ranks, ``("fsdp", "ep")`` of (1, W / 2), made once; and which half it is."""
    if "halves" not in _MESHES:
        shape = (2, 1, dist.get_world_size() // 2)
        _MESHES["halves"] = init_device_mesh("cpu", shape, mesh_dim_names=("half", "fsdp", "ep"))
    return _MESHES["halves"]["fsdp", "ep"], _MESHES["halves"].get_local_rank("half")


def spread(path, grid, options=None):
    """A model over ranks: (ep, fsdp), or "halves" of the ranks with a model each; and this rank among its own."""
    if grid == "halves":
        mesh, half = halves()
        model = parallel.parallelize(path, mesh=mesh, progress=False, **(options or {}))
        return model, mesh.get_local_rank("ep"), mesh.size(), str(half)
    ep, fsdp = grid
    model = parallel.parallelize(path, ep=ep, fsdp=fsdp, progress=False, **(options or {}))
    started = dist.is_initialized()
    return model, dist.get_rank() if started else 0, ep * fsdp, ""


def local(parameter):
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def is_its_own(parameter):
    """Whether memory holds this rank's part and no more."""
    return local(parameter).untyped_storage().nbytes() == local(parameter).nbytes


def read_back(group, folder, grid, x):
    """Logits of this rank's tokens, and how the model came from the files."""
    opened = []

    class Watched(parallel.CountedFolder):
        def __init__(self, *args):
            super().__init__(*args)
            opened.append(self)

    with patch.object(parallel, "CountedFolder", Watched):
        model, *_ = spread(folder, grid)
    with torch.no_grad():
        logits = model(x[dist.get_rank(group)]).logits
    experts = next(iter(dmoe.moe_layers(model).values())).experts
    return {
        "logits": logits,
        "read": opened[0].by_name,
        "training": model.training,
        "generation": model.generation_config.to_diff_dict(),
        "tied": model.lm_head.weight is model.model.embed_tokens.weight,
        "own": is_its_own(experts.down_proj),
        "here": list(experts.owned.experts),
    }


def built(group, family, x):
    """The same of a model that every rank had whole."""
    model, *_ = spread(model_of(family), (4, 1))
    experts = next(iter(dmoe.moe_layers(model).values())).experts
    return model(x[dist.get_rank(group)]).logits.detach(), is_its_own(experts.down_proj)


def train(group, folder, grid, batches, save=None, resume=False, options=None):
    """Steps from a folder on, each rank with its rows of a batch; losses, norms, whole weights."""
    model, rank, ranks, half = spread(folder, grid, options)
    model.train()
    optimizer = optimizer_of(model)
    if resume:
        load_optimizer(optimizer, model, folder, progress=False)
    losses, norms = steps(model, optimizer, batches[:, rank::ranks], clip_grad_norm)
    if save is not None:
        save_pretrained(model, f"{save}{half}", optimizer=optimizer, max_shard_size=9000, progress=False)
    return losses, norms, {name: whole(tensor) for name, tensor in model.state_dict().items()}


def save_fails(group, source, target, where, at, grid):
    """What each rank is told when one finds the disk full, and what is in the folder around."""
    model, *_ = spread(source, grid)
    calls = []

    def full(*args):
        calls.append(args)
        if len(calls) > 3 or at != "pwrite":
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*args)

    write = os.pwrite
    told = "nothing"
    with patch.object(os, at, full) if dist.get_rank(group) == where else contextlib.nullcontext():
        try:
            save_pretrained(model, target, progress=False)
        except Exception as error:
            told = f"{type(error).__name__}: {error}"
    dist.barrier(group)
    return told, sorted(os.listdir(Path(target).parent))


def there_and_back(group, source, grid, ids, target):
    """Outputs of a model from files, and the files that it becomes."""
    model, *_ = spread(source, grid, {"dtype": "float32"})
    y = model(input_ids=ids, use_cache=False)[0].detach()
    save_pretrained(model, target, max_shard_size="50KB", progress=False)
    return y


def refused(group, call):
    """What ``parallelize`` says on each rank; ``call`` is of its arguments."""
    try:
        parallel.parallelize(progress=False, **call)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def damaged(group, folder):
    """A folder of which one rank alone cannot read: what each is told."""
    rank, read = dist.get_rank(group), HubFolder.read

    def fails(self, name, *index):
        if rank == 1 and "norm" in name:
            raise OSError(errno.EIO, "Input/output error")
        return read(self, name, *index)

    with patch.object(HubFolder, "read", fails):
        return refused(group, {"model_or_path": folder, "ep": 4})
