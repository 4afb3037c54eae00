"""MoE blocks of Transformers over ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from hf_blocks import holding, saved, tiny, tiny_block
from hf_families import run
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from dmoe.integrations.transformers.blocks import from_dmoe, to_dmoe


def block_over_ranks(group, name, shares):
    """A block whose experts are spread, called with this rank's share; what it computed, has, and is when put back."""
    model = holding(tiny_block(name))
    to_dmoe(model, ep_group=group)
    x = shares[dist.get_rank(group)].clone().requires_grad_()
    y = model["mlp"](x)
    y = y[0] if isinstance(y, tuple) else y
    y.square().sum().backward()
    here = model["mlp"].moe.experts.down_proj.to_local().shape[0]
    state = model.state_dict()
    whole = {name: getattr(tensor, "full_tensor", tensor.clone)() for name, tensor in state.items()}
    model.load_state_dict({name: tensor * 2 for name, tensor in whole.items()})
    from_dmoe(model)
    return y.detach(), x.grad, here, whole, saved(model)


def plain_block(name, shares):
    """The same in one process, without dmoe."""
    model = holding(tiny_block(name))
    results = []
    for share in shares:
        x = share.clone().requires_grad_()
        y = model["mlp"](x)
        y = y[0] if isinstance(y, tuple) else y
        (grad,) = torch.autograd.grad(y.square().sum(), x)
        results.append((y.detach(), grad))
    return results, saved(model)


def sharded_model(group, family):
    """A model under FSDP2 with dmoe's blocks: logits, whether every kind of state dict is the model's, and an error."""
    model = tiny(family)
    expected, before = run(model).detach(), saved(model)
    to_dmoe(model)
    mesh = DeviceMesh.from_group(group, "cpu")
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    error = (run(model) - expected).abs().max() / expected.abs().max()
    sharded = {name: tensor.full_tensor() for name, tensor in model.state_dict().items()}
    whole = dcp.StateDictOptions(full_state_dict=True)
    full = dcp.get_model_state_dict(model, options=whole)
    same = [all(torch.equal(state[name], before[name]) for name in before) for state in (sharded, full)]
    dcp.set_model_state_dict(model, {name: tensor * 2 for name, tensor in before.items()}, options=whole)
    same.append(all(torch.equal(t.full_tensor(), before[name] * 2) for name, t in model.state_dict().items()))
    try:
        from_dmoe(model)
    except ValueError as refusal:
        return error.item(), same, str(refusal)
    return error.item(), same, "nothing was refused"
