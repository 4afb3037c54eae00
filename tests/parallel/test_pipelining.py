"""torch.distributed.pipelining: 2 stages x 2 expert-parallel ranks x 4 micro-batches are one process's step."""

from __future__ import annotations

import pytest
import rank_jobs_pipeline as jobs
import torch
from parallel_layer_cases import close
from rank_jobs_whole_model import FIELDS

import dmoe

PLAIN = {"fields": {}, "data": None, "static": True}


def steps_for(steps=3, batch=jobs.MICRO * 2):
    torch.manual_seed(11)
    return [[torch.randint(12, (batch, 6)) for _ in range(2)] for _ in range(steps)]


def by_hand(steps, fields):
    """One process: a micro-batch is that of both ranks together; its losses are the mean over four."""
    model = jobs.Model({**FIELDS, **fields})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    told = []
    for ranks in steps:
        optimizer.zero_grad()
        task, aux = 0.0, 0.0
        for parts in zip(*(ids.chunk(jobs.MICRO) for ids in ranks), strict=True):
            ids = torch.cat(parts)
            loss = jobs.task_loss(model(ids[:, :-1]), ids[:, 1:]) / jobs.MICRO
            balance = dmoe.aux_loss(model) / jobs.MICRO
            (loss + balance).backward()
            task, aux = task + loss.detach(), aux + balance.detach()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        optimizer.step()
        dmoe.update_selection_bias(model)
        told.append((task, aux, norm))
    return told, model.state_dict()


apart = pytest.mark.skipif(
    torch.__version__ < (2, 13), reason="backward of inputs by itself takes no autograd.Function (PyTorch 166577)"
)
BIASED = {"selection_bias": True, "selection_bias_update_rate": 0.1}
CASES = [
    ("ScheduleGPipe", PLAIN),
    ("Schedule1F1B", {**PLAIN, "fields": BIASED, "static": False}),
    ("Schedule1F1B", {**PLAIN, "data": "ddp"}),
    ("Schedule1F1B", {**PLAIN, "data": "fsdp2"}),
    ("ScheduleInterleaved1F1B", {**PLAIN, "static": False}),
    ("ScheduleLoopedBFS", PLAIN),
    pytest.param("ScheduleInterleavedZeroBubble", {**PLAIN, "fields": BIASED}, marks=apart),
    pytest.param("ScheduleZBVZeroBubble", PLAIN, marks=apart),
    pytest.param("ScheduleDualPipeV", PLAIN, marks=apart),
]


@pytest.mark.parametrize(("schedule", "options"), CASES)
def test_a_pipeline_is_one_process(ranks, schedule, options):
    steps = steps_for()
    told, state = by_hand(steps, options["fields"])
    seen = set()
    for there, values in ranks.run(jobs.pipeline, schedule, options, steps):
        for (task, aux, norm), (task_there, aux_there, norm_there) in zip(told, there, strict=True):
            close("task loss", task_there, task)
            close("auxiliary losses", aux_there.double(), aux, 1e-6)  # kept in float32
            close("norm", norm_there, norm)
        for name, value in values.items():
            close(name, value, state[name])
            seen.add(name)
    assert seen == set(state)
