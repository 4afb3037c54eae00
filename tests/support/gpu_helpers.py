"""What the GPU tests share. ``DMOE_TEST_DEVICE=cpu`` rehearses them on the CPU, where a test has a meaning there."""

from __future__ import annotations

import os

import pytest
import torch

DEVICE = torch.device(os.environ.get("DMOE_TEST_DEVICE", "cuda"))

cuda_only = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs CUDA itself, not a rehearsal on the CPU")


def there(value):
    """Tensors on the device, everything else as it is; lists and tuples item by item."""
    if isinstance(value, torch.Tensor):
        return value.to(DEVICE)
    if isinstance(value, list | tuple):
        return type(value)(there(item) for item in value)
    return value


def leaf_there(tensor):
    """A leaf of its own on the device, to ask gradients of."""
    return tensor.detach().to(DEVICE).clone().requires_grad_()


def here(value):
    """Tensors on the CPU, likewise."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    if isinstance(value, list | tuple):
        return [here(item) for item in value]
    return value


def assert_equal_bits(name, got, expected):
    """Same dtype, shape and values, NaN equal to NaN; any nesting of lists."""
    if isinstance(expected, list | tuple):
        assert len(got) == len(expected), name
        for i, (one, other) in enumerate(zip(got, expected, strict=True)):
            assert_equal_bits(f"{name}[{i}]", one, other)
        return
    if not isinstance(expected, torch.Tensor):
        assert got == expected, name
        return
    got, expected = here(got), here(expected)
    assert got.dtype == expected.dtype, f"{name}: {got.dtype}, expected {expected.dtype}"
    assert got.shape == expected.shape, f"{name}: {tuple(got.shape)}, expected {tuple(expected.shape)}"
    same = (got == expected) | ((got != got) & (expected != expected))
    assert same.all(), (
        f"{name}: {int((~same).sum())} of {same.numel()} differ, first at {(~same).nonzero()[0].tolist()}"
    )
