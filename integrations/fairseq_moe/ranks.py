"""Several ranks: what fairseq's data parallelism and clipping have to know about experts that live elsewhere.

Backward gives each rank the gradients of its experts over the tokens of *all* ranks, divided by
``--moe-normalize-expert-grad``; fairseq must not average them over ranks, and its norm has to count each expert once.
``legacy_ddp`` looks for the mark ``.expert`` that dmoe sets; ``pytorch_ddp`` is told names.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from fairseq import utils
from fairseq.distributed import utils as distributed_utils
from torch import Tensor, nn

import dmoe


def leave_experts_to_themselves(model: nn.Module) -> None:
    """Have ``DistributedDataParallel`` skip the experts, if they are spread over ranks."""
    names = [name for name, parameter in model.named_parameters() if dmoe.is_expert_param(parameter)]
    if names and number_of_ranks() > 1:
        nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)


def number_of_ranks() -> int:
    """Processes that share the experts."""
    return distributed_utils.get_data_parallel_world_size() if dist.is_available() and dist.is_initialized() else 1


def register() -> None:
    """Have fairseq's optimizers clip by the norm of all gradients, experts included; a second call does nothing."""
    stock = utils.clip_grad_norm_
    if getattr(stock, "of_dmoe", False):
        return

    def clip_grad_norm_(
        params: Tensor | Iterable[Tensor], max_norm: float, aggregate_norm_fn: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        given = [params] if isinstance(params, Tensor) else list(params)
        experts = [p for p in given if dmoe.is_expert_param(p) and p.grad is not None]
        others = [p for p in given if not dmoe.is_expert_param(p)]
        if not any(dmoe.is_expert_param(p) for p in given):
            return stock(given, max_norm, aggregate_norm_fn)
        norm = stock(others, 0, aggregate_norm_fn)
        squared = torch.zeros_like(norm, dtype=torch.float32)
        if experts:
            norms = [torch.linalg.vector_norm(p.grad, dtype=torch.float32) for p in experts]
            squared = torch.stack(norms).square().sum().to(squared.device)
        if number_of_ranks() > 1:
            dist.all_reduce(squared, group=distributed_utils.get_data_parallel_group())
        norm = (norm.float().square() + squared).sqrt()
        if max_norm > 0:
            factor = (float(max_norm) / (norm + 1e-6)).clamp(max=1)
            for parameter in given:
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)
        return norm

    clip_grad_norm_.of_dmoe = True  # type: ignore[attr-defined]
    utils.clip_grad_norm_ = clip_grad_norm_


class ExchangeTimer:
    """Time a layer spends in dispatch and combine, for ``--record-a2a-perf-stats``.

    Host time is measured around the calls, packing and waiting included; device time by CUDA events around them.

    Args:
        dispatcher: an ``AllToAllDispatcher``, whose calls are timed from now on.
    """

    _CALLS = ("start_dispatch", "finish_dispatch", "combine")

    def __init__(self, dispatcher: Any) -> None:
        self._host, self._events = 0.0, list[tuple[Any, Any]]()
        for name in self._CALLS:
            setattr(dispatcher, name, self._timed(getattr(dispatcher, name)))

    def take(self) -> tuple[float, float]:
        """Milliseconds of the host and of the device since the last call; waits for the device."""
        host, events = self._host, self._events
        self._host, self._events = 0.0, []
        if not events:
            return host, 0.0
        torch.cuda.synchronize()
        return host, sum(start.elapsed_time(end) for start, end in events)

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            on_device = torch.cuda.is_available() and torch.cuda.is_initialized()
            events = tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) if on_device else None
            start = time.perf_counter()
            if events:
                events[0].record()
            result = call(*args, **kwargs)
            if events:
                events[1].record()
                self._events.append((events[0], events[1]))
            self._host += 1000 * (time.perf_counter() - start)
            return result

        return timed
