"""What several test files share: tolerances that come from measured errors, and small builders."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess

import pytest
import torch
import torch.distributed as dist
from patience import PATIENCE

from dmoe.config import MoEConfig


def assert_as_accurate(name, actual, exact, own, *, factor=2.0, slack_ulp=2.0, noise=0.0, summands=None):
    """|actual - exact| <= 2 * (plain PyTorch's own error) + 2 ulp, in the max norm.

    ``own`` are pairs (plain, exact) of the same arithmetic in plain PyTorch in the same dtype: for this input, and for
    copies of it that are slightly moved, because one result alone may be exact by luck. ``noise`` is an absolute bound
    for results that are differences of larger numbers, and may cancel to nothing. ``summands``, of the shape of
    ``exact``, are the sums of the magnitudes of what was added up: each addition rounds to an ulp of those, however
    little the sum leaves, so the ulp is theirs then.
    """
    assert actual.shape == exact.shape, f"{name}: {tuple(actual.shape)} != {tuple(exact.shape)}"
    if not exact.numel():
        return
    assert torch.isfinite(actual).all(), f"{name}: not finite"
    error = (actual.double() - exact).abs().max().item()
    yardstick = max((plain.double() - truth).abs().max().item() for plain, truth in own)
    # A handful of numbers has no statistics: their own error may be 0 by luck in every copy.
    if exact.numel() < 16:
        factor, slack_ulp = 2 * factor, 4 * slack_ulp
    size = (exact if summands is None else summands).abs().max().item()
    bound = noise + factor * yardstick + slack_ulp * torch.finfo(actual.dtype).eps * size
    assert error <= bound, f"{name}: error {error:.3e} > {bound:.3e} (plain PyTorch's own: {yardstick:.3e})"


without_generated_products = pytest.mark.usefixtures("_no_generated_products")
exchanges_without_values = pytest.mark.skipif(
    not (dist.is_available() and torch._C._dispatch_has_kernel_for_dispatch_key("c10d::alltoall_base_", "Meta")),
    reason="PyTorch 2.10 exchanges no tensors without values",
)


def nudged(tensor):
    """The same values, moved by up to 1%: other roundings."""
    return (
        None if tensor is None else (tensor.double() * (1 + 0.01 * (torch.rand(tensor.shape) - 0.5))).to(tensor.dtype)
    )


@contextlib.contextmanager
def on_threads(count):
    """PyTorch's threads, ``count`` of them for the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def saved_bytes(exclude=()):
    """Collects what autograd saves inside: ``.total`` bytes of distinct storages, those of ``exclude`` not counted."""

    class Count:
        def __init__(self):
            self.storages = {}

        @property
        def total(self):
            return sum(self.storages.values())

    count, skip = Count(), {t.untyped_storage().data_ptr() for t in exclude}
    keep = []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in skip:
            count.storages[storage.data_ptr()] = storage.nbytes()
            keep.append(tensor)  # alive, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield count


def where_kernels_run(function):
    """A CUDA implementation for tensors of the CPU: on the GPU where there is one, else here, under the interpreter."""
    if not torch.cuda.is_available():
        return function

    def moved(*arguments):
        results = function(*(a.cuda() if isinstance(a, torch.Tensor) else a for a in arguments))
        return results.cpu() if isinstance(results, torch.Tensor) else tuple(one.cpu() for one in results)

    return moved


def written_to_stderr(command, **how):
    """What a command writes to its standard error, as the pieces in which it does."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    here.settimeout(PATIENCE)
    with here:
        with there:
            process = subprocess.Popen(command, stderr=there, stdout=subprocess.DEVNULL, **how)
        pieces = list(iter(lambda: here.recv(65536).decode(), ""))
    process.wait(PATIENCE)
    return pieces


interpreted = pytest.mark.skipif(
    torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1",
    reason="would compile hundreds of kernels; test_gpu.py has them on a GPU, -m 'not gpu' interprets these",
)


def small_config(**fields):
    base = {"hidden_size": 8, "ffn_hidden_size": 12, "num_experts": 4, "top_k": 2}
    return MoEConfig(**{**base, **fields})
