"""Gradients over ranks: what every rank has is averaged over all, an expert's only over the ranks that hold it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dmoe.expert_slice import local_part
from dmoe.parallel.collectives import all_reduce, explained, outside_graphs
from dmoe.parallel.dispatch import AllToAllDispatcher
from dmoe.parallel.statistics import LoadOfRanks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def is_sharded(parameter: Tensor) -> bool:
    """Whether other ranks hold other values of this parameter: an expert's under expert parallelism."""
    return bool(getattr(parameter, "expert", False)) and not getattr(parameter, "allreduce", True)


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """What every rank has, and the experts that other ranks have others of: for optimizers that spread their state.

    ``ZeroRedundancyOptimizer`` sends each parameter from one rank to all others, so it may have the first list only::

        replicated, experts = split_parameters(model)
        optimizers = [ZeroRedundancyOptimizer(replicated, torch.optim.AdamW, lr=lr), torch.optim.AdamW(experts, lr=lr)]
    """
    parameters = list(model.parameters())
    return [p for p in parameters if not is_sharded(p)], [p for p in parameters if is_sharded(p)]


def average_gradients(parameters: Iterable[Tensor], group: ProcessGroup | None, bucket_bytes: int = 2**25) -> None:
    """Mean of each gradient over the ranks of a group, in place; a parameter without one counts as zeros.

    Args:
        parameters: the same on all ranks of the group, in the same order.
        group: the ranks; None is all of them.
        bucket_bytes: gradients of one dtype travel together in buckets of about this size.
    """
    ranks = dist.get_world_size(group)
    if ranks == 1:
        return
    buckets: list[list[Tensor]] = []
    size = 0
    for parameter in parameters:
        if not parameter.requires_grad:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        grad = local_part(parameter.grad.detach())
        if not buckets or size + grad.nbytes > bucket_bytes or buckets[-1][0].dtype != grad.dtype:
            buckets.append([])
            size = 0
        buckets[-1].append(grad)
        size += grad.nbytes
    under_way = []
    for bucket in buckets:
        flat = torch.cat([grad.reshape(-1) for grad in bucket])
        flat /= ranks  # before the sum, which could overflow in half precision
        work = explained(
            lambda flat=flat: dist.all_reduce(flat, group=group, async_op=True), "the all-reduce of gradients", group
        )
        under_way.append((bucket, flat, work))
    for bucket, flat, work in under_way:
        explained(work.wait, "the all-reduce of gradients", group)
        for grad, mean in zip(bucket, flat.split([grad.numel() for grad in bucket]), strict=True):
            grad.copy_(mean.view_as(grad))


@torch.no_grad()
def share_overflow(grads: Iterable[Tensor | None], *groups: ProcessGroup | None) -> None:
    """Where a gradient is not finite on one rank, make one infinite on all of them.

    Args:
        grads: plain tensors, or None; other ranks may have others, but those of one rank are all None only where those
            of all ranks are.
        *groups: the ranks, None is all of them; or the dimensions of a grid of ranks.
    """
    there = [grad for grad in grads if grad is not None]
    if not there:
        return
    bad = torch.stack([~torch.isfinite(grad).all() for grad in there]).any().float()
    all_reduce(bad, "overflows", *groups, op=dist.ReduceOp.MAX)
    first = there[0][(0,) * there[0].dim()]  # a view, whatever the strides
    first += torch.where(bad > 0, torch.inf, 0.0).to(first.dtype)


class SharedOverflow:
    """What a layer's plain experts go through on their way to work under autocast to float16, where gradients overflow.

    ``torch.amp.GradScaler``, which is for autocast, looks at plain tensors on each rank alone: without this the rank of
    the expert that overflows would skip a step that the others take, and router and attention would drift apart. (An
    overflow of anything else reaches all ranks with the gradients that data parallelism averages.)

    Args:
        *groups: those of the layer's dispatcher.
    """

    def __init__(self, *groups: ProcessGroup) -> None:
        self.groups = groups

    def __deepcopy__(self, memo: Any) -> SharedOverflow:
        return self

    def __reduce__(self) -> Any:
        """In a file, or another process, experts know of no ranks: None is left."""
        return type(None), ()

    def __call__(self, parameters: Sequence[Tensor]) -> Sequence[Tensor]:
        """The parameters, whose gradients backward looks through together; as they are without that autocast."""
        kind = parameters[0].device.type
        half = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
        return self._looked_through(parameters) if half else parameters

    @outside_graphs
    def _looked_through(self, parameters: Sequence[Tensor]) -> Sequence[Tensor]:
        return _SharedOverflow.apply(self.groups, *parameters)


class _SharedOverflow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, groups: Sequence[ProcessGroup], *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.groups = groups
        ctx.set_materialize_grads(False)
        return tuple(parameter.view_as(parameter) for parameter in parameters)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        share_overflow(grads, *ctx.groups)  # None where frozen, on all ranks alike: they have agreed on that
        return None, *grads


class _EndOfBackward:
    """Calls a function once at the end of every backward that gives one of some parameters a gradient.

    Args:
        parameters: those that are frozen now are not waited for.
        finish: what is called, by the thread that runs the backward.
    """

    def __init__(self, parameters: Iterable[Tensor], finish: Callable[[], None]) -> None:
        self._finish, self._last = finish, -1
        self.handles = [
            parameter.register_post_accumulate_grad_hook(self._on_gradient)
            for parameter in parameters
            if parameter.requires_grad
        ]

    def _on_gradient(self, parameter: Tensor) -> None:
        backward = torch._C._current_graph_task_id()  # a flag would stay up where a backward breaks off
        if backward != self._last:
            self._last = backward
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)


class ExpertGradients:
    """What the experts' gradients need at the end of every backward that DDP synchronises.

    They are averaged over their replicas. And where they are plain tensors, which a scaler looks at on each rank alone,
    the ranks share whether any is not finite; of ``DTensor`` PyTorch's own knows that they are parts of a whole.

    Args:
        module: the model, wrapped in ``DistributedDataParallel``.
        parameters: the experts'. Those that are frozen now have no gradients to wait for; unfreeze, then wrap.
        replicas: the ranks that hold the same experts; None where this one alone does.
        everyone: all ranks that train the model.
    """

    def __init__(
        self,
        module: nn.parallel.DistributedDataParallel,
        parameters: list[nn.Parameter],
        replicas: ProcessGroup | None,
        everyone: ProcessGroup,
    ) -> None:
        self._module, self._parameters = module, parameters
        self._replicas, self._everyone = replicas, everyone
        self._plain = [parameter for parameter in parameters if not hasattr(parameter, "to_local")]
        if not self._plain and (replicas is None or dist.get_world_size(replicas) == 1):
            return
        _EndOfBackward(parameters, self._finish)

    def _finish(self) -> None:
        if not self._module.require_backward_grad_sync:
            return
        if self._replicas is not None:
            average_gradients(self._parameters, self._replicas)
        share_overflow((parameter.grad for parameter in self._plain), self._everyone)


def average_in_backward(model: nn.Module, process_group: ProcessGroup | None = None) -> list[Any]:
    """Let every backward leave the mean over ranks in the gradients of what every rank has, without a wrapper.

    For models that cannot be wrapped, as their methods are called (``generate``) and their names are saved. It waits
    for the end of backward, then averages all at once: :func:`data_parallel` averages while backward still runs.
    Several backwards may add up before a step: what is averaged already is equal on all ranks, and stays what it is.

    Experts of expert-parallel layers are left alone: their gradients cover the tokens of all their ranks already. None
    of them may be held twice: of those :func:`data_parallel` and :func:`fully_shard_experts` know.

    Args:
        model: the same on all ranks but for its experts. Parameters that are frozen now do not begin a round.
        process_group: all ranks that train it; None is all ranks.

    Returns:
        The hooks, each with ``remove()``.

    Raises:
        ValueError: experts that are on more than one of these ranks.
    """
    parameters, experts = split_parameters(model)
    if experts:
        for _, dispatcher in dispatchers(model):
            if dispatcher.num_ranks != dist.get_world_size(process_group):
                raise ValueError(
                    "average_in_backward: expected experts that are shared by all "
                    f"{dist.get_world_size(process_group)} ranks, got {dispatcher.num_ranks} that share them: wrap the "
                    "model by data_parallel"
                )

    def finish() -> None:
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        if not trained:
            return
        there = torch.tensor([p.grad is not None for p in trained], dtype=torch.int32, device=trained[0].device)
        all_reduce(there, "who has gradients", process_group, op=dist.ReduceOp.MAX)
        # What no rank used keeps no gradient: an optimizer passes it over, as in one process.
        average_gradients([p for p, used in zip(trained, there.tolist(), strict=True) if used], process_group)

    for module in model.modules():
        if hasattr(module, "bias_ranks") and module.bias_ranks is None:
            module.bias_ranks = LoadOfRanks(dist.group.WORLD if process_group is None else process_group)
    return _EndOfBackward(parameters, finish).handles


def data_parallel(
    model: nn.Module,
    *,
    process_group: ProcessGroup | None = None,
    expert_replicas: ProcessGroup | None = None,
    **ddp_options: Any,
) -> nn.parallel.DistributedDataParallel:
    """``DistributedDataParallel`` that leaves expert-parallel experts out of its all-reduce.

    Everything else is averaged over ``process_group`` as ever. The experts' gradients already sum over the tokens of
    their expert-parallel ranks, scaled by the config's ``expert_grad_scale``; over ``expert_replicas`` they are
    averaged here, when backward ends (not inside ``no_sync()``). One that is not finite, and no ``DTensor``, is made so
    on every rank: a scaler, or a loop that skips bad steps, then decides alike on all of them. Selection biases of
    routers follow the load of all ranks of ``process_group`` from then on.

    Args:
        model: with layers built with ``ep_group``; without any this is plain DDP.
        process_group: all ranks that train the model; None is all ranks.
        expert_replicas: the ranks that hold the same experts as this one: with a mesh ``("replicas", "ep")`` that is
            ``mesh["replicas"].get_group()``. None when each expert is held once.
        **ddp_options: of ``DistributedDataParallel``.

    Raises:
        ValueError: experts that are left alone, or replicas that do not add up to all ranks.
    """
    everyone: Any = dist.group.WORLD if process_group is None else process_group
    if exclude_experts(model):
        _check_replicas(model, process_group, expert_replicas)
    for module in model.modules():
        if hasattr(module, "bias_ranks") and module.bias_ranks is None:
            module.bias_ranks = LoadOfRanks(everyone)
    wrapped = nn.parallel.DistributedDataParallel(model, process_group=process_group, **ddp_options)
    if experts := split_parameters(model)[1]:
        ExpertGradients(wrapped, experts, expert_replicas, everyone)
    return wrapped


def exclude_experts(model: nn.Module) -> list[str]:
    """Let ``DistributedDataParallel`` leave alone what other ranks have others of, and all who go by its mark.

    :func:`data_parallel` does this by itself. Frameworks that copy a model's state from the first rank to all others
    without wrapping it, as Lightning before a validation, look at the same mark.

    Args:
        model: that is wrapped, or copied.

    Returns:
        Names of parameters and buffers that are left alone.
    """
    experts = [name for name, parameter in model.named_parameters() if is_sharded(parameter)]
    names = [*experts, *_buffers_of_experts(model)]
    if names:
        nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    return names


def dispatchers(model: nn.Module) -> list[tuple[nn.Module, AllToAllDispatcher]]:
    """Every expert-parallel layer of a model with its dispatcher."""
    found = [(module, getattr(module, "dispatcher", None)) for module in model.modules()]
    return [(module, held) for module, held in found if isinstance(held, AllToAllDispatcher)]


def experts_of(layer: Any) -> Any:
    """The experts of a layer, also where an adapter stands in their place, with the experts inside."""
    return next(module for module in layer.experts.modules() if hasattr(module, "owned"))


def _buffers_of_experts(model: nn.Module) -> list[str]:
    """Names of buffers of experts that other ranks have others of, such as weights that are codes."""
    held = [(name, module) for name, module in model.named_modules() if getattr(module, "distributed", False)]
    return [f"{name}.{buffer}".lstrip(".") for name, module in held for buffer, _ in module.named_buffers()]


def _check_replicas(model: nn.Module, process_group: ProcessGroup | None, expert_replicas: ProcessGroup | None) -> None:
    ranks = dist.get_world_size(process_group)
    replicas = 1 if expert_replicas is None else dist.get_world_size(expert_replicas)
    for _, dispatcher in dispatchers(model):
        if dispatcher.num_ranks * replicas != ranks:
            raise ValueError(
                f"data_parallel: expert_replicas: expected a group of {ranks} / {dispatcher.num_ranks} ranks, those "
                f"that hold the same experts, as {ranks} ranks train the model and {dispatcher.num_ranks} share its "
                f"experts; got {'None' if expert_replicas is None else f'a group of {replicas}'}"
            )
        if expert_replicas is not None:
            both = set(dispatcher.ranks) & set(dist.get_process_group_ranks(expert_replicas))
            if both != {dist.get_rank()}:
                raise ValueError(
                    "data_parallel: expert_replicas: expected ranks that hold the same experts, of which this rank is "
                    f"the only one in its expert-parallel group, got a group that shares ranks {sorted(both)} with it"
                )
