"""Whole models on ranks by one call, and what trains them: jobs of a :class:`rank_pool.RankPool`."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import sys
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from doc_blocks import ROOT
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

import dmoe
from dmoe.optim import PerMatrix
from dmoe.parallel import clip_grad_norm, parallelize, split_parameters

MAX_NORM = 0.2
MESHES: dict[tuple, object] = {}
FIELDS = {
    "hidden_size": 6, "ffn_hidden_size": 4, "num_experts": 4, "top_k": 2, "bias": "expert",
    "load_balancing_coefficient": 0.1, "load_balancing_over": "global", "router_z_loss_coefficient": 0.01,
}  # fmt: skip


def mesh_of(**sizes):
    """A mesh of all ranks, made once: every new group costs time."""
    key = tuple(sizes.items())
    if key not in MESHES:
        MESHES[key] = init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    return MESHES[key]


class Block(nn.Module):
    """A dense layer and a mixture, beside the stream."""

    def __init__(self, fields, where):
        super().__init__()
        H = fields["hidden_size"]
        self.dense = nn.Linear(H, H, **where)
        self.moe = dmoe.MoE(**fields, **where)

    def forward(self, x):
        x = x + torch.tanh(self.dense(x))
        return x + self.moe(x)


class Model(nn.Module):
    """Two blocks between an embedding and a head; built as for one process."""

    def __init__(self, fields=FIELDS, dtype=torch.float64, device=None):
        super().__init__()
        torch.manual_seed(3)
        where, H = {"dtype": dtype, "device": device}, fields["hidden_size"]
        self.embedding = nn.Embedding(12, H, **where)
        self.blocks = nn.ModuleList(Block(fields, where) for _ in range(2))
        self.head = nn.Linear(H, 12, **where)

    def forward(self, ids):
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def loss_of(model, ids):
    """Of the next id, and the balance."""
    logits = model(ids[:, :-1])
    task = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    return task + dmoe.aux_loss(model)


def take_steps(model, optimizer, steps, clip, loss=loss_of):
    """``steps[step]`` are a rank's micro-batches. Norms and mean losses of steps."""
    norms, losses = [], []
    for micro in steps:
        optimizer.zero_grad()
        total = 0.0
        for ids in micro:
            part = loss(model, ids) / len(micro)
            part.backward()
            total += part.detach()
        norms.append(clip(model, MAX_NORM))
        optimizer.step()
        losses.append(total)
    return torch.stack(losses), torch.stack(norms)


def whole(value):
    """All of a value, on every rank; of experts cut by tensor parallelism, whose mesh has no groups, what lies here."""
    if not hasattr(value, "full_tensor"):
        return value
    return value.to_local() if value.device_mesh.mesh_dim_names == ("experts", "expert_shards") else value.full_tensor()


def values_of(model):
    """The state of a model, wrapped or not, whole where it is a DTensor."""
    inner = model.module if hasattr(model, "module") else model
    return {name: whole(value).detach().clone() for name, value in inner.state_dict().items()}


def adamw(model, **options):
    """As the README has it."""
    return torch.optim.AdamW([{"params": group} for group in split_parameters(model)], lr=1e-2, **options)


class Nested(Model):
    """Blocks in a list and a dict of a list, one of them twice; and a mixture beside them."""

    def __init__(self):
        super().__init__()
        first, second = self.blocks
        self.blocks = nn.ModuleList([nn.ModuleList([first]), nn.ModuleDict({"second": second}), first])
        self.last = dmoe.MoE(**FIELDS, dtype=torch.float64)

    def forward(self, ids):
        (first,), held, again = self.blocks
        x = self.embedding(ids)
        for block in (first, held["second"], again, self.last):
            x = block(x)
        return self.head(x)


def train_nested(group, sizes, ids):
    """Loss of a step on a model whose blocks lie in lists of lists, and the values after it."""
    model = parallelize(Nested(), mesh_of(**sizes))
    optimizer = torch.optim.SGD([{"params": group} for group in split_parameters(model) if group], lr=0.1)
    loss = loss_of(model, ids[dist.get_rank(group)])
    loss.backward()
    optimizer.step()
    return loss.detach(), values_of(model)


def train(group, sizes, data, batches, options):
    """``batches[step][rank]`` are lists of micro-batches."""
    model = parallelize(Model(), mesh_of(**sizes), data=data)
    mine = [step[dist.get_rank(group)] for step in batches]
    losses, norms = take_steps(model, adamw(model, **options), mine, clip_grad_norm)
    dist.all_reduce(losses)
    marks = {
        name: (p.expert, getattr(p, "allreduce", True)) for name, p in model.named_parameters() if ".experts." in name
    }
    return losses / dist.get_world_size(group), norms, values_of(model), marks


class Several:
    """Optimizers as one."""

    def __init__(self, *optimizers):
        self.optimizers = optimizers

    def zero_grad(self):
        for each in self.optimizers:
            each.zero_grad()

    def step(self):
        for each in self.optimizers:
            each.step()


def matrix_optimizers(model, name):
    """Hidden matrices by one optimizer, everything else by AdamW."""
    inner = model.module if hasattr(model, "module") else model
    matrices, rest = [], []
    for parameter_name, parameter in inner.named_parameters():
        hidden = parameter_name.startswith("blocks") and not parameter_name.endswith("bias")
        (matrices if hidden else rest).append(parameter)
    # PyTorch's Muon computes in bfloat16, where a last bit of a gradient becomes 0.4%.
    kind = KellersMuon if name == "Muon" else torch.optim.Adafactor
    groups = [[p for p in rest if dmoe.is_expert_param(p)], [p for p in rest if not dmoe.is_expert_param(p)]]
    adamw = torch.optim.AdamW([{"params": group} for group in groups], lr=1e-2, foreach=False)
    return Several(PerMatrix(matrices, kind, lr=1e-2), adamw)


class KellersMuon(torch.optim.Optimizer):
    """Written from its published description: momentum by lerp, five Newton-Schulz steps, 4-D taken for a convolution.

    (https://kellerjordan.github.io/posts/muon; the package is installed from its repository only.)
    """

    def __init__(self, params, lr=0.02, momentum=0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                state.setdefault("momentum_buffer", torch.zeros_like(p))
                state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(state["momentum_buffer"], group["momentum"])
                shape = update.shape
                update = update.view(len(update), -1) if update.ndim == 4 else update
                tall = update.size(-2) > update.size(-1)
                x = update.mT if tall else update
                x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
                for _ in range(5):
                    a = x @ x.mT
                    x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
                x = (x.mT if tall else x) * max(1, update.size(-2) / update.size(-1)) ** 0.5
                p.add_(x.reshape(shape), alpha=-group["lr"])


def train_matrices(group, fields, sizes, data, name, batches, folder):
    """Three steps, a checkpoint; then a model of its own on another layout loads it, and goes on."""
    losses = []
    for layout, way, part in ((sizes, data, batches[:3]), ({"ep": 2, "replicas": 2}, "ddp", batches[3:])):
        model = parallelize(Model(fields), mesh_of(**layout), data=way)
        inner = model.module if hasattr(model, "module") else model
        optimizers = matrix_optimizers(model, name)
        if losses:
            state = state_of(inner, optimizers)
            dcp.load(state, checkpoint_id=folder)
            set_state_dict(
                inner, optimizers.optimizers, model_state_dict=state["model"], optim_state_dict=state["optim"]
            )
        mine = [step[dist.get_rank(group)] for step in part]
        some, _ = take_steps(model, optimizers, mine, lambda m, n: torch.zeros(()))
        losses.append(some)
        if len(losses) == 1:
            dcp.save(state_of(inner, optimizers), checkpoint_id=folder)
    losses = torch.cat(losses)
    dist.all_reduce(losses)
    return losses / dist.get_world_size(group), values_of(model)


def state_of(model, optimizers):
    """As torch.distributed.checkpoint takes it."""
    model_state, optim_state = get_state_dict(model, optimizers.optimizers)
    return {"model": model_state, "optim": optim_state}


def cut_matrices(group):
    """What is said of parameters of which a rank has a part of each matrix."""
    told = []
    for sizes, data in (({"ep": 2, "expert_tp": 2}, None), ({"replicas": 4, "ep": 1}, "fsdp2")):
        fields = {**FIELDS, "num_experts": 2}
        model = parallelize(Model(fields), mesh_of(**sizes), data=data)
        try:
            PerMatrix(model.parameters(), torch.optim.SGD, lr=0.1)
        except ValueError as error:
            told.append(str(error))
    return told


def spread(group, fields, sizes, dtensor):
    """A layer built for one process that lets go of other ranks' experts, beside the one that was built on ranks."""
    mesh = mesh_of(**sizes)
    groups = {"ep_group": mesh["ep"], "expert_tp_group": mesh["expert_tp"] if "expert_tp" in sizes else None}
    torch.manual_seed(1)
    built = dmoe.MoE(**fields, **groups, dtensor=dtensor)
    torch.manual_seed(1)
    layer = dmoe.MoE(**fields)
    layer.spread_experts(**groups, dtensor=dtensor)
    x = torch.randn(5, fields["hidden_size"], generator=torch.Generator().manual_seed(dist.get_rank()))
    results = []
    for each in (built, layer):
        y = each(x)
        (y.square().sum() + dmoe.aux_loss(each)).backward()
        grads = [local_of(p.grad) for p in each.parameters()]
        names = [name for name, _ in each.named_parameters()]
        kinds = [(type(p).__name__, p.requires_grad, p.expert, p.allreduce) for p in each.experts.parameters()]
        shared = [p.untyped_storage().nbytes() for p in map(local_of, each.experts.parameters())]
        results.append(
            (y.detach(), grads, names, kinds, shared, {k: local_of(v) for k, v in each.state_dict().items()})
        )
    return results


def local_of(value):
    return value.to_local() if hasattr(value, "to_local") else value


def from_meta(group, fields, sizes, data, state, ids):
    """A model that was never whole on any rank: initial values of all experts; filled with a whole state, its loss."""
    model = parallelize(Model(fields, device="meta"), mesh_of(**sizes), data=data)
    model.to_empty(device="cpu")
    values = reset(model)
    if data is None:
        model.load_state_dict(state)
    else:
        set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True))
    loss = loss_of(model, ids[dist.get_rank(group)])
    loss.backward()
    return loss.detach(), sum(local_of(p).numel() for p in model.blocks[0].moe.experts.parameters()), values


def reset(model):
    """Every module's own initial values; those of experts, each begun with one seed, are returned."""
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            torch.manual_seed(5)
            module.reset_parameters()
    state = model.state_dict()
    return {name: whole(value).clone() for name, value in state.items() if "expert" in name}


def refused(group):
    """What is said about what cannot be."""
    mesh, told = mesh_of(replicas=2, ep=2), []

    def say(call):
        try:
            call()
        except Exception as error:
            told.append(f"{type(error).__name__}: {error}")
        else:
            told.append("nothing")

    say(lambda: parallelize(Model(), "cuda"))
    say(lambda: parallelize(Model(), mesh_of(replicas=2, ep=2, tp=1)))
    say(lambda: parallelize(Model(), mesh, data="zero"))
    say(lambda: parallelize(Model(), mesh, data="ddp", blocks=[]))
    say(lambda: parallelize(parallelize(Model(), mesh, data="ddp"), mesh))
    say(lambda: parallelize(parallelize(Model(), mesh), mesh))
    say(lambda: dmoe.moe_layers(parallelize(Model(), mesh, data=None))["blocks.0.moe"].spread_experts(mesh["ep"]))
    say(lambda: Model().blocks[0].moe.spread_experts(None))
    lent = Model()
    dmoe.lora.add(lent, rank=2)
    say(lambda: parallelize(lent, mesh))
    say(lambda: parallelize(Model({**FIELDS, "num_experts": 3}), mesh))
    tied = Model()
    first, second = (block.moe.experts for block in tied.blocks)
    second.down_proj = first.down_proj
    say(lambda: parallelize(tied, mesh))
    flat = Model(dtype=torch.float32)
    for layer in dmoe.moe_layers(flat).values():
        layer.spread_experts(mesh["ep"], dtensor=False)
    wrapped = FullyShardedDataParallel(flat, use_orig_params=True, device_id=torch.device("cpu"))
    say(lambda: wrapped(torch.zeros(1, 3, dtype=torch.int64)))
    return told


def by_fsdp1(group, batches):
    """FSDP1 around a model whose experts are all on every rank: losses and parameters."""
    model = Model(dtype=torch.float32)
    parallelize(model, mesh_of(replicas=4), data=None)
    wrapped = FullyShardedDataParallel(model, auto_wrap_policy=ModuleWrapPolicy({Block}), device_id=torch.device("cpu"))
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-2)
    mine = [step[dist.get_rank(group)] for step in batches]
    losses, norms = take_steps(wrapped, optimizer, mine, lambda m, n: m.clip_grad_norm_(n))
    dist.all_reduce(losses)
    with FullyShardedDataParallel.summon_full_params(wrapped):
        values = {name: value.clone() for name, value in model.state_dict().items()}
    return losses / dist.get_world_size(group), norms, values


def example(group, name, arguments):
    """What examples/NAME.py prints on this rank."""
    path = ROOT / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    printed = io.StringIO()
    with (
        patch.object(dist, "init_process_group"),
        patch.object(dist, "destroy_process_group"),
        patch.object(sys, "argv", [str(path), *arguments]),
        patch.object(sys, "path", [*sys.path, str(path.parent)]),
        contextlib.redirect_stdout(printed),
    ):
        spec.loader.exec_module(module)
        module.main()
    return printed.getvalue()


def eight_bit(name):
    """What makes an 8-bit AdamW of parameters, by a package that is not in the test extra."""
    folder = str(Path(sys.prefix) / "optimizers")  # `make .venv/optimizers`
    if folder not in sys.path:
        sys.path.append(folder)
    package = pytest.importorskip(f"{name}.optim", reason=f"{name} is not installed: make .venv/optimizers")
    options = {"min_8bit_size": 1} if name == "bitsandbytes" else {"block_size": 16}
    return lambda parameters: PerMatrix(parameters, partial(package.AdamW8bit, **options), lr=1e-2)


def train_in_eight_bits(group, name, fields, batches):
    """Four steps, with a state that is saved and loaded in between; what the down projection's state is made of."""
    model = parallelize(Model(fields, torch.float32), mesh_of(ep=4), data="ddp")
    optimizer = eight_bit(name)(model.parameters())
    mine = [step[dist.get_rank(group)] for step in batches]
    take_steps(model, optimizer, mine[:2], lambda m, n: torch.zeros(()))
    state = copy.deepcopy(optimizer.state_dict())
    optimizer = eight_bit(name)(model.parameters())
    optimizer.load_state_dict(state)
    take_steps(model, optimizer, mine[2:], lambda m, n: torch.zeros(()))
    of_down = optimizer.state[model.module.blocks[0].moe.experts.down_proj]
    return values_of(model), {key: value.dtype for key, value in of_down.items() if torch.is_tensor(value)}
