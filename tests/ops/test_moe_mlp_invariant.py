"""``moe_mlp_invariant``: what ``moe_mlp`` computes, in every layout; its rows' bits are ``tests/layer``'s subject."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from moe_mlp_cases import build, cases

from dmoe.ops._library import compiled

pytestmark = pytest.mark.skipif(not compiled, reason="csrc/ was not built, and nothing else promises it")
OPS = torch.ops.dmoe


@settings(max_examples=80)
@given(case=cases())
def test_it_is_the_operation_in_another_order(case):
    arguments, grad, _, _ = build(case, torch.float64)
    y, pre = OPS.moe_mlp_invariant(*arguments)
    expected, its_pre = OPS.moe_mlp(*arguments)
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(pre, its_pre, rtol=1e-11, atol=1e-11)
    assert torch.equal(OPS.moe_mlp_invariant_inference(*arguments), y)
    grads = OPS.moe_mlp_invariant_backward(grad, pre, True, *arguments)
    for mine, theirs in zip(grads, OPS.moe_mlp_backward(grad, pre, True, *arguments), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


@settings(max_examples=40)
@given(case=cases())
def test_narrow_dtypes_round_a_weighted_row_once_more(case):
    for dtype, tolerance in ((torch.float32, 3e-5), (torch.bfloat16, 6e-2), (torch.float16, 1e-2)):
        arguments, _, _, _ = build(case, dtype)
        y, expected = OPS.moe_mlp_invariant(*arguments)[0], OPS.moe_mlp(*arguments)[0]
        assert (y.double() - expected.double()).norm() <= tolerance * expected.double().norm() + 1e-6


def opcheck_cases():
    base = {"tokens": 6, "experts": 3, "top_k": 2, "hidden": 5, "sizes": 4, "activation": "silu", "gated": True,
            "bias": False, "gate_on": "output", "layout": "packed", "hot": False, "seed": 1}  # fmt: skip
    for change in ({}, {"bias": True, "gated": False}, {"sizes": [3, 1, 4]}, {"tokens": 0}):
        yield {**base, **change}


@pytest.mark.parametrize("case", list(opcheck_cases()), ids=str)
def test_opcheck(case):
    arguments, grad, _, _ = build(case, torch.float32)
    for tensor in arguments[:6]:
        if tensor is not None:
            tensor.requires_grad_()
    torch.library.opcheck(OPS.moe_mlp_invariant.default, arguments)
    torch.library.opcheck(OPS.moe_mlp_invariant_lean.default, arguments)
    detached = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments]
    torch.library.opcheck(OPS.moe_mlp_invariant_inference.default, detached)
    _, pre = OPS.moe_mlp_invariant(*detached)
    torch.library.opcheck(OPS.moe_mlp_invariant_backward.default, [grad, pre, True, *detached])
