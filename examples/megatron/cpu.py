"""What lets this example run on a machine without a GPU. Nothing of it is used where there is one.

megatron-core is written for CUDA devices: some of its functions make their small helper tensors on
``torch.cuda.current_device()`` or on ``device="cuda"``, and insist on gradients there. On the CPU the computation
itself is the same, so this example lets those few calls mean the CPU. A program of your own does not want this: it is a
way to try things out on a laptop.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


def let_cuda_mean_cpu() -> None:
    """For the rest of this process; to be called before models are built."""
    torch.cuda.current_device = lambda: CPU  # type: ignore[assignment, return-value]
    torch.cuda.synchronize = lambda device=None: None  # saving a checkpoint waits for copies
    torch.cuda.current_stream = lambda device=None: None  # type: ignore[assignment, return-value]
    _CudaMeansCpu().__enter__()


class _CudaMeansCpu(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):  # torch.zeros(1, device="cuda")
            kwargs["device"] = CPU
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:  # clipping asks for torch.cuda.FloatTensor
            return func(*args).replace("torch.", "torch.cuda.", 1)
        return func(*args, **kwargs)
