"""The activation over rows that are there: equal to plain autograd in float64, as accurate in narrower types."""

from __future__ import annotations

import pytest
import torch

import dmoe
from dmoe.ops._library import compiled
from dmoe.ops.row_activation import (
    row_activation,
    row_activation_backward,
    row_activation_backward_ref,
    row_activation_ref,
)

GATED = ["silu", "gelu", str(dmoe.ClampedSwiGLU(1.5)), str(dmoe.SoftcappedSwiGLU(2.0, 3.0)), "sigmoid", "relu_squared"]
CASES = [(name, True) for name in GATED] + [(name, False) for name in ("relu", "relu_squared", "gelu_tanh", "sigmoid")]


def plain(pre, activation, gated):
    """By PyTorch's own functions, differentiable."""
    gate, up = pre.chunk(2, 1) if gated else (pre, None)
    functional = torch.nn.functional
    if activation == GATED[2]:
        gate, up = gate.clamp(max=1.5), up.clamp(-1.5, 1.5) + 1
        return gate * torch.sigmoid(1.702 * gate) * up
    if activation == GATED[3]:
        return 2 * torch.tanh(gate / 2) * torch.sigmoid(gate) * 3 * torch.tanh(up / 3)
    value = {
        "silu": functional.silu,
        "gelu": functional.gelu,
        "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
        "relu": functional.relu,
        "relu_squared": lambda x: functional.relu(x).square(),
        "sigmoid": torch.sigmoid,
    }[activation](gate)
    return value if up is None else value * up


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("activation", "gated"), CASES)
@pytest.mark.parametrize("rows", [0, 1, 37])
def test_it_is_the_activation_and_its_gradient(activation, gated, scaled, rows):
    generator = torch.Generator().manual_seed(rows)
    pre = torch.randn(rows, 26, generator=generator, dtype=torch.float64).requires_grad_()
    scale = torch.rand(rows, generator=generator, dtype=torch.float64).requires_grad_() if scaled else None
    weight = 1.0 if scale is None else scale.unsqueeze(1)
    exact = plain(pre, activation, gated) * weight
    grad = torch.randn(exact.shape, generator=generator, dtype=torch.float64)
    wanted = torch.autograd.grad((exact * grad).sum(), [pre] if scale is None else [pre, scale])
    given = pre.detach(), None if scale is None else scale.detach(), activation, gated
    torch.testing.assert_close(row_activation(*given), exact.detach())
    grad_pre, hidden, dots = row_activation_backward(grad, *given)
    torch.testing.assert_close(grad_pre, wanted[0])
    torch.testing.assert_close(hidden, exact.detach())
    torch.testing.assert_close(dots, (plain(pre, activation, gated) * grad).sum(1).detach())
    if scale is not None:
        torch.testing.assert_close(dots, wanted[1])


@pytest.mark.skipif(not compiled, reason="the reference is what runs")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("activation", "gated"), CASES)
def test_what_is_compiled_rounds_once(activation, gated, dtype):
    pre, scale = (3 * torch.randn(29, 34)).to(dtype), torch.rand(29)
    grad = torch.randn(29, 17 if gated else 34).to(dtype)
    outputs = (
        row_activation(pre, scale, activation, gated),
        *row_activation_backward(grad, pre, scale, activation, gated),
    )
    wide = pre.double(), scale.double(), activation, gated
    exact = (row_activation_ref(*wide), *row_activation_backward_ref(grad.double(), *wide))
    for ours, truth in zip(outputs, exact, strict=True):
        bound = torch.finfo(ours.dtype).eps * truth.abs() + 64 * torch.finfo(torch.float32).eps * truth.abs().max()
        assert ((ours.double() - truth).abs() <= bound).all()


def test_opcheck_and_what_does_not_fit():
    pre, scale, grad = torch.randn(5, 8), torch.rand(5), torch.randn(5, 4)
    torch.library.opcheck(torch.ops.dmoe.row_activation.default, (pre, scale, "silu", True))
    torch.library.opcheck(torch.ops.dmoe.row_activation_backward.default, (grad, pre, None, "silu", True))
    if not compiled:
        return
    with pytest.raises(RuntimeError, match=r"row_activation: row_scale: expected 5 numbers, got shape \(4\)"):
        row_activation(pre, scale[:4], "silu", True)
    with pytest.raises(RuntimeError, match=r"row_activation: pre: expected \(R, 2 F\) with a gate, got \(5, 7\)"):
        row_activation(pre[:, :7].contiguous(), scale, "silu", True)
    with pytest.raises(RuntimeError, match=r"row_activation_backward: grad_hidden: expected \(5, 4\), got \(5, 3\)"):
        row_activation_backward(grad[:, :3].contiguous(), pre, scale, "silu", True)
    with pytest.raises(RuntimeError, match=r"activation: expected .* got swish"):
        row_activation(pre, scale, "swish", True)
