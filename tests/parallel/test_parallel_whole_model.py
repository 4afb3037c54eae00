"""A whole model on a mesh by one call: losses, norms and parameters are those of one process on all ranks' tokens."""

from __future__ import annotations

import pytest
import rank_jobs_whole_model as jobs
import torch
from parallel_layer_cases import close, part_of

LAYOUTS = [
    ({"ep": 4}, "fsdp2"),
    ({"ep": 4}, "ddp"),
    ({"replicas": 2, "ep": 2}, "fsdp2"),
    ({"replicas": 2, "ep": 2}, "ddp"),
    ({"ep": 2, "replicas": 2}, "fsdp2"),
    ({"ep": 2, "expert_tp": 2}, "fsdp2"),
    ({"replicas": 4}, "fsdp2"),
    ({"replicas": 4}, "ddp"),
]


def batches_for(world, steps=3, micro=2):
    torch.manual_seed(7)
    return [[[torch.randint(12, (2, 5)) for _ in range(micro)] for _ in range(world)] for _ in range(steps)]


def by_hand(batches, **options):
    """One process: the tokens of all ranks are one batch."""
    model = jobs.Model()
    together = [[torch.cat(parts) for parts in zip(*step, strict=True)] for step in batches]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, **options)
    losses, norms = jobs.take_steps(model, optimizer, together, lambda m, n: torch.nn.utils.clip_grad_norm_(m.parameters(), n))
    return losses, norms, model.state_dict()


@pytest.mark.parametrize(("sizes", "data"), LAYOUTS)
def test_steps_equal_one_process(ranks, sizes, data):
    """AdamW, foreach and fused in turns; two micro-batches a step; clipped."""
    options = {"foreach": True} if data == "fsdp2" else {"fused": True}
    batches = batches_for(4)
    losses, norms, state = by_hand(batches)
    assert (norms > jobs.MAX_NORM).all()  # clipping is at work
    for rank, (there, norms_there, values, marks) in enumerate(ranks.run(jobs.train, sizes, data, batches, options)):
        close("losses", there, losses)
        close("norms", norms_there, norms)
        assert values.keys() == state.keys()
        for name, value in state.items():
            if ".experts." in name and "expert_tp" in sizes:
                value = part_of(jobs.Model().blocks[0].moe, name.split("moe.")[1], value, rank, 4, tp=2)
            close(name, values[name], value)
        assert set(marks.values()) == {(True, "ep" not in sizes)}
