"""The model of ``balance_ranks="replicate"``: who computes what, and what the copies cost and save.

The plan is dmoe's own (:mod:`dmoe.parallel.levelling`), of the choices that ``ep_model.py`` has: those of every rank
where they were recorded, else a sample that stands for the tokens of all ranks.

**Seconds of one step** (forward and backward), flat and deduplicated; W, C and H are the slowest rank's weights, own
rows and hosted rows::

    forward    loads + counts + there + max(own products, weights) + products of copies + back
    backward   results' gradients there + 2 products of copies + max(2 own products, gradients of weights) + back

Weights travel behind the tokens while a rank computes its own experts; their gradients travel home while it
differentiates these. ``loads`` is the gathering of every rank's rows of each expert, from which all plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dmoe.parallel.levelling import Levelling, plan_levels, rows_that_pay
from parts.ep_bytes import Wire, experts_per_rank, rows_to_ranks
from parts.ep_links import Machine, flat, seconds
from parts.harness import COLOURS, label_lines, markdown_table, new_figure, save_figure

LOAD_BYTES = 4  # of each expert's rows, as ranks tell each other


@dataclass(frozen=True)
class Level:
    """What the plan makes of a routing.

    Attributes:
        rows: ``(W, W)``, deduplicated, with copies.
        before, own, hosted: rows that each rank's experts would have had; of its own experts now, and of copies.
        lent, hosts: copies that each rank sends and receives.
    """

    rows: Tensor
    before: Tensor
    own: Tensor
    hosted: Tensor
    lent: Tensor
    hosts: Tensor


def levelled(choices: Sequence[Tensor], experts: int, ranks: int, tokens: int, how: Levelling) -> Level:
    """The plan of these choices.

    Args:
        choices: of every rank, or one sample of the tokens of all.
        experts: E.
        ranks: W.
        tokens: on each rank, which a sample stands for.
        how: limits; ``min_rows`` is a number.
    """
    each, pieces = experts_per_rank(experts, ranks)
    owners, exact = ranks // pieces, len(choices) == ranks
    counted = list(choices) if exact else [torch.cat(list(choices))]
    scale = 1.0 if exact else tokens * ranks / max(len(counted[0]), 1)
    loads = torch.stack([torch.bincount(c.flatten().long(), minlength=experts + 1)[:experts] for c in counted])
    limits = Levelling(how.slack, how.max_copies, max(1, round((how.min_rows or 1) / scale)))
    rows, plan = [], None
    for source, chosen in enumerate(counted):
        plan = plan_levels(chosen.int(), experts, owners, loads, source, limits, static=False)
        rows.append(rows_to_ranks(plan.choices, owners * (each + plan.num_slots), ranks))
    assert plan is not None
    matrix = torch.stack(rows) if exact else (rows[0] * (scale / ranks)).expand(ranks, ranks)
    hosted = plan.slot_rows.sum(1)
    lent = torch.bincount(plan.slots[plan.slots < experts] // each, minlength=owners)
    by_rank = (plan.rows_before * scale, (plan.rows - hosted) * scale, hosted * scale)
    counts = (lent, (plan.slots < experts).sum(1))
    spread = [part.repeat_interleave(pieces) for part in (*by_rank, *counts)]
    return Level(matrix, *spread)


def limits_of(setting: Any, machine: Machine, copies: int, slack: float) -> Levelling:
    """The layer's limits on this machine: a copy is made where it pays."""
    pieces = experts_per_rank(setting.experts, setting.gpus)[1]
    link = machine.inside if setting.gpus <= machine.node else machine.between
    pays = rows_that_pay(setting.hidden, setting.ffn // pieces, 2, machine.flops, link.bandwidth, link.latency)
    return Levelling(slack, copies, pays)


def compare(
    setting: Any, choices: Sequence[Tensor], machine: Machine, wire: Wire, plain: Tensor, how: Levelling
) -> Any:
    """Rows, copies, bytes and seconds of a step without copies and with them.

    Args:
        setting: of ``ep_model.py``.
        choices: see :func:`levelled`; none for a uniform routing, in which nothing is to be made level.
        machine: links and FLOP/s.
        wire: bytes of a row.
        plain: ``(W, W)`` rows without copies.
        how: limits.
    """
    if not choices:
        return None
    found = levelled(choices, setting.experts, setting.gpus, setting.tokens, how)
    pieces = experts_per_rank(setting.experts, setting.gpus)[1]
    numbers = 3 * setting.hidden * setting.ffn // pieces
    link = machine.inside if setting.gpus <= machine.node else machine.between
    nothing = torch.zeros_like(found.own)

    def step(rows: Tensor, own: Tensor, hosted: Tensor, weights: float, loads: float) -> float:
        there, back = seconds(flat(rows, machine.node), wire.row, machine), [p.back() for p in flat(rows, machine.node)]
        results = seconds(back, wire.result, machine)
        gradients = seconds(flat(rows, machine.node), wire.result, machine), seconds(back, wire.result, machine)
        product = 2 * numbers / machine.flops
        forward = (torch.maximum(own * product, torch.full_like(own, weights)) + hosted * product).max()
        backward = (2 * hosted * product + torch.maximum(2 * own * product, torch.full_like(own, weights))).max()
        return loads + there + float(forward) + results + gradients[0] + float(backward) + gradients[1]

    most = int(max(found.lent.max(), found.hosts.max()))
    weights = most * (link.latency + numbers * 2 / link.bandwidth)
    loads = (setting.gpus - 1) * (link.latency + setting.experts * LOAD_BYTES / link.bandwidth)
    without = step(plain, found.before.double(), nothing.double(), 0.0, 0.0)
    level = step(found.rows, found.own.double(), found.hosted.double(), weights, loads)
    mean = max(float(found.before.double().mean()), 1e-30)
    return {
        "rows_over_mean": [float(found.before.max()) / mean, float((found.own + found.hosted).max()) / mean],
        "copies": int(found.hosts.sum()) // pieces,
        "most_copies": most,
        "min_rows": how.min_rows,
        "weight_bytes": most * numbers * 2,
        "load_bytes": (setting.gpus - 1) * setting.experts * LOAD_BYTES,
        "step_seconds": [without, level],
    }


# ------------------------------------------------------------------------------------------------------------ report


def table(results: Sequence[dict[str, Any]]) -> str:
    """Every setting whose routing is not uniform, as Markdown."""
    rows = []
    for found in results:
        level, setting = found["level"], found["setting"]
        if level is None:
            continue
        without, with_copies = level["step_seconds"]
        rows.append(
            [
                setting["routing"],
                str(setting["gpus"]),
                str(setting["tokens"]),
                *(f"{share:.2f}" for share in level["rows_over_mean"]),
                str(level["copies"]),
                str(level["most_copies"]),
                str(level["min_rows"]),
                f"{level['weight_bytes'] / 1e6:.0f}",
                *(f"{1e3 * took:.2f}" for took in (without, with_copies)),
                f"{without / with_copies:.2f}",
            ]
        )
    header = ["routing", "GPUs", "tokens", "rows / mean", "level", "copies", "of one rank", "rows that pay"]
    return markdown_table([*header, "MB of weights", "ms a step", "level", "times as fast"], rows)


def plot(results: Sequence[dict[str, Any]], title: str, path: Any) -> None:
    """Milliseconds of a step over the skew, a panel for each number of GPUs, without copies and with."""
    sizes = list(dict.fromkeys(found["setting"]["gpus"] for found in results))
    figure, axes = new_figure(len(sizes), width=4.4 * len(sizes), height=4.2)
    ends_of = []
    for axis, gpus in zip(axes, sizes, strict=True):
        chosen = [found for found in results if found["setting"]["gpus"] == gpus]
        skews = [float(found["setting"]["routing"].partition(":")[2]) for found in chosen]
        ends = []
        for n, name in enumerate(("as they stand", "level")):
            took = [1e3 * found["level"]["step_seconds"][n] for found in chosen]
            axis.plot(skews, took, color=COLOURS[n], marker="o", ms=3.5, lw=1.6)
            ends.append((skews[-1], took[-1], name, COLOURS[n]))
        axis.set_yscale("log")
        axis.set_xlabel("exponent of Zipf's law")
        axis.set_title(f"{gpus} GPUs, E = {chosen[0]['setting']['experts']}")
        ends_of.append(ends)
    axes[0].set_ylabel("ms of one layer's step, model")
    figure.suptitle(title, x=0.07, ha="left")
    figure.subplots_adjust(wspace=0.5, top=0.84)
    figure.canvas.draw()
    for axis, ends in zip(axes, ends_of, strict=True):
        label_lines(axis, ends, gap=0.05)
    save_figure(figure, path)
