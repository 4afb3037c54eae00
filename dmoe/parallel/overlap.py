"""Dispatch of one chunk of experts while another computes.

A rank's experts are cut into chunks of consecutive ones. Each chunk is a dispatch and a combine of its own, and all are
in one pipeline, here of three chunks, with time to the right::

    dispatch   | 0 | 1 | 2 |
    experts        | 0 | 1 | 2 |
    combine            | 0 | 1 | 2 |

A token that chose experts of several chunks on one rank travels there once for each of them: the price of the overlap.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dmoe.parallel.destinations import choices_of_plan
from dmoe.parallel.dispatch import AllToAllDispatcher
from dmoe.parallel.interface import Dispatched
from dmoe.plan import RoutingPlan


@dataclass(frozen=True)
class Overlapped:
    """What :func:`run_overlapped` returns.

    Attributes:
        y: results, ``(T, H)``.
        chunks: what was dispatched, by chunk; bytes sent are the sum of theirs.
        kept_per_expert: assignments of this rank's own tokens that were sent, for all experts, ``(E,)`` integer; None
            when none was dropped here.
    """

    y: Tensor
    chunks: tuple[Dispatched, ...]
    kept_per_expert: Tensor | None


def chunk_of(num_local_experts: int, degree: int, chunk: int) -> slice:
    """A rank's experts in a chunk, counted among its own.

    Raises:
        ValueError: they cannot be cut evenly.
    """
    if degree < 1 or num_local_experts % degree:
        raise ValueError(
            f"overlap_degree: expected a divisor of the {num_local_experts} experts of each rank, got {degree}"
        )
    each = num_local_experts // degree
    return slice(chunk * each, (chunk + 1) * each)


def choices_in_chunk(choices: Tensor, num_experts: int, num_local_experts: int, degree: int, chunk: int) -> Tensor:
    """The choices as seen by one chunk: its experts, of all ranks, renumbered without gaps.

    Args:
        choices: ``(T, K)`` integer in [0, E]; E marks a choice that takes no expert.
        num_experts: E.
        num_local_experts: experts of one rank.
        degree, chunk: how many chunks, and which.

    Returns:
        ``(T, K)`` in [0, E / degree], where E / degree marks all that are not of this chunk.
    """
    each = num_local_experts // degree
    rank, local = choices // num_local_experts, choices % num_local_experts
    # E is the first expert of a rank behind the last one, and so it is after the renumbering.
    return torch.where(local // each == chunk, rank * each + local % each, num_experts // degree)


def run_overlapped(
    dispatcher: AllToAllDispatcher,
    experts: Callable[[int, Dispatched], Tensor],
    x: Tensor,
    expert_indices: Tensor | None,
    gate_weights: Tensor,
    plan: RoutingPlan | None = None,
    *,
    degree: int,
    on_the_way: Callable[[int], None] | None = None,
) -> Overlapped:
    """Dispatch, experts and combine, chunk by chunk: a chunk's rows travel while another's are computed.

    The counts of all chunks travel first and together, so that the host waits for them once. Sums differ from those of
    ``degree=1`` in their order alone. A static dispatcher's ``max_rows_received`` bounds the rows of each chunk.

    Args:
        dispatcher: of all experts.
        experts: ``experts(chunk, arrived)`` computes ``(R', H)`` with the rank's experts ``chunk_of(...)``; the plan in
            ``arrived`` is over these alone. Cut weights with ``torch.chunk``: its backward joins the chunks' gradients
            once, where that of slices writes all of the weight for each.
        x, expert_indices, gate_weights, plan: as :meth:`AllToAllDispatcher.dispatch` takes them.
        degree: the number of chunks, a divisor of the experts of each rank. 1 does not overlap.
        on_the_way: ``on_the_way(chunk)`` is called while a chunk's rows travel, before they are waited for.

    Raises:
        ValueError: the experts of a rank cannot be cut evenly; and what dispatch and combine raise.
    """
    num_experts, num_local = dispatcher.num_experts, dispatcher.num_local_experts
    chunk_of(num_local, degree, 0)
    if expert_indices is None:
        expert_indices, gate_weights = choices_of_plan(plan, gate_weights)
    elif plan is not None and plan.capacity is not None:
        expert_indices = expert_indices.masked_fill(plan.token_to_rows < 0, num_experts)
    one = dispatcher.for_experts(num_experts // degree)
    prepared = [
        one.prepare_dispatch(x, choices_in_chunk(expert_indices, num_experts, num_local, degree, chunk), gate_weights)
        for chunk in range(degree)
    ]
    arrived, returning = [], []
    under_way = one.launch_dispatch(prepared[0])
    for chunk in range(degree):
        following = one.launch_dispatch(prepared[chunk + 1]) if chunk + 1 < degree else None
        if on_the_way is not None:
            on_the_way(chunk)
        arrived.append(one.finish_dispatch(under_way))
        if following is not None:  # of two hops the second one, too, travels while this chunk computes
            following = one.advance_dispatch(following)
        returning.append(one.start_combine(experts(chunk, arrived[chunk]), arrived[chunk]))
        if following is not None:
            under_way = following
    results = [one.finish_combine(each) for each in returning]
    y = results[0] if degree == 1 else torch.stack(results).sum(0)
    return Overlapped(y, tuple(arrived), _kept_per_expert(arrived, num_local // degree))


def run_in_chunks(
    dispatcher: AllToAllDispatcher,
    experts: Any,
    shared_expert: Callable[[Tensor], Tensor] | None,
    x: Tensor,
    routing: Any,
    *,
    degree: int,
) -> Overlapped:
    """:func:`run_overlapped` for a layer: its experts in groups, its shared expert while the first of them travels.

    Args:
        dispatcher: of all experts.
        experts: :class:`dmoe.experts.Experts`.
        shared_expert: ``(T, H)`` to ``(T, H)``, or None.
        x: ``(T, H)``.
        routing: its :class:`dmoe.Routing`.
        degree: the number of chunks.

    Raises:
        ValueError: an adapter stands in the experts' place, and what they raise.
    """
    if not hasattr(experts, "in_parts"):
        raise ValueError(
            f"MoE: overlap_degree: expected 1 with {type(experts).__name__} in the experts' place, got {degree}: it "
            "would run once for each chunk"
        )
    weights = experts.in_parts(degree)
    shared: list[Tensor] = []

    def on_the_way(chunk: int) -> None:
        weights[chunk] = weights[chunk].deferred()
        if shared_expert is not None and chunk == 0:
            shared.append(shared_expert(x))

    def compute(chunk: int, arrived: Dispatched) -> Tensor:
        return experts(arrived.x, arrived.plan, arrived.gate_weights, weights=weights[chunk])

    choices = (routing.expert_indices, routing.gate_weights, routing.plan)
    done = run_overlapped(dispatcher, compute, x, *choices, degree=degree, on_the_way=on_the_way)
    return replace(done, y=done.y + shared[0]) if shared else done


def _kept_per_expert(chunks: Sequence[Dispatched], each: int) -> Tensor | None:
    """The chunks' counts side by side, rank by rank."""
    kept = [chunk.kept_per_expert.view(-1, each) for chunk in chunks if chunk.kept_per_expert is not None]
    return torch.stack(kept, 1).flatten() if kept else None
