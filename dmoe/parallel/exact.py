"""Static shapes without a lost token: a step whose rows did not fit somewhere is done again, everywhere, without bound.

::

    step()  static  --> rows without room, summed over all ranks --> 0: done
                                                                 --> else: put all back, step() without a bound

Forward and backward of the first run wait for nothing. One number for each rank is summed behind it, which is the one
thing that the host waits for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from dmoe.parallel.collectives import explained
from dmoe.parallel.gradients import dispatchers
from dmoe.parallel.overflow import Overflow, static
from dmoe.parallel.step_state import StepState

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")


@dataclass(frozen=True)
class ExactStep(Generic[T]):
    """What :func:`exact_step` returns.

    Attributes:
        result: what the step returned, of its last run.
        reran: whether it ran a second time, on every rank alike.
        rows_dropped: rows that had no room in the first run, over all layers and ranks, forwards that a checkpoint
            does again counted again.
    """

    result: T
    reran: bool
    rows_dropped: int


def exact_step(
    step: Callable[[], T],
    model: nn.Module,
    *,
    process_group: ProcessGroup | None = None,
    rerun: Callable[[], T] | None = None,
    generators: Iterable[torch.Generator] = (),
    gradients_are_zero: bool = False,
) -> ExactStep[T]:
    """Run a step in the static mode, and again in the dynamic one where a layer of any rank had no room for its rows.

    For layers with ``max_rows_received`` and ``on_overflow="rerun"``, which are static in here and nowhere else. The
    bits of outputs, gradients, buffers and random numbers are those of the dynamic mode, whichever run they are from::

        for batch in batches:
            done = dmoe.parallel.exact_step(lambda: forward_and_backward(ddp, batch), ddp)
            reruns += done.reran
            dmoe.parallel.clip_grad_norm(ddp, 1.0)
            optimizer.step()
            optimizer.zero_grad()

    Before a second run generators, buffers, gradients, and the layers' losses and metrics are put back as they were:
    :class:`dmoe.parallel.step_state.StepState` says what that costs in memory. All else that ``step`` changes it has to
    do alike twice: it takes its batch from outside, makes leaves that are no parameters of ``model`` itself, and leaves
    unscaling, clipping, the optimizer's step and the selection bias to its caller. Micro-batches belong inside, all of
    them: one sum over ranks, and no gradient to copy.

    In a first step under ``DistributedDataParallel`` nothing is static: the buckets that it lays out behind it decide
    in which order gradients are summed, and a second run would have others.

    Args:
        step: forward and backward, any number of each; or forward alone, as in evaluation.
        model: all that ``step`` runs, wrapped as it runs it.
        process_group: all ranks that train or run the model, replicas and stages too; None is all ranks. Each of them
            calls this, also one without such a layer.
        rerun: what runs the second time, as ``step`` does but that it replays no CUDA graph captured in the static
            mode; None is ``step``.
        generators: further ones that ``step`` draws from, beside PyTorch's default ones and Python's ``random``.
        gradients_are_zero: whether gradients that are there, ``main_grad`` above all, are zeros now, so that no copy
            has to be made.

    Raises:
        ValueError: a layer whose rows beyond the bound are dropped, or gradients that FSDP holds back.
        RuntimeError: on every rank: ``step`` wrote to parameters, or its second run was static (a CUDA graph). A call
            inside another.
    """
    overflows = _overflows(model)
    if any(each.static for each in overflows):
        raise RuntimeError("exact_step: expected no call inside another, got one from within its step")
    if _buckets_to_come(model):
        return ExactStep(step(), False, 0)
    before = StepState(model, generators, gradients_are_zero=gradients_are_zero)
    with static(overflows):
        result = step()
    rows, writers = _over_ranks(model, overflows, process_group, before.parameters_changed)
    if writers:
        raise RuntimeError(
            "exact_step: step: expected forward and backward alone, which could be done again, got one that wrote to "
            f"parameters on {writers} ranks: call the optimizer after exact_step"
        )
    if not rows:
        return ExactStep(result, False, 0)
    del result  # and the graph that it may hold
    before.restore()
    for each in overflows:
        each.clear()
    result = (step if rerun is None else rerun)()
    again, _ = _over_ranks(model, overflows, process_group, False)
    if again:
        raise RuntimeError(
            "exact_step: step: expected a second run in the dynamic mode, got one that was static, as the replay of a "
            "CUDA graph is: give the same without a graph as rerun"
        )
    return ExactStep(result, True, rows)


def _overflows(model: nn.Module) -> list[Overflow]:
    """What counts the rows of the layers, each once."""
    found = {id(held.overflow): held for _, held in dispatchers(model) if held.max_rows_received is not None}
    if any(held.overflow.on_overflow == "drop" for held in found.values()):
        raise ValueError(
            "exact_step: model: expected layers with on_overflow='rerun', got one with max_rows_received that drops "
            "what is beyond"
        )
    for layer, held in dispatchers(model):
        held.overflow.compacts = _draws_by_row(layer)
    return [held.overflow for held in found.values()]


def _draws_by_row(layer: Any) -> bool:
    """Whether a layer's experts, or adapters beside them, have dropout, which draws by a row's place among all."""
    experts = getattr(layer, "experts", None)
    if experts is None:  # somebody's own, of whom nothing is known
        return True
    configs = [config for module in experts.modules() if (config := getattr(module, "config", None)) is not None]
    names = ("activation_dropout", "expert_dropout", "dropout")
    return any(getattr(config, name, 0) for config in configs for name in names)


def _over_ranks(
    model: nn.Module, overflows: list[Overflow], group: ProcessGroup | None, changed: bool
) -> tuple[int, int]:
    """Rows without room, and ranks that wrote to parameters, over all ranks: what the host waits for."""
    counted = [each.rows for each in overflows if each.rows is not None]
    device = counted[0].device if counted else _device(model)
    rows = torch.stack([each.to(device) for each in counted]).sum() if counted else torch.zeros((), device=device)
    flags = torch.stack([rows.long(), torch.full_like(rows, int(changed), dtype=torch.int64)])
    if dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1:
        what = "the all-reduce of overflows"
        work: Any = explained(lambda: dist.all_reduce(flags, group=group, async_op=True), what, group)
        explained(work.wait, what, group)
    there, writers = flags.tolist()
    return there, writers


def _device(model: nn.Module) -> torch.device:
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def _buckets_to_come(model: nn.Module) -> bool:
    """Whether DDP will lay out its buckets after the next backward; where it can now, it does so here."""
    to_come = False
    for module in model.modules():
        if not isinstance(module, nn.parallel.DistributedDataParallel) or not torch.is_grad_enabled():
            continue
        settled = module.find_unused_parameters and not module.static_graph  # they stay as they are
        if settled or module._has_rebuilt_buckets:
            continue
        module._has_rebuilt_buckets = module.reducer._rebuild_buckets()  # as DDP's next forward would
        to_come = to_come or not module._has_rebuilt_buckets
    return to_come
