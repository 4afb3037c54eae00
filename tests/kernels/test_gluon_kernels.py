"""The Gluon kernels' own source, emulated: results against the reference, and faults of synchronisation."""

from __future__ import annotations

import gluon_emulator
import pytest
import torch
from gluon_calls import make_call, with_slots
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from dmoe.ops.moe_mlp import moe_mlp_cuda
from dmoe.ops.moe_mlp_cuda import moe_mlp_backward_cuda
from dmoe.ops.moe_mlp_ref import moe_mlp_backward_ref, moe_mlp_ref
from dmoe.ops.tile_table import tile_table

pytest.importorskip("triton.experimental.gluon")
moe_mlp = pytest.importorskip("dmoe.kernels.moe_mlp")
gluon_moe_mlp = pytest.importorskip("dmoe.kernels.gluon_moe_mlp")

OURS = ["up", "rows", "hidden_grad", "weight_grad", "rows", "weight_grad"]


@pytest.fixture(autouse=True)
def _three_multiprocessors(monkeypatch):
    """Asked for; and few programs, so that each walks several tiles."""
    monkeypatch.setenv("DMOE_GLUON", "1")
    monkeypatch.setattr(gluon_moe_mlp, "multiprocessors", lambda device: 3)


def check(call, seed=0, changes=None, kernels=OURS):
    """Forward and backward, emulated, against the reference in float16's own arithmetic."""
    grad = torch.randn_like(call.x)
    with gluon_emulator.emulating(seed, changes) as names:
        y, pre = moe_mlp_cuda(*call)
        grads = moe_mlp_backward_cuda(grad, pre, True, *call)
    assert names == [f"gluon_{kernel}_kernel" for kernel in kernels]
    expected_y, expected_pre = moe_mlp_ref(*call)
    rows = int(call.expert_offsets[-1])
    kept = torch.cat([pre[:rows], torch.zeros_like(pre[rows:])])  # from this, as relu's slope jumps at 0
    expected = [expected_y, expected_pre[:rows], *moe_mlp_backward_ref(grad, kept, True, *call)]
    titles = ("y", "pre", "x", "gate_weights", "up", "down", "up_bias", "down_bias", "gate")
    for name, got, wanted in zip(titles, [y, pre[:rows], *grads], expected, strict=True):
        if wanted.numel():
            scale = wanted.float().abs().max().item()
            torch.testing.assert_close(
                got.float(), wanted.float(), rtol=4e-3, atol=4e-3 * scale, msg=lambda text, name=name: f"{name}: {text}"
            )
    holes = call.row_to_token[:rows] < 0
    assert not pre[:rows][holes].any()


@settings(max_examples=12, phases=[Phase.explicit, Phase.reuse, Phase.generate])  # smaller cases would take minutes
@given(data=st.data())
def test_forward_and_backward_as_the_reference(data):
    counts = st.sampled_from([0, 1, 63, 64, 65, 128, 129, 200])
    sizes = st.sampled_from([64, 72, 136, 200, 264])
    gated = data.draw(st.booleans())
    call = make_call(
        data.draw(st.integers(0, 99)),
        counts=data.draw(st.lists(counts, min_size=1, max_size=4).filter(any)),
        hidden=data.draw(sizes),
        ffn=data.draw(sizes),
        gated=gated,
        bias=data.draw(st.booleans()),
        activation=data.draw(st.sampled_from(["silu", "relu", "relu_squared", "sigmoid", "gelu_tanh"])),
    )
    check(call, seed=data.draw(st.integers(0, 99)))


def test_many_tiles_for_each_program_and_rows_of_no_token():
    check(make_call(counts=(300, 0, 515, 90, 40, 128), hidden=264, ffn=328, holes=60))


def test_more_experts_than_one_chunk_of_the_count():
    check(make_call(counts=[0, 0, 1, 2] * 40, hidden=64, ffn=64))


@pytest.mark.parametrize("seed", range(8))
def test_any_order_of_turns(seed):
    check(make_call(counts=(140, 20), hidden=392, ffn=64), seed=seed)


def test_nan_in_rows_that_do_not_count_does_not_leak():
    """Tokens that nobody chose, rows behind the last expert's end, and both operands where a row holds no token."""
    call = make_call(counts=(150, 0, 70), hidden=136, ffn=72, holes=30)
    rows = int(call.expert_offsets[-1])
    used = call.row_to_token[:rows]
    x, grad = call.x.clone(), torch.randn_like(call.x)
    call = call._replace(row_to_token=torch.where(call.row_to_token == 0, 1, call.row_to_token), x=x)
    call = with_slots(call)
    x[0] = torch.nan  # what rows of no token read
    grad[0] = torch.nan
    with gluon_emulator.emulating():
        y, pre = moe_mlp_cuda(*call)
        pre[rows:] = torch.nan
        grads = moe_mlp_backward_cuda(grad, pre, True, *call)
    assert (used < 0).any()
    for tensor in (y[1:], pre[:rows], *grads[2:4]):
        assert not tensor.isnan().any()
    a, b = torch.randn(rows, 136).half(), torch.randn(rows, 72).half()
    a[used < 0], b[used < 0] = torch.nan, torch.nan
    out, index = torch.empty(3, 136, 72).half(), moe_mlp.Rows(
        call.tiles, call.experts_by_load, 128, call.expert_offsets, rows, call.row_to_token
    )  # fmt: skip
    with gluon_emulator.emulating() as names:
        moe_mlp.weight_grad(a, b, out, index)
    assert names == ["gluon_weight_grad_kernel"]
    assert not out.isnan().any()


def test_main_grads_are_added_to():
    call = make_call(hidden=72, ffn=64)
    buffers = [torch.randn(*w.shape) for w in (call.up_proj, call.down_proj)]
    before = [buffer.clone() for buffer in buffers]
    grad = torch.randn_like(call.x)
    into = call._replace(up_main_grad=buffers[0], down_main_grad=buffers[1])
    with gluon_emulator.emulating():
        _, pre = moe_mlp_cuda(*call)
        apart = moe_mlp_backward_cuda(grad, pre, True, *call)
        moe_mlp_backward_cuda(grad, pre, True, *into)
    for buffer, start, alone in zip(buffers, before, apart[2:4], strict=True):
        torch.testing.assert_close(buffer - start, alone.float(), rtol=2e-3, atol=2e-3)


# What each breaks, and what is found out: the tests above would, too, but not by name.
BROKEN = {
    "the producer waits for the phase that is": (
        {"gathering_producer": ("& 1 ^ 1", "& 1")}, "deadlock"),
    "the producer does not wait": (
        {"gathering_producer": ("mbarrier.wait(empty.index(stage), (done // STAGES) & 1 ^ 1)", "pass")},
        "overwrites|arrivals"),
    "a phase is one step early": (
        {"multiply": ("(done // STAGES) & 1)", "((done + 1) // STAGES) & 1)")}, "does not know|deadlock"),
    "a stage is never released": (
        {"multiply": ("pred=step > 0", "pred=step > 1")}, "deadlock"),
    "the last stage is not released": (
        {"multiply": ("pred=steps > 0", "pred=False")}, "deadlock"),
    "the second group is never let in": ({"multiply": ("pred=done == SKEW", "pred=done == 999")}, "deadlock"),
    "a stage is released while it is read": (
        {"multiply": ("empty.index((done + STAGES - 1) % STAGES), count=1, pred=step > 0",
                      "empty.index(done % STAGES), count=1, pred=step >= 0")}, "may still be reading|arrivals"),
    "no fence between cp.async and wgmma": ({"multiply": ("if FENCE:", "if False:")}, "proxy fence"),
    "no fence after the barriers are made": ({"new_barriers": ("fence_async_shared()", "pass")}, "initialised"),
    "gate and up are swapped": (
        {"_up_consumer": ("act(gate.to(gl.float32), ACTIVATION) * up", "act(up.to(gl.float32), ACTIVATION) * gate")},
        "y: "),
    "rows behind the end are stored": ({"_rows_consumer": ("(rows < end)[:, None]", "(rows < end + 1)[:, None]")},
                                       "stored twice|outside|y: "),
    "rows of no token are not cleared": (
        {"_finished": ("real[:, None]", "(real | True)[:, None]")}, "pre: |assert not"),
    "rows behind the end are summed": (
        {"_gathering_producer": ("mask=rows + BLOCK_K < end", "mask=rows + BLOCK_K < end + 9")}, "up: |down: "),
    "a tile is left out": ({"count_tiles": ("TILE_ROWS - 1", "0")}, "pre: |y: "),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_found_out(name):
    changes, told = BROKEN[name]
    call = make_call(counts=(150, 40, 129), hidden=456, ffn=136, holes=20)
    with pytest.raises(AssertionError, match=told):
        check(call, changes=changes)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ["silu", "relu", "relu_squared", "sigmoid", "gelu_tanh"])
def test_every_activation_of_theirs(activation, gated):
    check(make_call(counts=(70, 3), hidden=72, ffn=136, gated=gated, activation=activation))


@pytest.mark.parametrize(
    "fields",
    [
        {"activation": "gelu"},
        {"gate_weight_on": "input"},
        {"tile_rows": 64},
        {"hidden": 60},
        {"ffn": 68},
    ],
)
def test_what_they_do_not_serve_goes_to_the_twin(fields):
    call = make_call(**{"hidden": 136, "ffn": 72, **fields})
    if "tile_rows" in fields:
        tiles, by_load = tile_table(call.expert_offsets, call.row_to_token.shape[0], 64)
        call = call._replace(tiles=tiles, experts_by_load=by_load)
    with gluon_emulator.emulating() as names:
        moe_mlp_cuda(*call)
    assert "gluon_up_kernel" not in names


def test_off_unless_asked_for(monkeypatch):
    monkeypatch.delenv("DMOE_GLUON")
    with gluon_emulator.emulating() as names:
        moe_mlp_cuda(*make_call(hidden=64, ffn=64, counts=(16,)))
    assert not names
