"""Steps in the static mode that are done again, and the same ones in the dynamic mode."""

from __future__ import annotations

import contextlib
import random
from unittest.mock import patch

import torch
import torch.distributed as dist
from rank_jobs import plain
from rank_jobs_training import grid
from torch import nn
from torch.utils.checkpoint import checkpoint

from dmoe import MoE, aux_loss, update_selection_bias
from dmoe.parallel import GradScaler, clip_grad_norm, data_parallel, exact_step, fully_shard_experts

STATIC = ("max_rows_received", "on_overflow")


class Stack(nn.Module):
    """Mixtures one after the other, with dropout, a batch norm and draws from Python's generator between them.

    Args:
        by_layer: fields of each.
        how: ``"checkpoint"`` in it computes the second mixture again in backward.
    """

    def __init__(self, by_layer, how=(), dtype=torch.float64, **options):
        super().__init__()
        torch.manual_seed(3)
        hidden = by_layer[0]["hidden_size"]
        self.how = how
        self.first = nn.Linear(hidden, hidden, dtype=dtype)
        self.norm = nn.BatchNorm1d(hidden, dtype=dtype)
        self.mixtures = nn.ModuleList(MoE(**fields, **options, dtype=dtype) for fields in by_layer)
        self.drop = nn.Dropout(0.2)

    def forward(self, x, choices=None):
        y = self.norm(torch.tanh(self.first(x)))
        for position, mixture in enumerate(self.mixtures):
            given = {} if choices is None else {"expert_indices": choices[position]}
            again = "checkpoint" in self.how and position == 1
            z = checkpoint(mixture, y, use_reentrant=False, **given) if again else mixture(y, **given)
            y = y + random.uniform(0.5, 1.0) * self.drop(z)
        return y


def built(by_layer, arrangement, how, dtype=torch.float64):
    """The model on this rank, plain and wrapped; ``arrangement``: replicas, "nodes", ("tp", ranks) or "fsdp"."""
    if arrangement == "nodes":
        inner = Stack(by_layer, how, dtype, ep_levels=grid(2, 2))
        return inner, data_parallel(inner)
    if arrangement == "fsdp":
        from torch.distributed.fsdp import fully_shard

        mesh = grid(2, 2)
        inner = Stack(by_layer, how, dtype, ep_group=mesh["ep"])
        fully_shard_experts(inner, mesh["replicas"])
        fully_shard(inner, mesh=grid(4, 1)["replicas"])
        return inner, inner
    tp = arrangement[1] if isinstance(arrangement, tuple) else 1
    replicas = 1 if tp > 1 else arrangement
    mesh = grid(replicas, 4 // replicas // tp, tp)
    inner = Stack(by_layer, how, dtype, ep_group=mesh["ep"], expert_tp_group=mesh["expert_tp"] if tp > 1 else None)
    return inner, data_parallel(inner, expert_replicas=mesh["replicas"].get_group() if replicas > 1 else None)


def without_bound(by_layer):
    return [{name: value for name, value in fields.items() if name not in STATIC} for fields in by_layer]


def train(group, by_layer, arrangement, how, batches, exact):
    """Optimizer steps on ``batches[step][rank]``, lists of micro-batches: losses, all state, and what was done again.

    ``how`` names what else takes part; without ``exact`` the layers have no bound, and steps are taken as they are.
    """
    by_layer = by_layer if exact else without_bound(by_layer)
    dtype = torch.float32 if {"float16", "bfloat16"} & set(how) else torch.float64
    inner, model = built(by_layer, arrangement, how, dtype)
    optimizer = torch.optim.AdamW([p for p in inner.parameters() if p.requires_grad], lr=0.05, foreach=False)
    scaler = GradScaler("cpu", init_scale=2.0**8, enabled="float16" in how)
    autocast = next((getattr(torch, kind) for kind in ("float16", "bfloat16") if kind in how), None)
    me = dist.get_rank(group)
    losses, reruns, rows = [], [], []
    torch.manual_seed(100 + me)
    random.seed(100 + me)

    def step(micro):
        told = []
        for position, x in enumerate(micro):
            silent = position + 1 < len(micro) and hasattr(model, "no_sync")
            within = torch.autocast("cpu", autocast, enabled=autocast is not None and "outside" not in how)
            with model.no_sync() if silent else contextlib.nullcontext():
                with within:
                    y = model(x.to(dtype))
                    loss = y.square().mean() + aux_loss(inner)
                scaler.scale(loss).backward()
            told.append(loss.detach().clone())
        return torch.stack(told)

    for batch in batches:
        optimizer.zero_grad(set_to_none="zeros" not in how)
        around = torch.autocast("cpu", autocast) if "outside" in how else contextlib.nullcontext()
        with around:
            if exact:
                done = exact_step(lambda micro=batch[me]: step(micro), model)
                losses.append(done.result)
                reruns.append(done.reran)
                rows.append(done.rows_dropped)
            else:
                losses.append(step(batch[me]))
        scaler.unscale_(optimizer)
        if "float16" not in how:
            clip_grad_norm(inner, 1.0)
        scaler.step(optimizer)
        scaler.update()
        update_selection_bias(inner, group)
    state = {name: plain(value).clone() for name, value in inner.state_dict().items()}
    drawn = torch.rand(2), random.random()
    dropped = [mixture.last_metrics.rows_dropped for mixture in inner.mixtures]
    return torch.cat(losses), state, drawn, reruns, rows, dropped


def replayed(group, by_layer, tokens, choices):
    """One step of given choices, micro-batch by micro-batch, on top of gradients that are there: in both modes."""
    me, results = dist.get_rank(group), []
    for exact in (True, False):
        inner = Stack(by_layer if exact else without_bound(by_layer), ep_group=group)
        torch.manual_seed(me)
        random.seed(me)
        for parameter in inner.parameters():
            parameter.grad = torch.randn_like(parameter)
        inner.norm.eval()  # which refuses a batch of one

        def step(inner=inner):
            told = []
            for x, given in zip(tokens[me], choices[me], strict=True):
                loss = inner(x, given).square().sum() + aux_loss(inner)
                loss.backward()
                told.append(loss.detach())
            return torch.stack(told)

        done = exact_step(step, inner) if exact else step()
        told = done.result if exact else done
        grads = {name: plain(p.grad) for name, p in inner.named_parameters()}
        results.append((told, grads, torch.rand(1), done if exact else None))
    return results


class Waits:
    """Collective calls that are awaited where they are made, and waits for the others: by the name of the call."""

    NAMES = ("all_reduce", "all_to_all_single", "all_gather_into_tensor", "all_gather", "all_gather_object",
             "broadcast", "barrier", "reduce_scatter_tensor")  # fmt: skip

    def __init__(self):
        self.calls, self.waits, self._patches = [], [], contextlib.ExitStack()

    def __enter__(self):
        for name in self.NAMES:
            self._patches.enter_context(patch.object(dist, name, self._noting(name, getattr(dist, name))))
        return self

    def __exit__(self, *error):
        self._patches.close()

    def _noting(self, name, real):
        def call(*args, **options):
            self.calls.append((name, bool(options.get("async_op"))))
            work = real(*args, **options)
            return _Noted(work, name, self.waits) if options.get("async_op") else work

        return call


class _Noted:
    def __init__(self, work, name, waits):
        self._work, self._name, self._waits = work, name, waits

    def wait(self):
        self._waits.append(self._name)
        return self._work.wait()


def waits(group, by_layer):
    """A step that has room for all: collectives and waits of the static mode, of ``exact_step``, and in its step."""
    me, told = dist.get_rank(group), {}
    x = torch.ones(4, by_layer[0]["hidden_size"], dtype=torch.float64)
    dropping = [{**fields, "on_overflow": "drop"} for fields in by_layer]
    for mode, fields in {"drop": dropping, "exact": by_layer, "dynamic": without_bound(by_layer)}.items():
        inner = Stack(fields, ep_group=group)
        inner(x)  # asks the other ranks
        aux_loss(inner)

        def step(inner=inner, seen=None):
            (inner(x).square().sum() + aux_loss(inner)).backward()
            return None if seen is None else (list(seen.calls), list(seen.waits))

        with Waits() as seen:
            inside = exact_step(lambda seen=seen: step(seen=seen), inner).result if mode == "exact" else step(seen=seen)
        told[mode] = seen.calls, seen.waits, inside
    return me, told


def refused(group, by_layer, what):
    """What ``exact_step`` says, or how a layer behaves outside of it."""
    inner = Stack(by_layer, ep_group=group)
    x = torch.ones(30, by_layer[0]["hidden_size"], dtype=torch.float64)
    optimizer = torch.optim.SGD(inner.parameters(), lr=0.1)

    def step():
        inner(x).square().sum().backward()
        if what == "optimizer" and dist.get_rank(group) == 1:
            optimizer.step()

    if what == "nested":
        exact_step(lambda: exact_step(step, inner), inner)
    if what == "static again":  # as the replay of a captured graph is
        overflow = inner.mixtures[0].dispatcher.overflow
        exact_step(step, inner, rerun=lambda: overflow.count(torch.tensor([9]), 3 + 6 * (dist.get_rank(group) != 2)))
    exact_step(step, inner)


def evaluated(group, by_layer):
    """Without autograd: outputs outside, inside, and those of the dynamic mode; rows dropped, runs, a broken step."""
    inner, dynamic = (Stack(fields, ep_group=group).eval() for fields in (by_layer, without_bound(by_layer)))
    torch.manual_seed(dist.get_rank(group))
    x = torch.randn(30, by_layer[0]["hidden_size"], dtype=torch.float64)
    outputs = []
    with torch.no_grad():
        for module, exact in ((inner, False), (inner, True), (dynamic, False)):
            random.seed(0)
            if exact:
                done = exact_step(lambda module=module: module(x), module)
                outputs.append(done.result)
            else:
                outputs.append(module(x))
    try:
        exact_step(lambda: 1 / 0, inner)
    except ZeroDivisionError:
        still = any(each.dispatcher.overflow.static for each in inner.mixtures)
    return outputs, done.reran, done.rows_dropped, still


def under_fsdp(group, by_layer):
    """What is said of gradients held back; and, after an evaluation left parameters whole, whether a rerun is exact."""
    results = []
    for exact in (True, False):
        inner, _ = built(by_layer if exact else without_bound(by_layer), "fsdp", ())
        me = dist.get_rank(group)
        torch.manual_seed(me)
        random.seed(me)
        x = torch.randn(30 if me == 2 else 3, by_layer[0]["hidden_size"], dtype=torch.float64)
        with torch.no_grad():
            inner(x)

        def step(inner=inner, x=x):
            (inner(x).square().mean() + aux_loss(inner)).backward()

        if exact:
            assert exact_step(step, inner).reran
        else:
            step()
        results.append({name: plain(p.grad) for name, p in inner.named_parameters()})
    same = all(torch.equal(grad, results[1][name]) for name, grad in results[0].items())
    inner.set_requires_gradient_sync(False)
    step()
    try:
        exact_step(step, inner)
    except ValueError as error:
        return str(error), same
