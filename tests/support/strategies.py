"""What hypothesis draws: routings with everything that a router can produce, and the shapes around them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor


class Routing(NamedTuple):
    """Expert indices ``(T, K)``, ids in [0, E] where E means dropped, and E."""

    expert_indices: Tensor
    num_experts: int


@st.composite
def routings(
    draw: st.DrawFn,
    *,
    max_tokens: int = 40,
    max_experts: int = 9,
    dropped: bool = True,
    distinct: bool = False,
) -> Routing:
    """A routing: even, with empty experts, a hot expert, all on one expert, T = 0, K = E, fewer tokens than experts.

    Args:
        draw: given by hypothesis.
        max_tokens: T is drawn from 0 .. max_tokens.
        max_experts: E is drawn from 1 .. max_experts, K from 1 .. E.
        dropped: whether the id E ("dropped") may occur.
        distinct: whether the K experts of a token all differ, as with a top-k router.
    """
    T = draw(st.integers(0, max_tokens))
    E = draw(st.integers(1, max_experts))
    K = draw(st.one_of(st.integers(1, E), st.just(E)))
    kind = draw(st.sampled_from(["any", "few", "hot", "one"]))
    seed = draw(st.integers(0, 2**32 - 1))
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(T, E, generator=generator)
    favourite = draw(st.integers(0, E - 1))
    if kind == "few":  # some experts stay empty
        scores[:, draw(st.integers(1, E)) :] -= 2.0
    elif kind in ("hot", "one"):
        scores[:, favourite] += 2.0
    indices = scores.topk(K, dim=1).indices
    if not distinct:
        if kind == "one":
            indices = torch.full_like(indices, favourite)
        elif kind == "any":
            indices = torch.randint(0, E, (T, K), generator=generator)
    if dropped:
        share = draw(st.sampled_from([0.0, 0.3, 1.0]))
        indices = torch.where(torch.rand(T, K, generator=generator) < share, E, indices)
    dtype = draw(st.sampled_from([torch.int32, torch.int64]))
    return Routing(indices.to(dtype), E)
