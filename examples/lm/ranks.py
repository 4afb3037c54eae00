"""The processes that train one model together, as `torchrun --nproc-per-node N` starts them; or one alone.

They stand in a grid of N / W replicas by W expert-parallel ranks: the experts of each layer are spread over the W ranks
of a row, and everything else is on all N, averaged by DDP, or cut over them by FSDP2. The N ranks share one batch and
see each its own sequences of it, so that the loss is that of one process with this batch, but for rounding. A
checkpoint is that of one process, too: it goes on with any N and W, under either.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from dmoe import is_expert_param
from dmoe.checkpoint import merge_states, split_state
from dmoe.parallel import clip_grad_norm, local_experts, parallelize

from .settings import Settings, UsageError, written


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together."""

    count: int = 1
    """N."""
    rank: int = 0
    """This process; 0 prints, draws and writes."""
    expert_parallel: int = 1
    """W."""
    mesh: Any = None
    """``(replicas, ep)``; None for one process."""
    fsdp2: bool = False
    """Whether parameters are cut over the ranks; DDP keeps all but experts whole on each."""
    control: Any = None
    """A group of all for what hosts tell each other: never NCCL, which would make them wait for their GPUs."""

    @property
    def first(self) -> bool:
        """Whether this process speaks for all."""
        return self.rank == 0

    def say(self, text: str) -> None:
        """Print, once for all ranks."""
        if self.first:
            print(text, flush=True)

    def of_config(self, preset: str | None) -> dict[str, Any]:
        """Options of a mixture's config that the ranks decide; a preset's losses are what they are."""
        # Balanced is to be the batch of all ranks, as it is in one process, not each rank's few sequences.
        return {"load_balancing_over": "global"} if self.count > 1 and preset is None else {}

    def of_layer(self) -> dict[str, Any]:
        """What each MoE layer needs to know."""
        if self.count == 1:
            return {}
        options: dict[str, Any] = {"loss_group": dist.group.WORLD}
        if self.expert_parallel > 1:
            options |= {"ep_group": self.mesh["ep"], "dtensor": self.fsdp2}
        return options

    def experts(self, number: int) -> slice:
        """Those of a layer's experts that live here."""
        mine = local_experts(number, self.expert_parallel, self.rank % self.expert_parallel)
        return slice(mine.start, mine.stop)

    def rows(self, batch: int) -> tuple[slice, int]:
        """This rank's sequences of a batch, and how many of them count: never none to run, as layers talk in forward.

        Counts are as equal as can be. Where a batch is shorter than the ranks are many, the rest run one for nothing.
        """
        start, stop = batch * self.rank // self.count, batch * (self.rank + 1) // self.count
        return (slice(start, stop), stop - start) if stop > start else (slice(0, 1), 0)

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model for training forwards, whose backward averages gradients."""
        if self.count == 1:
            return model
        mesh = self.mesh if self.expert_parallel > 1 else self.mesh["replicas"]
        if self.fsdp2:
            return parallelize(model, mesh)
        # Buffers are constants, and need no broadcast in every forward; newer releases of torch call that otherwise.
        known = inspect.signature(nn.parallel.DistributedDataParallel).parameters
        option = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        options: dict[str, Any] = {option: False}
        return parallelize(model, mesh, data="ddp", **options)

    def clip(self, model: nn.Module, max_norm: float) -> None:
        """Clip the gradient by its norm over all ranks."""
        if self.count == 1:
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        else:
            clip_grad_norm(model, max_norm)

    def sum(self, tensor: Tensor) -> Tensor:
        """Over all ranks; the given tensor is left alone."""
        if self.count == 1:
            return tensor
        total = tensor.detach().clone()
        dist.all_reduce(total)
        return total

    def highest(self, number: int) -> int:
        """The largest number that a rank gives: the same on all ranks, which none passes before all have come."""
        if self.count == 1:
            return number
        largest = torch.tensor(number)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.control)
        return int(largest)

    def agreed(self, value: Any) -> Any:
        """What rank 0 gives, on all ranks."""
        if self.count == 1:
            return value
        holder = [value]
        dist.broadcast_object_list(holder, src=0, group=self.control)
        return holder[0]

    def merged(self, state: dict[str, Any], has_experts: bool) -> dict[str, Any]:
        """On rank 0 the state of the whole model and its optimizer, as of one process; nothing on the others."""
        if self.fsdp2:
            from . import fsdp

            return fsdp.whole(state, self.first)
        if not has_experts or self.expert_parallel == 1:
            return state if self.first else {}
        states: list[Any] = [None] * self.count
        mine = _on_cpu(state) if self.rank < self.expert_parallel else None  # the other rows hold the same
        dist.gather_object(mine, states if self.first else None, dst=0, group=self.control)
        return merge_states(states[: self.expert_parallel]) if self.first else {}

    def part(self, state: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """This rank's part of what `merged` gave, for its model and optimizer."""
        if self.fsdp2:
            from . import fsdp

            return fsdp.parts(state, model, optimizer)
        has_experts = any(map(is_expert_param, model.parameters()))
        if not has_experts or self.expert_parallel == 1:
            return state
        return split_state(state, self.expert_parallel)[self.rank % self.expert_parallel]

    def command(self, program: Sequence[str]) -> list[str]:
        """A command line that starts a program on as many ranks."""
        if self.count == 1:
            return list(program)
        start = ["torchrun", "--nproc-per-node", str(self.count), *program[1:]]
        start += ["--expert-parallel", str(self.expert_parallel)]
        return [*start, "--parallel", "fsdp2"] if self.fsdp2 else start


ALONE = Ranks()


def form(expert_parallel: int, device: torch.device, parallel: str = "ddp") -> Ranks:
    """The ranks of the process group that this process is in.

    Args:
        expert_parallel: W.
        device: of this rank.
        parallel: ``ddp`` or ``fsdp2``.

    Raises:
        UsageError: they cannot be divided.
    """
    count, rank = dist.get_world_size(), dist.get_rank()
    if expert_parallel < 1 or count % expert_parallel:
        raise UsageError(f"--expert-parallel must divide the {count} ranks of torchrun, got {expert_parallel}")
    if count == 1:
        return ALONE
    shape = (count // expert_parallel, expert_parallel)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicas", "ep"))
    return Ranks(count, rank, expert_parallel, mesh, parallel == "fsdp2", dist.new_group(backend="gloo"))


@contextmanager
def join(expert_parallel: int, device: torch.device, parallel: str = "ddp") -> Iterator[tuple[Ranks, torch.device]]:
    """The ranks that torchrun started, and this one's device; this process alone without torchrun.

    Raises:
        UsageError: ranks that cannot be divided, or fewer GPUs than ranks.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        if expert_parallel != 1:
            raise UsageError(
                f"--expert-parallel {expert_parallel} needs as many ranks: torchrun --nproc-per-node {expert_parallel}"
            )
        if parallel != "ddp":
            raise UsageError(f"--parallel {parallel} needs several ranks: torchrun --nproc-per-node N")
        yield ALONE, device
        return
    if device.type == "cuda":
        local, found = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= found:
            raise UsageError(f"--device cuda: expected a GPU for each rank of this machine, found {found}")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=10))
    try:
        yield form(expert_parallel, device, parallel), device
    finally:
        dist.destroy_process_group()


def check(settings: Settings, ranks: Ranks) -> None:
    """Refuse settings that these ranks cannot share.

    Raises:
        UsageError: which one.
    """
    if settings.batch < ranks.count:
        raise UsageError(f"--batch must be at least the number of ranks ({ranks.count}), got {settings.batch}")
    if any(number % ranks.expert_parallel for number in settings.layer_experts):
        raise UsageError(
            f"--expert-parallel must divide --experts ({written(settings.experts)}), got {ranks.expert_parallel}"
        )
    if settings.compile and ranks.count > 1:
        raise UsageError(f"--compile: expected one process, got {ranks.count} ranks")


def _on_cpu(tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return tree.detach().cpu()
    if isinstance(tree, dict):
        return {key: _on_cpu(value) for key, value in tree.items()}
    return [_on_cpu(value) for value in tree] if isinstance(tree, list) else tree
