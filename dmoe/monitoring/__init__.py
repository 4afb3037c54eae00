"""Watching a model train: see :func:`dmoe.monitor`. ``python -m dmoe.report`` makes a page of what it writes."""

from __future__ import annotations

from typing import Any

from torch import nn

from dmoe.monitoring.alarms import Limits
from dmoe.monitoring.heat_map import STOPS
from dmoe.monitoring.recorder import Monitor
from dmoe.monitoring.records import LayerRecord, StepRecord
from dmoe.monitoring.similarity import expert_similarity
from dmoe.monitoring.token_counts import TokenTable
from dmoe.monitoring.writers import METRICS, TOKENS

__all__ = [
    "METRICS",
    "STOPS",
    "TOKENS",
    "LayerRecord",
    "Limits",
    "Monitor",
    "StepRecord",
    "TokenTable",
    "expert_similarity",
    "monitor",
]


def monitor(
    model: nn.Module,
    to: Any = None,
    *,
    every: int = 10,
    group: Any = None,
    similarity_every: int = 100,
    most_tokens: int = 64,
    limits: Limits | None = None,
) -> Monitor:
    """Record, for each step of any loop, what every :class:`dmoe.MoE` layer of a model does::

        with dmoe.monitor(model, "runs/x") as monitor:
            for batch in loader:
                with monitor.step():
                    with monitor.part("forward"):
                        loss = model(batch) + dmoe.aux_loss(model)
                    with monitor.part("backward"):
                        loss.backward()
                    ...

    All forwards of a step add up; those that an activation checkpoint runs again in backward do not count. What runs
    outside of steps, such as an evaluation, is not looked at. Steps that are not recorded cost a few Python calls and
    no synchronisation; a recorded one ends with one all-reduce, and the host waits for it.

    Args:
        model: the module that the loop calls, the same on all ranks; layers inside wrappers (DDP, FSDP2,
            ``torch.compile``) are found. In a compiled model the layers' seconds are missing, and so are router logits
            and tokens where it was compiled before the monitor started; if what the loop calls is a wrapper of what is
            given here, of several forwards in a step only the last counts.
        to: where records go, from rank 0: the path of a folder (``metrics.jsonl``, ``tokens.json``), a TensorBoard
            ``SummaryWriter``, a W&B run, any function of a :class:`StepRecord`, or a list of these.
        every: record steps whose number is a multiple of this. A recorded step costs about a millisecond: under 2% of
            small steps on a CPU at 10 (``benchmarks/monitoring.py``); 1 is for short runs, and where steps are long.
        group: the ranks whose numbers are summed, all of which end each step together: a process group or a mesh of one
            dimension; None is all ranks.
        similarity_every: steps between two measurements of :func:`expert_similarity`.
        most_tokens: how many different ids of ``token_ids`` are counted; see :class:`TokenTable`.
        limits: from where on it warns; None is ``Limits()``.

    Returns:
        A :class:`Monitor`. Its hooks are in from ``with`` (or ``start()``) on until the context is left (``close()``).

    Raises:
        ValueError: a model without such layers, or an ``nn.DataParallel``; a number below 1.
        TypeError: ``to`` or ``group`` are of another kind.
    """
    return Monitor(
        model,
        to,
        every=every,
        group=group,
        similarity_every=similarity_every,
        most_tokens=most_tokens,
        limits=limits,
    )
