"""The Gluon kernels on a Hopper GPU: right, the same every time, and no NaN from rows that do not count."""

from __future__ import annotations

import contextlib

import gluon_emulator
import pytest
import torch
from gluon_calls import make_call, with_slots
from gpu_helpers import DEVICE, there

from dmoe.ops._moe_mlp_call import Call
from dmoe.ops.moe_mlp import moe_mlp_cuda
from dmoe.ops.moe_mlp_cuda import moe_mlp_backward_cuda
from dmoe.ops.moe_mlp_ref import moe_mlp_backward_ref, moe_mlp_ref

pytestmark = pytest.mark.gpu
pytest.importorskip("triton.experimental.gluon")
# Enough tiles that every program walks several, and long sums; in a rehearsal enough to see the test work.
SMALL = DEVICE.type != "cuda"
MANY = (130, 20, 0) if SMALL else (3000, 129, 0, 1, 2500, 128, 700, 64, *[257] * 56)


@pytest.fixture(autouse=True)
def _on_hopper(monkeypatch):
    if DEVICE.type == "cuda" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("these kernels are for Hopper")
    monkeypatch.setenv("DMOE_GLUON", "1")


def both_ways(call, grad):
    """y, the pre-activation and all gradients."""
    with contextlib.ExitStack() as stack:
        if DEVICE.type != "cuda":
            stack.enter_context(gluon_emulator.emulating())
        y, pre = moe_mlp_cuda(*call)
        pre[int(call.expert_offsets[-1]) :] = 0
        return [y, pre, *moe_mlp_backward_cuda(grad, pre, True, *call)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "fields",
    [
        {"hidden": 1024, "ffn": 512},
        {"hidden": 1048, "ffn": 776, "bias": True, "holes": 90},
        {"hidden": 512, "ffn": 256, "gated": False, "activation": "relu"},
        {"hidden": 72, "ffn": 64, "activation": "gelu_tanh"},
    ],
)
def test_as_the_reference(fields, dtype):
    if SMALL:
        fields = {**fields, "hidden": min(fields["hidden"], 136), "ffn": min(fields["ffn"], 136)}
    call = Call(*there(list(make_call(counts=MANY, dtype=dtype, tokens=90 if SMALL else 4000, **fields))))
    grad = torch.randn_like(call.x)
    ours = both_ways(call, grad)
    wide = Call(*(v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for v in call))
    y, pre = moe_mlp_ref(*wide)
    rows = int(call.expert_offsets[-1])
    expected = [y, pre, *moe_mlp_backward_ref(grad.double(), ours[1].double(), True, *wide)]
    for name, got, wanted in zip(
        ("y", "pre", "x", "gate", "up", "down", "b_up", "b_down", "g"), ours, expected, strict=True
    ):
        if wanted.numel():
            got, wanted = (got[:rows], wanted[:rows]) if name == "pre" else (got, wanted)
            bound = torch.finfo(dtype).eps * 4 * wanted.abs().max()
            assert (got.double() - wanted).abs().max() <= bound, name
    for _ in range(1 if SMALL else 20):  # a race would show as another result
        for once, again in zip(ours, both_ways(call, grad), strict=True):
            assert torch.equal(once, again)


def test_nan_in_tokens_that_nobody_chose_stays_there():
    call = make_call(counts=MANY, hidden=136, ffn=136, holes=60, tokens=90 if SMALL else 4000)
    call = with_slots(call._replace(row_to_token=torch.where(call.row_to_token == 0, 1, call.row_to_token)))
    call.x[0] = torch.nan  # what rows of no token read
    call = Call(*there(list(call)))
    grad = torch.randn_like(call.x)
    grad[0] = torch.nan
    y, pre, _, _, up, down, *_ = both_ways(call, grad)
    for tensor in (y[1:], pre, up, down):
        assert not tensor.isnan().any()
