"""Frameworks' loops against a loop by hand: a small model, its data, and what one process makes of the global batch."""

from __future__ import annotations

import contextlib
import os
import tempfile
from dataclasses import dataclass
from unittest.mock import patch

import torch
import torch.distributed as dist
from rank_jobs_by_name import call
from torch import nn

import dmoe

H = 6
FIELDS = {
    "hidden_size": H,
    "ffn_hidden_size": 8,
    "num_experts": 4,
    "top_k": 2,
    "load_balancing_coefficient": 0.1,
    "load_balancing_over": "global",
}


@dataclass(frozen=True)
class Case:
    """How a run goes.

    Attributes:
        steps: of the optimizer.
        batch: samples of all ranks in a micro batch.
        accumulate: micro batches of a step.
        clip: norm that gradients are clipped to, or largest magnitude; it is below that of every step.
        clip_by: "norm" or "value".
        fields: of the layer, beside ``FIELDS``.
    """

    steps: int = 6
    batch: int = 8
    accumulate: int = 2
    clip: float = 0.05
    clip_by: str = "norm"
    dtype: torch.dtype = torch.float64
    fields: dict | None = None

    @property
    def samples(self):
        return self.batch * self.accumulate * self.steps


class Net(nn.Module):
    """Two dense layers around a mixture: built alike wherever it is built."""

    def __init__(self, case, **options):
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Linear(H, H, dtype=case.dtype)
        self.moe = dmoe.MoE(**{**FIELDS, **(case.fields or {})}, **options, dtype=case.dtype)
        self.last = nn.Linear(H, H, dtype=case.dtype)

    def forward(self, x):
        return self.last(self.moe(torch.tanh(self.first(x))))


def data_of(case):
    """Every sample once, ``(samples, H)``, in the order in which ranks take them in turns."""
    generator = torch.Generator().manual_seed(5)
    return torch.randn(case.samples, H, generator=generator, dtype=torch.float64).to(case.dtype)


def optimizer_of(net):
    groups = [{"params": group} for group in dmoe.parallel.split_parameters(net) if group]
    return torch.optim.AdamW(groups, lr=1e-2, foreach=True)


def by_hand(case, after_step=None):
    """Plain PyTorch in one process: the net, and the loss of every micro batch."""
    net = Net(case)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    losses, sizes = [], []
    for position, x in enumerate(data_of(case).split(case.batch) if case.steps else ()):
        loss = net(x).square().mean() + dmoe.aux_loss(net)
        losses.append(loss.detach())
        (loss / case.accumulate).backward()
        if (position + 1) % case.accumulate == 0:
            if case.clip_by == "value":
                sizes.append(nn.utils.get_total_norm([p.grad for p in net.parameters()], torch.inf))
                nn.utils.clip_grad_value_(net.parameters(), case.clip)
            else:
                sizes.append(nn.utils.clip_grad_norm_(net.parameters(), case.clip))
            optimizer.step()
            optimizer.zero_grad()
            if after_step is not None:
                after_step(net)
    assert all(size > case.clip for size in sizes)  # clipping was at work
    return net, torch.stack(losses) if losses else None


def whole(net):
    """Every value of a net, those of other ranks' experts too, on every rank."""
    state = {name: value.detach() for name, value in net.state_dict().items()}
    return {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in state.items()}


def environment(rank=0, world=1):
    """What torchrun tells a process."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
        "TORCHELASTIC_RUN_ID": "none",
        "ACCELERATE_USE_CPU": "true",
    }


@contextlib.contextmanager
def alone():
    """A group of this process alone, and its end."""
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, environment()):
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            yield
        finally:
            if dist.is_initialized():  # Accelerate's ``end_training`` ends it, too
                dist.destroy_process_group()


def on_ranks(pair, module):
    """Runs jobs of a module on two ranks, or in this process as the one rank: what each of them ends with."""

    def run(ranks, name, *arguments):
        if ranks == 2:
            return pair.run(call, module, name, *arguments)
        with alone():
            return [call(None, module, name, *arguments)]

    return run
