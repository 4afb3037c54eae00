"""What ranks do with experts that are codes: compute, and write and read distributed checkpoints."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from dmoe import MoE
from dmoe.parallel import data_parallel
from dmoe.quant import dequantize, quantize


def _layer(fields, group, format, dtensor, seed=0):
    torch.manual_seed(seed)
    layer = MoE(**fields, ep_group=group, dtensor=dtensor)
    quantize(layer, format)
    return layer


def computed(group, fields, format, dtensor, shares):
    """Output and input gradient for this rank's tokens; bare, and inside DDP, which must leave codes alone."""
    layer = _layer(fields, group, format, dtensor)
    found = []
    for model in (layer, data_parallel(nn.Sequential(layer))):
        x = shares[dist.get_rank(group)].clone().requires_grad_()
        y = model(x)
        y.square().sum().backward()
        found += [y.detach(), x.grad]
    return found


def loaded_whole(group, fields, format, dtensor, state, shares):
    """The state of one process, loaded on ranks."""
    layer = _layer(fields, group, format, dtensor, seed=1)
    layer.load_state_dict(state)
    return layer(shares[dist.get_rank(group)]).detach()


def through_a_distributed_checkpoint(group, fields, format, folder, shares):
    """Saved, loaded into other values: this rank's outputs before and after; and the shapes that files speak of."""
    import torch.distributed.checkpoint as dcp

    layer = _layer(fields, group, format, dtensor=True)
    mine = shares[dist.get_rank(group)]
    before = layer(mine).detach()
    dcp.save(layer.state_dict(), checkpoint_id=folder)
    fresh = _layer(fields, group, format, dtensor=True, seed=1)
    state = fresh.state_dict()
    dcp.load(state, checkpoint_id=folder)
    fresh.load_state_dict(state)
    known = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    shapes = {name: tuple(about.size) for name, about in known.items() if hasattr(about, "size")}
    return before, fresh(mine).detach(), shapes


def decoded(group, fields, format, dtensor):
    """Experts of this rank after codes became parameters again."""
    layer = _layer(fields, group, format, dtensor)
    dequantize(layer)
    parameter = layer.experts.down_proj
    kept = hasattr(parameter, "to_local") == dtensor and not parameter.allreduce
    return kept, (parameter.to_local() if dtensor else parameter).detach()
