"""What torchtitan 0.3 finds missing on a machine: calls of a newer PyTorch, and an accelerator."""

from __future__ import annotations

import os
import sys
import types
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

# Modules that have taken the device from torchtitan.tools.utils for good.
_READERS = ("torchtitan.distributed.parallel_dims", "torchtitan.distributed.utils", "torchtitan.components.metrics")


def fit_torch() -> None:
    """Give ``torch.distributed`` the public ``set_timeout`` that torchtitan calls, where PyTorch (to 2.13) has none.

    It is PyTorch's own function under the name that it has there. Where it is there already, nothing happens.
    """
    if not hasattr(dist, "set_timeout"):
        dist.set_timeout = dist.distributed_c10d._set_pg_timeout  # type: ignore[attr-defined]


class _Processor(types.SimpleNamespace):
    """``torch.cpu``, and what torchtitan asks of ``torch.cuda`` beyond that."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)

    def get_device_name(self, device: Any = None) -> str:
        return "CPU"

    def get_device_properties(self, device: Any = None) -> Any:
        return types.SimpleNamespace(total_memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))

    def current_device(self) -> int:
        return 0

    def memory_stats(self, device: Any = None) -> dict[str, int]:
        return {}

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        pass

    def empty_cache(self) -> None:
        pass


def run_on_cpu() -> None:
    """Let torchtitan's ``Trainer`` run on the CPU, over gloo; call it before anything of torchtitan is imported.

    torchtitan takes "cuda" where it finds no accelerator. This names the CPU instead, and lets FSDP2 reduce gradients
    by plain sums (its own ``set_force_sum_reduction_for_comms``), as gloo knows no sum with a factor, which is 1 here.
    CUDA graphs have to be off (``training.disable_cuda_graphs``), and attention one that the CPU can train:
    ``ScaledDotProductAttention``.

    Raises:
        RuntimeError: the trainer, or another module that has asked for the device, is imported already.
    """
    import torchtitan.tools.utils as utils

    if utils.device_type == "cpu":
        return
    late = [name for name in _READERS if name in sys.modules]
    if late:
        raise RuntimeError(f"run_on_cpu: expected to be called before {late[0]} is imported, got a call after that")
    utils.device_type, utils.device_module = "cpu", _Processor()
    divide = FSDPModule.set_gradient_divide_factor

    def by_plain_sums(module: FSDPModule, factor: float) -> None:
        divide(module, factor)
        module.set_force_sum_reduction_for_comms(True)

    FSDPModule.set_gradient_divide_factor = by_plain_sums  # type: ignore[method-assign,assignment]
