"""Monitored steps on ranks: what each rank records, beside reduce_metrics and what went through its own layers."""

from __future__ import annotations

from unittest.mock import patch

import torch
import torch.distributed as dist
from monitoring_cases import QUIET, TwoMixtures, by_hand

import dmoe


def steps(group, batches, expert_parallel, every=1, checkpointed=None, wrap=None, idle=()):
    """``batches[step][rank]`` are lists of micro batches of ids; ranks in ``idle`` run no forward at all.

    Returns:
        By step: the record, what :func:`by_hand` says of this rank's tokens by layer, ``reduce_metrics`` of a step of
        one forward, and the all-reduces and other collectives between a step's last backward and its end.
    """
    me = dist.get_rank(group)
    options = {"ep_group": group} if expert_parallel else {}
    model = TwoMixtures(checkpointed=checkpointed, **options)
    called = model if wrap is None else wrap(model, group)
    kept = []
    with dmoe.monitor(called, every=every, group=group, limits=QUIET) as monitor:
        for step in batches:
            for inputs in model.inputs.values():
                inputs.clear()
            monitor.begin_step()
            for ids in step[me] if me not in idle else ():
                called(ids).square().sum().backward()
            with patch.object(dist, "all_reduce", wraps=dist.all_reduce) as calls:
                record = monitor.end_step()
            hands = {name: by_hand(layer, model.inputs[name]) for name, layer in model.mixtures().items()}
            reduced = dmoe.reduce_metrics(called, group) if all(len(each) == 1 for each in step) and not idle else None
            sent = sum(layer.last_metrics.bytes_sent or 0 for layer in model.mixtures().values() if layer.last_metrics)
            kept.append((record, hands, reduced, calls.call_count, sent))
    return kept


def ddp(model, group):
    return torch.nn.parallel.DistributedDataParallel(model, process_group=group)


def fsdp(model, group):
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    mesh = DeviceMesh.from_group(group, "cpu")
    for layer in model.mixtures().values():
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def unrecorded(group, ids):
    """How many collectives a step that is not recorded adds, and one that raises on one rank alone."""
    me = dist.get_rank(group)
    model = TwoMixtures()
    with dmoe.monitor(model, every=1000, group=group, limits=QUIET) as monitor:
        names = ("all_reduce", "all_gather_into_tensor", "all_gather", "broadcast", "all_gather_object", "barrier")
        patches = [patch.object(dist, name, wraps=getattr(dist, name)) for name in names]
        calls = [each.start() for each in patches]
        for number in range(1, 5):
            with monitor.step(number):
                model(ids).sum().backward()
        try:
            with monitor.step(1000):
                if me == 0:
                    raise ZeroDivisionError
                raise ArithmeticError
        except ArithmeticError:
            pass
        for each in patches:
            each.stop()
    return sum(each.call_count for each in calls)


def folders(group, batches, folder, named):
    """Monitored into one folder: which ranks wrote, the table of tokens, and a warning's ranks."""
    import warnings

    me = dist.get_rank(group)
    model = TwoMixtures()
    with warnings.catch_warnings(record=True) as told, dmoe.monitor(model, folder, group=group, every=1) as monitor:
        warnings.simplefilter("always")
        for step in batches:
            with monitor.step(token_ids=step[me][0] if named else None):
                model(step[me][0])
    return monitor.tokens, monitor.warnings, [str(each.message) for each in told if "dmoe" in str(each.message)]
