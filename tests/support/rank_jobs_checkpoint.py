"""What ranks do for the tests of checkpoint files: train, save their part, go on from one."""

from __future__ import annotations

import torch
import torch.distributed as dist
from rank_jobs_training import Net

from dmoe import aux_loss


def make_optimizer(model, form):
    """AdamW over one list of parameters, over groups with experts apart, or over names."""
    if form == "groups":
        experts = [p for name, p in model.named_parameters() if ".experts." in name]
        rest = [p for name, p in model.named_parameters() if ".experts." not in name]
        return torch.optim.AdamW([{"params": rest}, {"params": experts, "lr": 0.02}], lr=0.05)
    return torch.optim.AdamW(model.named_parameters() if form == "named" else model.parameters(), lr=0.05)


def checkpoint_of(model, optimizer, form, step):
    """What a training script saves."""
    if form == "by name":
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

        state = get_optimizer_state_dict(model, optimizer)
    else:
        state = optimizer.state_dict()
    return {"model": model.state_dict(), "optimizer": state, "step": step, "rng": [torch.zeros(2), "x"]}


def take_steps(model, optimizer, batches, shares, average=lambda parameter: None):
    """One optimizer step for each batch, over the mean of its shares' losses."""
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        total = 0.0
        for share in shares:
            loss = model(batch[share]).square().mean() + aux_loss(model)
            (loss / len(shares)).backward()
            total += loss.detach() / len(shares)
        for parameter in model.parameters():
            average(parameter)
        optimizer.step()
        losses.append(total)
    return losses


def train_and_save(group, fields, form, batches, file, start=None):
    """Steps on this rank's shares; saves to ``file`` with the rank in it. The outputs for the first batch after."""
    me, world = dist.get_rank(group), dist.get_world_size(group)
    model = Net(fields, ep_group=group, dtensor=False)
    optimizer = make_optimizer(model, form)
    if start is not None:
        saved = torch.load(start.format(rank=me), weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])

    def average(parameter):
        if getattr(parameter, "allreduce", True):
            dist.all_reduce(parameter.grad, group=group)
            parameter.grad /= world

    losses = take_steps(model, optimizer, batches, [me], average)
    if file is not None:
        torch.save(checkpoint_of(model, optimizer, form, len(batches)), file.format(rank=me))
    for loss in losses:
        dist.all_reduce(loss, group=group)
    with torch.no_grad():
        return [float(loss) / world for loss in losses], model(batches[0][me])


def save_dtensors(group, fields, file):
    """A layer whose parameters are DTensors: what merging says, and a file of their local parts."""
    from dmoe.checkpoint import merge_states

    model = Net(fields, ep_group=group)
    state = model.state_dict()
    local = {name: getattr(value, "to_local", lambda value=value: value)() for name, value in state.items()}
    torch.save(local, file.format(rank=dist.get_rank(group)))
    try:
        merge_states([state])
    except TypeError as error:
        return str(error)
    return "merged"
