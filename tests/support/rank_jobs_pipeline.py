"""Pipelines of stages whose experts are spread over ranks: jobs of a :class:`rank_pool.RankPool`."""

from __future__ import annotations

import torch
import torch.distributed as dist
from rank_jobs_whole_model import FIELDS, Block, mesh_of, values_of
from torch import nn
from torch.distributed.pipelining import schedules

import dmoe
from dmoe.parallel import parallelize
from dmoe.parallel.pipeline import PipelineStage

BLOCKS, MICRO, MAX_NORM = 4, 4, 0.3


class Model(nn.Module):
    """Blocks between an embedding and a head; the first may also keep what its layers' losses are."""

    def __init__(self, fields, blocks=range(BLOCKS)):
        super().__init__()
        torch.manual_seed(5)
        where, H = {"dtype": torch.float64}, fields["hidden_size"]
        everything = [
            nn.Embedding(12, H, **where),
            *(Block(fields, where) for _ in range(BLOCKS)),
            nn.Linear(H, 12, **where),
        ]
        self.embedding = everything[0] if 0 in blocks else None
        self.blocks = nn.ModuleDict({str(index): everything[1 + index] for index in blocks})
        self.head = everything[-1] if BLOCKS - 1 in blocks else None

    def forward(self, x):
        x = x if self.embedding is None else self.embedding(x)
        for block in self.blocks.values():
            x = block(x)
        return x if self.head is None else self.head(x)


def task_loss(logits, targets):
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def stages_of(schedule, pp_rank):
    """Which stages a rank of two has, and in how many the model is cut."""
    if issubclass(schedule, schedules.PipelineScheduleSingle):
        return [pp_rank], 2
    return ([0, 3] if pp_rank == 0 else [1, 2]) if schedule in V_SHAPED else [pp_rank, pp_rank + 2], 4


V_SHAPED = (schedules.ScheduleZBVZeroBubble, schedules.ScheduleDualPipeV)


def pipeline(group, name, options, steps):
    """``steps[step][ep_rank]`` are the ids of all micro-batches. Losses, attached losses, norms, values, loads."""
    mesh = mesh_of(pp=2, ep=2)
    schedule_class = getattr(schedules, name)
    pp, ep = mesh["pp"], mesh["ep"]
    indices, count = stages_of(schedule_class, pp.get_local_rank())
    per_stage = BLOCKS // count
    fields = {**FIELDS, **options["fields"]}
    modules, stages = [], []
    for index in indices:
        module = Model(fields, range(index * per_stage, (index + 1) * per_stage))
        parallelize(module, ep, data=None)
        if options["data"] == "ddp":
            module = parallelize(module, ep, data="ddp")
        elif options["data"] == "fsdp2":
            parallelize(module, ep, data="fsdp2")
        dmoe.attach_aux_losses(module)
        shapes = {}
        if options["static"]:
            first, last, B = index == 0, index == count - 1, len(steps[0][0]) // MICRO
            hidden = torch.empty(B, 5, FIELDS["hidden_size"], dtype=torch.float64, requires_grad=True)
            shapes["input_args"] = torch.empty(B, 5, dtype=torch.int64) if first else hidden
            shapes["output_args"] = torch.empty(B, 5, 12, dtype=torch.float64) if last else hidden
        modules.append(module)
        stages.append(PipelineStage(module, index, count, torch.device("cpu"), group=pp.get_group(), **shapes))
    single = issubclass(schedule_class, schedules.PipelineScheduleSingle)
    schedule = schedule_class(stages[0] if single else stages, n_microbatches=MICRO, loss_fn=task_loss)
    parameters = [parameter for module in modules for parameter in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, foreach=False)
    mine, first, last = [step[ep.get_local_rank()] for step in steps], 0 in indices, count - 1 in indices
    told = []
    together = nn.ModuleList(modules)
    for ids in mine:
        optimizer.zero_grad()
        losses = []
        given = ids[:, :-1].contiguous()  # PyTorch 2.10 checks strides
        schedule.step(*((given,) if first else ()), **({"target": ids[:, 1:], "losses": losses} if last else {}))
        if options["data"] is None:  # what every rank of a stage has; the experts' gradients cover both ranks
            for parameter in dmoe.parallel.split_parameters(together)[0]:
                dist.all_reduce(parameter.grad, group=ep.get_group())
                parameter.grad /= 2
        norm = grad_norm_over(together, pp.get_group())
        aux = dmoe.attached_aux_loss(together, pp.get_group())
        optimizer.step()
        dmoe.update_selection_bias(together, ep.get_group())
        task = torch.stack(losses).mean() if last else torch.zeros((), dtype=torch.float64)
        dist.all_reduce(task, group=group)  # the last stage's ranks add up
        dist.all_reduce(aux, group=ep.get_group())  # as the task's loss, each rank's is of its own tokens
        told.append((task / 2, aux / 2, norm))
    values = {}
    for module in modules:
        values |= values_of(module)
    return told, values


def grad_norm_over(model, group):
    """Of all stages."""
    total = dmoe.parallel.grad_norm(model) ** 2
    dist.all_reduce(total, group=group)
    return total.sqrt()
