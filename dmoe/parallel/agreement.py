"""Do all ranks run the same layer? Asked once, and answered alike on every rank: nobody is left waiting."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from dmoe.activation_functions import name_of
from dmoe.parallel.collectives import outside_graphs
from dmoe.parallel.fsdp1 import check_fsdp1
from dmoe.parallel.meeting import Verdict, meet

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def check_layers(layer: Any, dtype: torch.dtype) -> None:
    """Ask the other ranks of an expert-parallel layer whether they run the same one.

    Args:
        layer: a :class:`dmoe.MoE` with ``ep_group``.
        dtype: of its input.

    Raises:
        ValueError: on every rank, when they do not; or experts in a flat parameter of FSDP1; or parameters beside the
            experts' own, such as an adapter's, that DDP would average over ranks that hold other experts.
        RuntimeError: a CUDA graph is being captured, in which nobody can be asked.
    """
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "MoE: expected one forward before a CUDA graph is captured: the first one asks the other ranks whether "
            "they run the same layer"
        )
    config, dispatcher = layer.config, layer.dispatcher
    holders = [module for module in layer.experts.modules() if hasattr(module, "owned")]  # Experts, maybe in an adapter
    for holder in holders:
        check_fsdp1(layer, holder)
    own = {id(each) for holder in holders for each in holder.parameters(recurse=False)}
    added = {name: each for name, each in layer.experts.named_parameters() if id(each) not in own}
    if unmarked := [name for name, each in added.items() if not hasattr(each, "allreduce")]:
        raise ValueError(
            f"MoE: experts: expected parameters of an adapter to say whether other ranks have others, got {unmarked} "
            "without: mark them with expert = True and allreduce = False"
        )
    if dispatcher.levelling is not None and (beside := _beside_plain_weights(holders)):
        raise ValueError(
            "MoE: balance_ranks: expected None where experts are more than their weights, which is what is copied, got "
            f"{config.balance_ranks!r} with {beside}"
        )
    options = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    if callable(config.activation):  # whose repr may hold an address
        options["activation"] = name_of(config.activation)
    weights = {"dtype of x": dtype, "dtype of the experts": next(layer.experts.parameters()).dtype}
    before = "call torch.manual_seed with one value on all ranks before"
    hints = {"seed": f"{before} the layer is built", "adapters": f"{before} dmoe.lora.add"}
    levels, losses = dispatcher.two_level, layer.auxiliary.ranks
    hops = {"ep_levels": None if levels is None else (levels.num_nodes, levels.ranks_per_node)}
    groups = {
        "ranks of expert_tp_group": dispatcher.num_ranks // dispatcher.world_size,
        "ranks of loss_group": None if losses is None else losses.num_ranks,
        "frozen parameters": [name for name, parameter in layer.named_parameters() if not parameter.requires_grad],
    }
    parts = {"router": layer.router, "experts": layer.experts}
    adapters = {part: held.summary() for part, module in parts.items() if (held := getattr(module, "lora", None))}
    seed = {"adapters": adapters, "seed": getattr(layer.experts, "seed", None)}
    fields = {**options, **weights, **hops, **groups, **seed, **_now(layer)}
    check_agreement("MoE", fields, dispatcher.groups, hints)


def _beside_plain_weights(holders: Sequence[Any]) -> str | None:
    """What experts have that no copy of their weights brings along."""
    if any(getattr(holder, "lora", None) is not None for holder in holders):
        return "adapters"
    return "weights that are codes" if any(next(holder.buffers(), None) is not None for holder in holders) else None


def _now(layer: Any) -> dict[str, Any]:
    """What a forward depends on beside the layer, where a rank that differs would leave the others waiting."""
    kind = next(layer.parameters()).device.type
    cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return {"autograd": torch.is_grad_enabled(), "autocast": cast, "training": layer.training}


@outside_graphs
def check_agreement(
    operation: str,
    fields: Mapping[str, Any],
    group: ProcessGroup | Sequence[ProcessGroup],
    hints: Mapping[str, str],
) -> None:
    """Compare ``fields`` over the ranks of a group; every rank must call this, and every rank gets the same answer.

    Args:
        operation: whose fields these are, for the message.
        fields: what has to be equal: short values with a telling ``repr``.
        group: the ranks; or several groups, asked one after the other: what one finds is told to the next. Every rank
            has the first. One may lack another: all are told as well (see ``meeting.py``) where any rank of its first
            group has one that is complete; else those that wait for it give up at the time limit.
        hints: by field, what to do when the ranks differ in it.

    Raises:
        ValueError: on every rank, naming each field that differs, its values, and the ranks that hold them.
    """
    mine = {name: repr(value) for name, value in fields.items()}
    first, *others = group if isinstance(group, Sequence) else (group,)
    everyone = _gathered((mine, uuid.uuid4().hex, bool(others)), first)
    problem = difference(operation, [record for record, *_ in everyone], hints)
    verdict = Verdict(first, everyone[0][1])
    number = _number(first) if any(goes_on for *_, goes_on in everyone) else 0
    for each in others:
        if told := meet(each, verdict, number):
            raise ValueError(told)
        everyone = _gathered((mine, problem), each)
        found = difference(operation, [record for record, _ in everyone], hints)
        problem = problem or next((told for _, told in everyone if told), found)
    if problem:
        if others:  # and only now, when all of those groups know: who reads it tells nobody
            verdict.leave(problem)
        raise ValueError(problem)


_asked: WeakKeyDictionary[ProcessGroup, int] = WeakKeyDictionary()  # a group's name may be another's in its time


def _number(group: ProcessGroup) -> int:
    """How many questions went on from a group to others: as many on all ranks of a grid, whose layers are the same.

    Those that ended in the group are not counted: some of the grid's ranks may have layers of their own beside it.
    """
    _asked[group] = _asked.get(group, 0) + 1
    return _asked[group]


def _gathered(value: Any, group: ProcessGroup) -> list[Any]:
    """Every rank's value."""
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, value, group=group)
    return everyone


def raise_unless_equal(operation: str, by_rank: Sequence[Mapping[str, str]], hints: Mapping[str, str]) -> None:
    """Raise what :func:`difference` says, if anything."""
    if problem := difference(operation, by_rank, hints):
        raise ValueError(problem)


def difference(operation: str, by_rank: Sequence[Mapping[str, str]], hints: Mapping[str, str]) -> str | None:
    """One sentence about every field in which the ranks' records differ; None when there is none.

    Args:
        operation: for the message.
        by_rank: one record for each rank of the group, in order.
        hints: by field, what to do about it.
    """
    differing = []
    for name in dict.fromkeys(name for record in by_rank for name in record):
        holders: dict[str, list[int]] = {}
        for rank, record in enumerate(by_rank):
            holders.setdefault(record.get(name, "nothing"), []).append(rank)
        if len(holders) > 1:
            said = ", ".join(f"{value} on {_ranks(ranks)}" for value, ranks in holders.items())
            differing.append(f"{name}: {said}" + (f" ({hints[name]})" if name in hints else ""))
    if not differing:
        return None
    return (
        f"{operation}: the ranks of the expert-parallel group disagree: {'; '.join(differing)}. Ranks are counted "
        "inside the group"
    )


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else "ranks " + ", ".join(map(str, ranks))
