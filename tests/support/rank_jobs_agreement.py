"""Ranks that differ in what all have to agree on, and what each of them is told; the group goes on afterwards."""

from __future__ import annotations

import torch
import torch.distributed as dist
from rank_jobs_training import grid

from dmoe import MoE, aux_loss


def built(group, fields, tp, lacks=()):
    """A layer on all ranks of the group, in a grid with ``tp`` columns; ranks that lack ``expert_tp_group``."""
    if tp == 1:
        return MoE(**fields, ep_group=group)
    mesh = grid(1, dist.get_world_size(group) // tp, tp)
    lacking = dist.get_rank(group) in lacks
    return MoE(**fields, ep_group=mesh["ep"], expert_tp_group=None if lacking else mesh["expert_tp"])


def forward(group, layer, **options):
    """One step, which every rank gets through."""
    x = torch.ones(2, layer.config.hidden_size)
    y = layer(x, **options)
    if torch.is_grad_enabled():
        (y.sum() + aux_loss(layer)).backward()


def told(group, fields, tp, what, odd, first=False):
    """What each rank is told where some differ, in the first forward or a later one; the same groups then go on.

    Args:
        what: they differ in.
        odd: the ranks that do.
    """
    here = dist.get_rank(group) in odd
    torch.manual_seed(int(what == "seed" and here))
    layer = built(group, fields, tp, odd if what == "expert_tp_group" else ())
    if not first:
        forward(group, layer)
    layer.train(not (what == "mode" and here))
    try:
        grad, cast = not (what == "autograd" and here), what == "autocast" and here
        with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16, enabled=cast):
            mask = torch.ones(2, dtype=torch.bool) if what == "mask" and here else None
            forward(group, layer, token_mask=mask)
        said = None
    except ValueError as error:
        said = str(error)
    torch.manual_seed(0)
    forward(group, built(group, fields, tp))  # over the same groups
    return said


def in_a_grid(group, fields, alone):
    """A step on a grid of two replicas of two slices; some ranks have a layer of their own over one of its groups."""
    mesh = grid(2, 1, 2)
    if dist.get_rank(group) in alone:
        forward(group, MoE(**fields, ep_group=mesh["ep"]))
    torch.manual_seed(0)
    forward(group, MoE(**fields, ep_group=mesh["ep"], expert_tp_group=mesh["expert_tp"]))
    return True


def static_modes(group, fields):
    """Ranks in different modes in a layer that is static in a later forward: all that they are told is in the first."""
    torch.manual_seed(0)
    layer = built(group, fields, 1)
    layer.train(dist.get_rank(group) != 1)
    try:
        forward(group, layer)
    except ValueError as error:
        return str(error)
