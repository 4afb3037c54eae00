"""Experts over fairseq's ranks: the groups, the data-parallel wrapper, and the norm of all gradients.

Every rank has tokens of its own. Up to E ranks share the experts in blocks of E / W. More than E ranks (a multiple)
form groups of E in a row, each with every expert, as on the branch: rank r holds expert ``r % E``, and the ranks with
the same one are its replicas.

Gradients: fairseq averages over W ranks what all of them have, then multiplies everything by W / tokens. An expert's
gradient is already the sum over the tokens of its group; dmoe divides it by the group's size or the root of that
(``--moe-normalize-expert-grad``), and replicas are averaged here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from fairseq.distributed import ModuleProxyWrapper
from fairseq.distributed import utils as distributed_utils
from fairseq.models import DistributedFairseqModel
from torch import Tensor, nn

import dmoe
from dmoe.integrations.fairseq_moe import compat
from dmoe.integrations.fairseq_moe.flags import FlagError


@dataclass(frozen=True)
class ExpertGroups:
    """Where a rank's experts are.

    Attributes:
        ep_group: the ranks that share one set of experts; None on one rank.
        replicas: the ranks that hold the same experts as this one; None when each expert is held once.
    """

    ep_group: Any = None
    replicas: Any = None

    @property
    def num_replicas(self) -> int:
        """How often each expert is held."""
        return 1 if self.replicas is None else dist.get_world_size(self.replicas)


_made: dict[tuple[tuple[int, ...], int], ExpertGroups] = {}


def world() -> tuple[int, int]:
    """This rank among those that train or evaluate together, and how many they are."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return distributed_utils.get_data_parallel_rank(), distributed_utils.get_data_parallel_world_size()


def expert_groups(num_experts: int) -> ExpertGroups:
    """The groups of this rank; the first call for a number of experts makes them, on every rank.

    Raises:
        FlagError: experts that cannot be divided over the ranks, nor ranks over the experts; on every rank.
    """
    ranks = world()[1]
    if ranks == 1:
        return ExpertGroups()
    if num_experts % ranks and ranks % num_experts:
        raise FlagError(
            f"--moe-expert-count: expected a multiple of the {ranks} ranks, or a divisor of them, got {num_experts}; "
            "every rank holds as many experts"
        )
    group = distributed_utils.get_data_parallel_group()
    if ranks <= num_experts:
        return ExpertGroups(group)
    members = dist.get_process_group_ranks(group)
    key = (tuple(members), num_experts)
    if key not in _made:
        across = _own([members[first : first + num_experts] for first in range(0, ranks, num_experts)])
        _made[key] = ExpertGroups(across, _own([members[first::num_experts] for first in range(num_experts)]))
    return _made[key]


def _own(groups: list[list[int]]) -> Any:
    """Make all groups, which every rank has to do; the one that this rank is in."""
    made = [dist.new_group(ranks) for ranks in groups]
    return next(group for group, ranks in zip(made, groups, strict=True) if dist.get_rank() in ranks)


def data_parallel(cfg: Any, model: nn.Module, groups: ExpertGroups, device: torch.device) -> nn.Module:
    """A model with experts as ``--ddp-backend`` wraps it.

    Args:
        cfg: fairseq's.
        model: this rank's.
        groups: of its experts.
        device: where to.
    """
    cfg, group = cfg.distributed_training, distributed_utils.get_data_parallel_group()
    if cfg.ddp_backend in ("c10d", "pytorch_ddp"):
        on_gpu = device.type == "cuda"
        with compat.unused_copies_aside(model):
            ddp: Any = dmoe.parallel.data_parallel(
                model.to(device),
                process_group=group,
                expert_replicas=groups.replicas,
                device_ids=[cfg.device_id] if on_gpu else None,
                output_device=cfg.device_id if on_gpu else None,
                broadcast_buffers=cfg.broadcast_buffers,
                bucket_cap_mb=cfg.bucket_cap_mb,
                find_unused_parameters=cfg.find_unused_parameters,
                gradient_as_bucket_view=cfg.gradient_as_bucket_view,
            )
        wrapped = ModuleProxyWrapper(ddp)
        if groups.replicas is not None:
            # fairseq calls this when the gradients of a step are complete; DDP has averaged the replicas by then.
            ddp.all_reduce_grads = lambda: rescale_replicas(model, groups)
        return wrapped
    wrapped = DistributedFairseqModel(cfg, model, process_group=group, device=device)
    if groups.replicas is not None:
        legacy = wrapped.module
        of_all = legacy.all_reduce_grads

        def all_reduce_grads() -> None:
            of_all()
            if not legacy.accumulate_grads:
                dmoe.parallel.average_gradients(experts_of(model), groups.replicas)
                rescale_replicas(model, groups)

        legacy.all_reduce_grads = all_reduce_grads
    return wrapped


def experts_of(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of experts."""
    return [parameter for parameter in model.parameters() if dmoe.is_expert_param(parameter)]


@torch.no_grad()
def rescale_replicas(model: nn.Module, groups: ExpertGroups) -> None:
    """From ``1 / (sqrt(group) * replicas)`` to ``1 / sqrt(W)``; a mean over group and replicas is right already."""
    scales = {moe.config.expert_grad_scale for moe in dmoe.moe_layers(model).values()}
    if scales != {"sqrt_world_size"}:
        return
    for parameter in experts_of(model):
        if parameter.grad is not None:
            parameter.grad.mul_(math.sqrt(groups.num_replicas))


def count_experts_in_norm(optimizer: Any, model: nn.Module) -> None:
    """Let a fairseq optimizer's ``clip_grad_norm`` see every expert, on whatever rank: fairseq's own leaves them out.

    With ``--fp16`` the norm finds an overflow; being that of all ranks, it is found on all of them.

    Args:
        optimizer: as ``Trainer`` builds it, with or without one of the wrappers that scale the loss.
        model: whose gradients they are.
    """
    inner = getattr(optimizer, "fp32_optimizer", None) or getattr(optimizer, "wrapped_optimizer", None) or optimizer

    def clip_grad_norm(max_norm: float, aggregate_norm_fn: Any = None) -> Tensor:
        if max_norm > 0:
            return dmoe.parallel.clip_grad_norm(model, float(max_norm))
        return dmoe.parallel.grad_norm(model)

    inner.clip_grad_norm = clip_grad_norm


def from_first(value: Any) -> Any:
    """What the first rank gives, on all of them."""
    holder = [value]
    if world()[1] > 1:
        group = distributed_utils.get_data_parallel_group()
        dist.broadcast_object_list(holder, src=dist.get_global_rank(group, 0), group=group)
    return holder[0]


def agreed(problem: str | None) -> None:
    """Raise the first problem that any rank has, on all of them: none is left waiting for the others.

    Raises:
        FlagError: there is one.
    """
    told: list[str | None] = [problem]
    ranks = world()[1]
    if ranks > 1:
        told = [None] * ranks
        dist.all_gather_object(told, problem, group=distributed_utils.get_data_parallel_group())
    first = next((each for each in told if each is not None), None)
    if first is not None:
        raise FlagError(first)
