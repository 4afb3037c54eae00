"""MoE blocks of Transformers over ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from hf_blocks import holding, saved, tiny_block

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
