"""What several test files share: tolerances that come from measured errors, and small builders."""

from __future__ import annotations

import contextlib

import torch

from dmoe.config import MoEConfig


def assert_as_accurate(name, actual, exact, plains, *, slack_ulp=2.0):
    """|actual - exact| <= 2 * (plain PyTorch's own error) + 2 ulp, in the max norm.

    ``plains`` are results of the same arithmetic in the same dtype in several orders of summation: one alone may be
    exact by luck.
    """
    assert actual.shape == exact.shape, f"{name}: {tuple(actual.shape)} != {tuple(exact.shape)}"
    if not exact.numel():
        return
    assert torch.isfinite(actual).all(), f"{name}: not finite"
    error = (actual.double() - exact).abs().max().item()
    own = max((plain.double() - exact).abs().max().item() for plain in plains)
    bound = 2 * own + slack_ulp * torch.finfo(actual.dtype).eps * exact.abs().max().item()
    assert error <= bound, f"{name}: error {error:.3e} > {bound:.3e} (plain PyTorch's own: {own:.3e})"


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


def small_config(**fields):
    base = {"hidden_size": 8, "ffn_hidden_size": 12, "num_experts": 4, "top_k": 2}
    return MoEConfig(**{**base, **fields})
