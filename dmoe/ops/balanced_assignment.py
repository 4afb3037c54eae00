"""``balanced_assignment``: every expert gets equally many tokens, and the scores' sum is as large as it can be.

What the BASE layer asks for (Lewis et al. 2021, "BASE Layers: Simplifying Training of Large, Sparse Models"), whose own
code approximates it by an auction. This is the exact answer to the transportation problem, by successive shortest paths
between experts (Ahuja, Magnanti, Orlin: Network Flows, 1993, chapter 9.7).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmoe.ops._checks import check_floating, known
from dmoe.ops._library import define


def _costs(scores: Tensor) -> Tensor:
    """Negated scores in float64, finite, and so small that their sums are."""
    costs = -scores.double()
    finite = costs.isfinite()
    if not finite.all():
        worst = costs[finite].max() if finite.any() else 0.0
        costs = torch.where(finite, costs, worst)
    return costs * 2.0**-200 if costs.numel() and costs.abs().max() >= 2.0**900 else costs


def balanced_assignment_ref(scores: Tensor) -> Tensor:
    """Plain-PyTorch meaning of :func:`balanced_assignment`; where optima are tied it may find another one.

    Tokens begin at their best experts and leave those that hold too many along shortest paths. Prices p of the experts
    keep each token where cost + p is least, which makes the assignment optimal for the loads that it has.
    """
    if scores.device.type != "cpu":  # steps that wait for each other, on little data: nothing for an accelerator
        return _balanced_assignment(scores.cpu()).to(scores.device)
    T, E = scores.shape
    if E == 0 or T % E:
        raise RuntimeError(f"dmoe::balanced_assignment: scores: {_expected(T, E)}")
    if T == 0:
        return torch.empty(0, dtype=torch.int64)
    costs = _costs(scores)
    expert, prices = _relieved(costs)
    while True:
        excess = torch.bincount(expert, minlength=E) - T // E
        if not excess.any():
            return expert
        steps = costs - costs.gather(1, expert.unsqueeze(1))  # what each token's going elsewhere costs
        rows = expert.unsqueeze(1).expand(T, E)
        cheapest = torch.full((E, E), torch.inf, dtype=torch.float64).scatter_reduce_(0, rows, steps, "amin")
        distance, parent = _shortest_paths((cheapest - prices.unsqueeze(1) + prices).clamp(min=0), excess > 0)
        prices -= distance.clamp(max=distance[excess < 0].max())

        # One token along every path, as long as nobody has gone with the token that makes one of its steps so cheap.
        gone = torch.zeros(T, dtype=torch.bool)
        for end in (excess < 0).nonzero().flatten().tolist():
            begin, way = end, []
            while (a := parent[begin]) >= 0:
                able = (expert == a) & ~gone & (steps[:, begin] == cheapest[a, begin])
                way.append((able, begin))
                begin = a
            if excess[begin] > 0 and all(able.any() for able, _ in way):
                for able, to in way:
                    token = able.int().argmax()
                    expert[token], gone[token] = to, True
                excess[begin] -= 1


def _relieved(costs: Tensor) -> tuple[Tensor, Tensor]:
    """Experts and prices to begin with.

    An expert that is best for far too many tokens gets at once the price at which only its share stays, and the others
    go where they then cost least: a path for each of them would be many searches for the same.
    """
    T, E = costs.shape
    expert, prices = costs.argmin(1), torch.zeros(E, dtype=torch.float64)
    for e in range(E):
        tokens = (expert == e).nonzero().flatten()
        excess = len(tokens) - T // E
        if 2 * excess > T // E:
            elsewhere = costs[tokens] + prices
            elsewhere[:, e] = torch.inf
            best = elsewhere.min(1)
            loss = best.values - (costs[tokens, e] + prices[e])
            leave = loss.argsort(stable=True)[:excess]
            prices[e] += loss[leave[-1]].clamp(min=0)
            expert[tokens[leave]] = best.indices[leave]
    return expert, prices


def _shortest_paths(lengths: Tensor, begins: Tensor) -> tuple[Tensor, list[int]]:
    """Distances from the nearest of ``begins``, and the expert before on the way; -1 where a way begins.

    Bellman and Ford's search: as no length is below 0, rounding cannot close a circle.
    """
    distance = torch.where(begins, 0.0, torch.inf).double()
    parent = torch.full_like(begins, -1, dtype=torch.int64)
    while True:
        through, before = (distance.unsqueeze(1) + lengths).min(0)
        shorter = through < distance
        if not shorter.any():
            return distance, parent.tolist()
        distance, parent = torch.where(shorter, through, distance), torch.where(shorter, before, parent)


_balanced_assignment = define(
    "balanced_assignment(Tensor scores) -> Tensor",
    balanced_assignment_ref,
    fake=lambda scores: scores.new_empty((scores.shape[0],), dtype=torch.int64),
    tags=(torch.Tag.cudagraph_unsafe,),  # of a CUDA tensor it reads the scores on the host
)


def _expected(num_tokens: int, num_experts: int) -> str:
    """The end of an error's sentence: what shape was expected, and what came."""
    if num_experts == 0:
        return f"expected shape (T, E) with at least one expert, got {(num_tokens, num_experts)}"
    return f"expected a number of tokens divisible by the num_experts = {num_experts}, got {num_tokens}"


def balanced_assignment(scores: Tensor) -> Tensor:
    """The expert of each token, T / E tokens for every expert, so that the sum of their scores is largest::

        maximise  sum_t scores[t, expert[t]]    subject to  |{t: expert[t] = e}| = T / E  for every e

    The sum is the largest one up to rounding in float64, whatever the scores' dtype: an auction finds no larger one.
    Which of several optima is found depends on the scores alone, not on the number of threads; without csrc/ it may be
    another one. A score that is not finite counts as the smallest finite one of the matrix; if none is finite, the
    assignment is any balanced one. The result has no gradient: gather the scores with it to get one.

    Time: O(T E) to read the scores, O(E^2) for each search, which finds a path for every expert that holds too few, and
    O(E log T) for each step of a token along one. There are as many paths as tokens above T / E when everyone is at the
    best expert; a single hot one gives up most of its own without a search. Memory: about 11 T E bytes, E rounded up to
    a multiple of 8. One thread of the CPU does it all. Of CUDA tensors the scores are copied to the host, which waits
    for them, and the result is copied back: a CUDA graph cannot capture this, and inductor's leave it out.

    Args:
        scores: ``(T, E)`` float32, float64, bfloat16 or float16, any strides; T a multiple of E, 0 included.

    Returns:
        ``(T,)`` int64, 0 to E - 1, on the scores' device.

    Raises:
        TypeError: ``scores`` is not floating point.
        ValueError: ``scores`` is not two-dimensional, E is 0, or T is not a multiple of E.
    """
    check_floating("balanced_assignment", scores=scores)
    if scores.ndim != 2:
        raise ValueError(f"balanced_assignment: scores: expected shape (T, E), got {tuple(scores.shape)}")
    num_tokens, num_experts = scores.shape
    if known(num_experts == 0) or known(num_tokens % num_experts != 0):
        raise ValueError(f"balanced_assignment: scores: {_expected(num_tokens, num_experts)}")
    return _balanced_assignment(scores)
