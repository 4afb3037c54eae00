"""What lets megatron-core train without CUDA, in the processes of its tests and nowhere else.

:func:`install` comes before the first import of Megatron, :func:`patch_megatron` after. Each stands in for something
that Megatron takes from CUDA without asking; nothing of it touches what is compared.
"""

from __future__ import annotations

import copy
import multiprocessing
import os
import queue
import sys
import typing
import warnings

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


def _is_cuda(device):
    return str(device).startswith("cuda") if isinstance(device, str | torch.device) else False


class _OnTheCpu(TorchFunctionMode):
    """``device="cuda"`` is the CPU, and ``.cuda()`` changes nothing."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.Tensor.cuda:
            return args[0]
        if function is torch.Tensor.type and len(args) == 1 and not kwargs:
            return function(*args).replace("torch.", "torch.cuda.", 1)  # optimizers look for "torch.cuda.FloatTensor"
        if _is_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": CPU}
        if function is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], CPU, *args[2:])
        return function(*args, **kwargs)


class _Nothing:
    """A stream or an event: everything may be called on it, and nothing happens."""

    def __init__(self, *args, **kwargs):
        pass

    def __getattr__(self, name):
        return lambda *args, **kwargs: _Nothing()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        return False


def install():
    """Before Megatron is imported."""
    if not hasattr(typing, "override"):  # Python 3.11, for megatron-core from 0.17 on
        typing.override = lambda method: method
    if unzipped := os.environ.get("MEGATRON_WHEEL"):  # a release that pip does not install here, see megatron_wheel.sh
        sys.path.insert(0, unzipped)
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    warnings.filterwarnings("ignore", module=r"megatron\..*")
    if torch.cuda.is_available():
        return
    _OnTheCpu().__enter__()
    cuda, nothing = torch.cuda, _Nothing()
    cuda.current_device = lambda: CPU
    cuda.synchronize = lambda *args, **kwargs: None
    cuda.current_stream = lambda *args, **kwargs: nothing
    cuda.Stream = cuda.Event = _Nothing
    cuda.stream = lambda stream: _Nothing()
    cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    cuda.manual_seed = lambda seed: torch.manual_seed(seed)


def patch_megatron():
    """After Megatron is imported."""
    if torch.cuda.is_available():
        return
    import megatron.core.tensor_parallel.random as random
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.transformer.moe import moe_utils, token_dispatcher
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # 0.16.1 asks for it where Transformer Engine is absent
    token_dispatcher.maybe_move_tensor_to_cpu = _to_host
    # Checkpoints are written by forks, which a daemon may not have, and a queue that takes a process of its own.
    multiprocessing.current_process()._config["daemon"] = False
    filesystem_async._results_queue = queue.Queue()
    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    if getattr(WrappedTorchNorm, "patched_for_tests", False):
        return
    plain = WrappedTorchNorm.__new__

    def new(cls, config, *args, **kwargs):
        """PyTorch's norm refuses sequence parallelism, which only asks for a mark on its parameters."""
        without = copy.copy(config)
        without.sequence_parallel = False
        norm = plain(cls, without, *args, **kwargs)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm

    WrappedTorchNorm.__new__ = staticmethod(new)
    WrappedTorchNorm.patched_for_tests = True


def _to_host(tensor, as_numpy=False, record_stream=False):
    """Sizes of an all-to-all have to become numbers on the CPU, too."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor
