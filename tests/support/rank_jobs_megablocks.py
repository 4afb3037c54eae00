"""What ranks do with MegaBlocks' layers; the same functions are what one process does."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from megablocks_cases import layer_of
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

import dmoe
from dmoe.compat import megablocks
from dmoe.compat.megablocks.layers import mpu
from dmoe.compat.megablocks.layers.router import batched_router_zloss, clear_router_zloss

PARALLEL = {"moe_expert_model_parallelism": True}


def _message(function, *arguments, **options):
    try:
        function(*arguments, **options)
    except (ValueError, TypeError, NotImplementedError) as error:
        return f"{type(error).__name__}: {error}"
    return "done"


def seeded(kind, seed=0, **options):
    """A layer whose values depend on the seed, also those of its bias."""
    torch.manual_seed(seed)
    layer, args = layer_of(kind, **options)
    if args.bias:
        with torch.no_grad():
            layer.experts.bias.copy_(torch.arange(args.hidden_size) / 7)
    return layer, args


def losses_of(args):
    """Both losses, which are then cleared."""
    balance = megablocks.batched_load_balancing_loss(args)
    z = batched_router_zloss(args).sum() if args.moe_zloss_weight else 0.0
    megablocks.clear_load_balancing_loss()
    clear_router_zloss()
    return balance, z


def total(result):
    """One tensor of what a layer returns."""
    return result[0] + result[1] if isinstance(result, tuple) else result


def run(layer, args, x, grad_y):
    """Forward and backward of one rank's tokens, with both losses."""
    x = x.clone().requires_grad_()
    y = layer(x)
    form, y = type(y).__name__, total(y)
    balance, z = losses_of(args)
    ((y * grad_y).sum() + balance + z).backward()
    return {
        "form": form,
        "y": y.detach(),
        "x": x.grad,
        "balance": torch.as_tensor(balance).detach(),
        "z": torch.as_tensor(z).detach(),
        "gradients": {name: p.grad for name, p in layer.named_parameters()},
    }


def _count_calls(layer, calls):
    """Experts with a hook are called, which they are not where one operation stands for the steps."""
    layer.experts.mlp.register_forward_hook(lambda module, given, out: calls.append(1))


def layer(group, kind, options, shares, by_steps):
    """A layer whose experts are spread over the group, on this rank's tokens."""
    made, args = seeded(kind, expert_parallel_group=group, **PARALLEL, **options)
    calls = []
    if by_steps:
        _count_calls(made, calls)
    got = run(made, args, *shares[dist.get_rank(group)])
    by_steps = len(calls)
    again = total(copy.deepcopy(made)(shares[dist.get_rank(group)][0])).detach()
    megablocks.clear_load_balancing_loss()
    clear_router_zloss()
    return {
        **got,
        "again": again,
        "calls": by_steps,
        "state": {name: value.clone() for name, value in made.state_dict().items()},
        "marks": {
            name: (p.expert, p.allreduce, mpu.param_is_expert_model_parallel(p))
            for name, p in made.experts.mlp.named_parameters()
        },
        "unmarked": [name for name, p in made.named_parameters() if getattr(p, "allreduce", True)],
        "mpu": (
            mpu.get_expert_parallel_world_size(args),
            mpu.get_expert_parallel_rank(args),
            mpu.expert_sharding_degree(args),
            mpu.hidden_sharding_degree(args),
            mpu.experts_per_rank(args),
            mpu.features_per_rank(args),
        ),
        "repr": repr(made.experts.mlp),
    }


def both_parallelisms(group, kind, options, x_by_rank):
    """MegaBlocks' own comparison: the same seed, the same tokens, experts spread and weights spread."""
    found = {}
    for name, switch in (("expert", PARALLEL), ("weight", {"moe_weight_parallelism": True})):
        made, args = seeded(kind, **{f"{name}_parallel_group": group}, **switch, **options)
        x = x_by_rank[dist.get_rank(group)].clone().requires_grad_()
        y = total(made(x))
        megablocks.clear_load_balancing_loss()
        y.sum().backward()
        found[name] = {
            "y": y.detach(),
            "x": x.grad,
            "gradients": {name: p.grad for name, p in made.named_parameters()},
            "shapes": {name: tuple(p.shape) for name, p in made.experts.mlp.named_parameters()},
            "ranks": (mpu.get_weight_parallel_world_size(args), mpu.get_weight_parallel_rank(args)),
        }
    return found


def in_bfloat16(group, shares, autocast, by_steps):
    """Parameters in bfloat16, or in float32 under autocast: y and the gradients, and their dtypes."""
    options = {"moe_num_experts": 2, "moe_loss_weight": 0.0}
    made, _ = seeded("dMoE glu", expert_parallel_group=group, **PARALLEL, **options)
    made = made.float() if autocast else made.bfloat16()
    if by_steps:
        _count_calls(made, [])
    x = shares[dist.get_rank(group)][0].to(torch.float32 if autocast else torch.bfloat16).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = made(x)
    y.float().square().sum().backward()
    return {"y": y.detach(), "x": x.grad, **{name: p.grad for name, p in made.named_parameters()}}


def trained(group, kind, options, shares, how):
    """One step of SGD on 2 x 2 ranks, experts spread over pairs and held twice; and the gradients' norm."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "ep"))
    pair = mesh["ep"].get_group()
    if how == "weight parallelism":
        made, args = seeded(kind, moe_weight_parallelism=True, weight_parallel_group=pair, **options)
    else:
        made, args = seeded(kind, expert_parallel_group=pair, **PARALLEL, **options)
    x, grad_y = shares[dist.get_rank()]
    model: torch.nn.Module = made
    if how.startswith("fsdp2"):
        fully_shard(made.get_submodule(how.removeprefix("fsdp2 ")), mesh=mesh["replicas"])
        fully_shard(made, mesh=init_device_mesh("cpu", (4,)))
    else:
        model = dmoe.parallel.data_parallel(made, expert_replicas=mesh["replicas"].get_group())
    y = total(model(x))
    balance, z = losses_of(args)
    ((y * grad_y).sum() + balance + z).backward()
    norm = None if how.startswith("fsdp2") else dmoe.parallel.clip_grad_norm(made, 1e9)
    torch.optim.SGD(model.parameters(), lr=0.1, foreach=False).step()
    whole = {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in made.named_parameters()}
    return {name: value.detach().clone() for name, value in whole.items()}, norm


def micro_batches(group, kind, options, shares, count):
    """Several forwards before the losses are asked for, and one backward."""
    made, args = seeded(kind, expert_parallel_group=group, **PARALLEL, **options)
    x, grad_y = shares[dist.get_rank(group)]
    outputs = [total(made(part)) for part in x.chunk(count)]
    balance, z = losses_of(args)
    (sum((y * dy).sum() for y, dy in zip(outputs, grad_y.chunk(count), strict=True)) + balance + z).backward()
    return balance.detach(), {name: p.grad for name, p in made.named_parameters()}


def checkpointed(group, kind, options, shares):
    """Losses and gradients without activation checkpointing, and with it."""
    found = []
    for wrapped in (False, True):
        made, args = seeded(kind, expert_parallel_group=group, **PARALLEL, **options)
        x = shares[dist.get_rank(group)][0].clone().requires_grad_()
        y = checkpoint(made, x, use_reentrant=False) if wrapped else made(x)
        balance, z = losses_of(args)
        (y.square().sum() + balance + z).backward()
        left = megablocks.get_load_balancing_loss()
        found.append((balance.detach(), x.grad, left, {name: p.grad for name, p in made.named_parameters()}))
    return found


def messages(group):
    """What a rank is told when its layer does not fit the others', or its arguments do not fit the ranks."""
    me = dist.get_rank(group)
    outside = dist.new_group([0])
    differing, _ = seeded("dMoE glu", **PARALLEL, moe_top_k=1 + me % 2)
    told = [_message(differing, torch.zeros(3, 6, dtype=torch.float64))]
    told += [
        _message(layer_of, "dMoE glu", **PARALLEL, **options)
        for options in (
            {"moe_num_experts": 6},
            {"moe_num_experts": 3},
            {"moe_num_experts": 2, "ffn_hidden_size": 7},
            {"expert_parallel_group": outside},
            {"moe_weight_parallelism": True},
        )
    ]
    told.append(_message(layer_of, "MoE", moe_weight_parallelism=True))
    told.append(
        _message(layer_of, "dMoE glu", moe_weight_parallelism=True, moe_num_experts=1, ffn_hidden_size=7, moe_top_k=1)
    )
    return told
