"""Jobs of a :class:`rank_pool.RankPool` that send rows by other transports; arguments as in rank_jobs.py."""

from __future__ import annotations

import contextlib
import copy
import gc
import weakref
from unittest.mock import patch

import fake_deep_ep
import fake_symmetric_memory
import torch
import torch.distributed as dist
from rank_jobs import groups_of, plain
from torch.utils.checkpoint import checkpoint

from dmoe import ExpertWeights, MoE, run_experts
from dmoe.parallel import AllToAllDispatcher, DeepEPDispatcher, Levelling, SymmetricDispatcher


@contextlib.contextmanager
def deep_ep():
    """The package is there."""
    fake_deep_ep.install()
    try:
        yield
    finally:
        fake_deep_ep.uninstall()


KINDS = {
    "all_to_all": AllToAllDispatcher,
    "deep_ep": DeepEPDispatcher,
    "symmetric_memory": SymmetricDispatcher,
}


@deep_ep()
@fake_symmetric_memory.installed()
def experts(group, shares, weights, levels, needs, other, **options):
    """Dispatch, experts and combine by the all-to-all and another transport: results, gradients, what came.

    ``needs``: which of x and the gates has a gradient; weights are those of all experts.
    """
    results = []
    for name in ("all_to_all", other):
        x, ids, gates, grad_y = shares[dist.get_rank(group)]
        levelling = None if levels is None else Levelling(0.0, levels, 1)
        dispatcher = copy.deepcopy(KINDS[name](group, weights[1].shape[0], levelling=levelling, **options))
        mine = slice(dispatcher.local_experts.start, dispatcher.local_experts.stop)
        own = [w[mine].clone().requires_grad_() for w in weights]
        x, gates = x.clone().requires_grad_(needs != "gates"), gates.clone().requires_grad_(needs != "x")
        arrived = dispatcher.dispatch(x, ids, gates)
        given = ExpertWeights(*own, gated=False)
        if levelling is not None and arrived.copies is not None:
            lent = arrived.copies.start(given)
            y = run_experts(arrived.x, arrived.plan, arrived.gate_weights, lent.weights, activation="silu")
            y, hosted = lent.finish(y)
            if hosted is not None and arrived.copies_plan is not None:
                y = y + run_experts(arrived.x, arrived.copies_plan, arrived.gate_weights, hosted, activation="silu")
        else:
            y = run_experts(arrived.x, arrived.plan, arrived.gate_weights, given, activation="silu")
        y = dispatcher.combine(y, arrived)
        (y * grad_y).sum().backward()
        sent = arrived.traffic.rows_sent, arrived.traffic.rows_kept, arrived.traffic.rows_received
        values = {"y": y.detach(), "arrived": arrived.x.detach(), "x": x.grad, "gates": gates.grad}
        values |= {f"weight {n}": w.grad for n, w in enumerate(own)}
        results.append((values, sent, arrived.plan.num_rows))
    return results


@deep_ep()
@fake_symmetric_memory.installed()
def layers(group, fields, shares, other, how="plain", arrangement="flat"):
    """A layer's forward and backward by the all-to-all and another transport: results and gradients.

    A share is (x, dy, mask).
    """
    results = []
    for transport in ("all_to_all", other):
        torch.manual_seed(7)
        module = MoE(**fields, transport=transport, **groups_of(group, arrangement), dtype=dtype_of(how))
        x, grad_y, mask = shares[dist.get_rank()]
        x = x.to(dtype_of(how)).requires_grad_()
        cast = torch.autocast("cpu", torch.bfloat16) if how == "autocast" else contextlib.nullcontext()
        with cast:
            if how == "checkpoint":
                y = checkpoint(lambda x, m=module, k=mask: m(x, token_mask=k), x, use_reentrant=False)
            else:
                y = module(x, token_mask=mask)
        (y * grad_y).sum().backward()
        gradients = {name: plain(p.grad) for name, p in module.named_parameters()}
        metrics = module.last_metrics
        counted = [metrics.tokens_per_expert, metrics.kept_per_expert]
        counted += [] if metrics.rank_rows is None else [metrics.rank_rows]
        results.append(({"y": y.detach(), "x": x.grad, **gradients}, counted, metrics.copies_hosted))
    return results


def dtype_of(how):
    """Of a layer's parameters."""
    return torch.float32 if how == "autocast" else torch.bfloat16


@deep_ep()
def order_and_arguments(group, fields):
    """Calls of DeepEP, and work between the halves, in their order: forward, then backward."""
    gc.collect()  # buffers of earlier jobs' layers
    calls = fake_deep_ep.calls

    def shared(x):
        calls.append(("work", 0, ()))
        y = x * 2
        y.register_hook(lambda grad: calls.append(("work's gradient", 0, ())))
        return y

    module = MoE(**fields, transport="deep_ep", ep_group=group, shared_expert=shared, dtype=torch.bfloat16)
    x = torch.randn(5, fields["hidden_size"], dtype=torch.bfloat16, requires_grad=True)
    module(x).sum().backward()
    return list(calls)


@deep_ep()
@fake_symmetric_memory.installed()
def strided(group, shares, other):
    """Rows, weights, results and gradients that do not lie in one piece: results and gradients of both transports."""
    results = []
    for name in ("all_to_all", other):
        x, ids, gates, grad_y = shares[dist.get_rank(group)]
        x, gates = (t.repeat(1, 2)[:, ::2].mT.contiguous().mT.detach().requires_grad_() for t in (x, gates))
        arrived = KINDS[name](group, 4).dispatch(x, ids.mT.contiguous().mT, gates)
        y = (arrived.x * arrived.gate_weights.sum(1, keepdim=True).bfloat16()).mT.contiguous().mT
        y = KINDS[name](group, 4).combine(y, arrived)
        y.backward(grad_y.mT.contiguous().mT)
        results.append({"y": y.detach(), "x": x.grad, "gates": gates.grad})
    return results


@deep_ep()
def results_of_nothing(group):
    """The tokens' gradients where ranks to which no row came make their results without them."""
    dispatcher = DeepEPDispatcher(group, 4)
    x = torch.ones(3, 16, dtype=torch.bfloat16, requires_grad=True)
    arrived = dispatcher.dispatch(x, torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1))
    y = arrived.x * 2 if len(arrived.x) else torch.zeros(0, 16, dtype=torch.bfloat16)
    y = dispatcher.combine(y, arrived)
    everywhere = [False] * dist.get_world_size(group)
    dist.all_gather_object(everywhere, y.requires_grad, group)
    if all(everywhere):  # or the others would wait for this rank
        y.sum().backward()
    return len(arrived.x), x.grad


@deep_ep()
def buffers(group, fields):
    """How many buffers were made for two layers of one width, a wider one, and a narrow one after these are gone."""
    made = []

    def one(width):
        module = MoE(**{**fields, "hidden_size": width}, transport="deep_ep", ep_group=group, dtype=torch.bfloat16)
        module(torch.zeros(3, width, dtype=torch.bfloat16, requires_grad=True)).sum().backward()
        made.append(fake_deep_ep.Buffer.made - before)
        return module

    before = fake_deep_ep.Buffer.made
    held = [one(16), one(16), one(48), one(32)]
    del held
    gc.collect()
    one(16)
    return made


@deep_ep()
def freed(group):
    """Whether what came is freed with the last name of it, after a forward and after a backward."""
    told = []
    for backward in (False, True):
        dispatcher = DeepEPDispatcher(group, 4)
        x = torch.ones(3, 16, dtype=torch.bfloat16, requires_grad=True)
        arrived = dispatcher.dispatch(x, torch.arange(3).unsqueeze(1), torch.ones(3, 1))
        seen = weakref.ref(arrived.x.untyped_storage()), weakref.ref(arrived.gate_weights)
        seen = (*seen, weakref.ref(arrived.x.grad_fn))
        y = dispatcher.combine(arrived.x * 2, arrived)
        if backward:
            y.sum().backward()
        del arrived, y
        gc.collect()
        told.append([each() is None for each in seen[1:]])
    return told


def refused(group, kind):
    """What is said to what cannot go with DeepEP."""
    fields = {"hidden_size": 16, "ffn_hidden_size": 4, "num_experts": 4, "transport": "deep_ep"}
    alone = group if dist.get_world_size(group) == 1 else None
    x, ids, gates = torch.zeros(2, 16, dtype=torch.bfloat16), torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, 1)
    ranks = dist.get_world_size(group)
    kinds = {
        "one rank": lambda: MoE(**fields, ep_group=alone),
        "few experts": lambda: MoE(**{**fields, "num_experts": ranks // 2, "top_k": 1}, ep_group=group),
        "tp": lambda: MoE(**fields, **groups_of(group, ("tp", 2))),
        "levels": lambda: MoE(**fields, **groups_of(group, ("levels", 2))),
        "static": lambda: DeepEPDispatcher(group, 4, max_rows_received=3),
        "wire": lambda: DeepEPDispatcher(group, 4, wire_dtype="fp8"),
        "joined": lambda: DeepEPDispatcher(group, 4, join_choices=False),
        "dtype": lambda: DeepEPDispatcher(group, 4).dispatch(x.float(), ids, gates),
        "width": lambda: DeepEPDispatcher(group, 4).dispatch(x[:, :8], ids, gates),
        "choices": lambda: DeepEPDispatcher(group, 4).dispatch(x, ids.expand(2, 33), gates.expand(2, 33)),
        "kinds": lambda: DeepEPDispatcher(group, 4).dispatch(
            x.requires_grad_(dist.get_rank(group) == 0), ids, gates.expand(2, 1)
        ),
        "foreign": lambda: DeepEPDispatcher(group, 4).combine(x, AllToAllDispatcher(group, 4).dispatch(x, ids, gates)),
        "results": lambda: combined(group, x, ids, gates, lambda y: y.float()),
        "differ": lambda: differ(group, fields, x),
    }
    with contextlib.nullcontext() if kind == "absent" else deep_ep():
        try:
            kinds.get(kind, lambda: MoE(**fields, ep_group=group))()
        except (ValueError, TypeError, ImportError) as error:
            return f"{type(error).__name__}: {error}"
    return "built"


def no_symmetric_memory(group, kind):
    """What is said where symmetric memory cannot be used."""
    fields = {"hidden_size": 6, "ffn_hidden_size": 4, "num_experts": 4, "transport": "symmetric_memory"}
    absent = patch("torch.distributed._symmetric_memory.is_nvshmem_available", lambda: False)
    with absent if kind == "absent" else fake_symmetric_memory.installed():
        try:
            MoE(**fields, **groups_of(group, ("levels", 2) if kind == "levels" else "flat"))
        except (ValueError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"
    return "built"


@fake_symmetric_memory.installed()
def symmetric_sizes(group, rows):
    """Bytes of the buffers made by dispatches of so many rows on the first rank and none elsewhere, one by one."""
    dispatcher, sizes = SymmetricDispatcher(group, 4), []
    for n in rows:
        n = 0 if dist.get_rank(group) else n
        x, ids = torch.ones(n, 3), torch.full((n, 1), 2)
        arrived = dispatcher.dispatch(x, ids, torch.ones(n, 1))
        assert torch.equal(dispatcher.combine(arrived.x, arrived), x)
        sizes.append(list(fake_symmetric_memory.sizes))
        fake_symmetric_memory.sizes.clear()
    return sizes


def combined(group, x, ids, gates, change):
    dispatcher = DeepEPDispatcher(group, 4)
    arrived = dispatcher.dispatch(x, ids, gates)
    return dispatcher.combine(change(arrived.x), arrived)


def differ(group, fields, x):
    """A forward of layers of which each rank's has another transport."""
    transport = "deep_ep" if dist.get_rank(group) else "all_to_all"
    MoE(**{**fields, "transport": transport}, ep_group=group, dtype=torch.bfloat16)(x)
