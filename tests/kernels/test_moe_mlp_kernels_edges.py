"""The expert MLP's Triton kernels at the edges of everything: guarded memory, and what one sick expert or token may
touch. A few fixed calls that between them take every branch, small blocks, and another tiling for each kernel."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers import assert_as_accurate, interpreted, nudged, without_generated_products
from moe_mlp_cases import build
from moe_mlp_kernel_cases import NAMES, in_reference, small_blocks, widened

from dmoe import plan_token_choice
from dmoe.activations import NAMES as ACTIVATIONS
from dmoe.ops._moe_mlp_call import Call
from dmoe.ops.moe_mlp_cuda import moe_mlp_backward_cuda, moe_mlp_cuda, moe_mlp_inference_cuda
from dmoe.ops.moe_mlp_ref import moe_mlp_ref
from dmoe.ops.tile_table import tile_table

interpreter = pytest.importorskip("triton.runtime.interpreter")
pytestmark = interpreted

BASE = {"tokens": 21, "experts": 3, "top_k": 2, "hidden": 48, "sizes": 32, "activation": "silu", "gated": True,
        "bias": False, "gate_on": "output", "layout": "packed", "hot": False, "seed": 5, "dropout": 0.0, "shift": 0,
        "dtype": torch.float16, "tiling": (32, 16, 2, 32, 2)}  # fmt: skip
CALLS = {
    "even": {},
    "odd plain": {"hidden": 33, "sizes": 31, "gated": False, "activation": "gelu", "bias": True, "gate_on": "input",
                  "layout": "padded", "dtype": torch.float32, "tiling": (16, 16, 1, 16, 3)},
    "masked": {"hidden": 64, "sizes": 72, "activation": "gelu_tanh", "bias": True, "gate_on": "activation",
               "layout": "binned", "dropout": 0.3, "tiling": (64, 32, 8, 32, 2)},
    "masked plain": {"hidden": 70, "sizes": 64, "gated": False, "activation": "relu", "bias": True,
                     "layout": "capacity", "dropout": 0.3, "dtype": torch.float32, "tiling": (64, 32, 4, 16, 2)},
    "descriptors that overhang": {"hidden": 40, "sizes": 24, "bias": True, "gate_on": "input", "dropout": 0.3,
                                  "layout": "padded", "tiling": (16, 32, 2, 32, 3)},
    "not aligned": {"hidden": 40, "sizes": 24, "bias": True, "gated": False, "layout": "padded", "hot": True,
                    "shift": 1},
}  # fmt: skip
BAND = 256  # numbers on either side, more than a row


class Guards:
    """Tensors in the middle of larger ones, which nobody may touch; NaN (of integers -7) where nobody wrote."""

    def __init__(self, shift):
        self.shift, self.buffers = shift, []

    def empty(self, shape, dtype):
        size = math.prod(shape)
        nothing = math.nan if dtype.is_floating_point else -7
        buffer = torch.full((size + 2 * BAND,), nothing, dtype=dtype)
        inner = buffer[BAND + self.shift : BAND + self.shift + size]
        self.buffers.append((buffer, inner))
        return inner.view(shape)

    def around(self, value):
        return self.empty(value.shape, value.dtype).copy_(value) if isinstance(value, torch.Tensor) else value

    def check(self, pointers, mask):
        """Every active address lies in one of the tensors."""
        addresses = np.unique(pointers[np.broadcast_to(mask, pointers.shape)].astype(np.int64))
        inner = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for _, t in self.buffers if t.numel())
        starts, ends = np.array(inner, dtype=np.int64).T
        owner = np.searchsorted(starts, addresses, side="right") - 1
        assert ((owner >= 0) & (addresses < ends[owner])).all(), "a kernel touches memory outside of every tensor"


@pytest.fixture
def guards(monkeypatch):
    """Installs guards around whatever the host code allocates; call it with how far from alignment that is."""

    def install(shift):
        made = Guards(shift)
        new_empty = torch.Tensor.new_empty

        def guarded(like, size, *, dtype=None, **options):
            if options:  # not ours: the interpreter makes some
                return new_empty(like, size, dtype=dtype, **options)
            return made.empty((size,) if isinstance(size, int) else size, dtype or like.dtype)

        monkeypatch.setattr(torch.Tensor, "new_empty", guarded)
        monkeypatch.setattr(torch, "empty_like", lambda like: guarded(like, like.shape))
        real = interpreter._interpreter

        class Watched:
            def __getattr__(self, name):
                return getattr(real, name)

            def load(self, pointers, mask, other, dtype):
                made.check(pointers, mask)
                return real.load(pointers, mask, other, dtype)

            def store(self, pointers, value, mask):
                made.check(pointers, mask)
                return real.store(pointers, value, mask)

        # Where a load has a mask and no value for what it leaves out, a GPU gives anything.
        masked = interpreter.InterpreterBuilder.create_masked_load

        def without_mercy(builder, pointers, mask, other, *policies, **named):
            assert other is not None or mask.data.all(), "a masked load leaves numbers undefined"
            return masked(builder, pointers, mask, other, *policies, **named)

        monkeypatch.setattr(interpreter, "_interpreter", Watched())
        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", without_mercy)
        return made

    return install


def drawn(name):
    """The call, a gradient of y, and the tiling."""
    case = {**BASE, **CALLS[name]}
    arguments, grad, _, _ = build(case, case["dtype"])
    for i in (2, 3):  # outputs of order 1
        arguments[i] = arguments[i] / arguments[i].shape[-1] ** 0.5
    call = Call(*arguments)
    tiles, by_load = tile_table(call.expert_offsets, call.row_to_token.shape[0], 16)
    call = call._replace(
        residual=torch.randn_like(call.x),
        tiles=tiles,
        experts_by_load=by_load,
        tile_rows=16,
        seed=torch.tensor(-(2**63) + 12345) if case["dropout"] else None,
        activation_dropout=case["dropout"],
        expert_dropout=case["dropout"] / 2,
    )
    return call, grad, dict(zip(("block_n", "block_k", "parts", "block_m", "group"), case["tiling"], strict=True))


def run(call, grad, tiling):
    """y, all gradients, and the pre-activation."""
    with small_blocks(**tiling):
        y, pre = moe_mlp_cuda(*call)
        return [y, *moe_mlp_backward_cuda(grad, pre, True, *call)], pre


@without_generated_products
@pytest.mark.parametrize("name", CALLS)
def test_results_between_guards(name, guards):
    """Right, and no kernel reads or writes anything but its tensors; so with main gradients."""
    call, grad, tiling = drawn(name)
    exact = in_reference(widened(call), grad.double())
    own = [(in_reference(call, grad), exact)]
    for _ in range(3):
        moved, other = Call(*map(nudged, call[:6]), *call[6:]), nudged(grad)
        own.append((in_reference(moved, other), in_reference(widened(moved), other.double())))
    around = guards(CALLS[name].get("shift", 0))
    guarded = Call(*map(around.around, call))
    ours, pre = run(guarded, around.around(grad), tiling)
    buffers = [around.around(torch.full_like(w, 2.0, dtype=torch.float32)) for w in (call.up_proj, call.down_proj)]
    with small_blocks(**tiling):
        into = guarded._replace(up_main_grad=buffers[0], down_main_grad=buffers[1])
        moe_mlp_backward_cuda(around.around(grad), pre, True, *into)
    for buffer, gradient in zip(buffers, exact[3:5], strict=True):
        slack = 20 * torch.finfo(call.x.dtype).eps * (1 + gradient.abs().max())
        assert ((buffer - 2 - gradient).abs() <= slack).all()
    for i, which in enumerate(("y", *NAMES)):
        factor = 6 if which == "gate_weights" and call.x.dtype == torch.float16 else 3
        assert_as_accurate(which, ours[i], exact[i], [(a[i], b[i]) for a, b in own], factor=factor, slack_ulp=4)

    # The pre-activation of rows without a token is 0, as in the reference.
    used = int(call.expert_offsets[-1])
    holes = (call.row_to_token < 0)[:used]
    assert not pre[:used][holes].any()
    if call.gate_weight_on != "input":  # else the reference rounds w x, and the kernel w (W x)
        plain, wide = moe_mlp_ref(*call)[1][:used], moe_mlp_ref(*widened(call))[1][:used]
        assert_as_accurate("pre", pre[:used], wide, [(plain, wide)], factor=3, slack_ulp=4)


@pytest.mark.parametrize("name", ["even", "descriptors that overhang"])
def test_a_sick_expert_or_token_spoils_only_its_own(name):
    """Tiles overhang into the next expert's weights and rows: these are read, and never used."""
    call, grad, tiling = drawn(name)
    call = call._replace(activation_dropout=0.0, expert_dropout=0.0)
    healthy, _ = run(call, grad, tiling)
    assignments = call.token_rows.long()
    tokens = call.row_to_token[assignments.clamp(min=0)].long().masked_fill(assignments < 0, -1)
    experts = torch.searchsorted(call.expert_offsets[1:].contiguous(), assignments.int(), right=True)
    experts = experts.masked_fill(assignments < 0, -1)

    weights = {name: tensor.clone() for name in NAMES[2:] if (tensor := getattr(call, name)) is not None}
    for tensor in weights.values():
        tensor[1] = math.nan
    x, other = call.x.clone(), grad.clone()
    x[3] = other[3] = math.nan
    assert len(tokens[experts == 1].unique()) < len(x)
    assert len(experts[tokens == 3].unique()) < call.num_experts
    for spoiled, given, touched in ((weights, grad, experts == 1), ({"x": x}, other, tokens == 3)):
        ours, _ = run(call._replace(**spoiled), given, tiling)
        well_token, well_expert = torch.ones(len(x), dtype=torch.bool), torch.ones(call.num_experts, dtype=torch.bool)
        well_token[tokens[touched]] = False
        well_expert[experts[touched]] = False
        well = [well_token, well_token, ~touched, *[well_expert] * 5]
        for which, a, b, part in zip(("y", *NAMES), ours, healthy, well, strict=True):
            if a.numel():
                a, b = (a.flatten(), b.flatten()) if which == "gate_weights" else (a, b)
                assert torch.equal(a[part], b[part]), which


@pytest.mark.parametrize(("tokens", "capacity"), [(0, None), (1, None), (3, 0)])
def test_no_token_and_one_and_no_row(tokens, capacity):
    arguments, grad, indices, _ = build({**BASE, "tokens": tokens, "bias": True}, torch.float32)
    if capacity is not None:
        plan = plan_token_choice(torch.tensor(indices), BASE["experts"], capacity=capacity)
        index = ("expert_offsets", "row_to_token", "row_to_slot", "token_offsets", "token_rows")
        arguments = list(Call(*arguments)._replace(**{name: getattr(plan, name) for name in index}))
        assert not plan.num_rows
    y, pre = moe_mlp_cuda(*arguments)
    assert torch.equal(moe_mlp_inference_cuda(*arguments), y)
    ours, theirs = [y, *moe_mlp_backward_cuda(grad, pre, True, *arguments)], in_reference(Call(*arguments), grad)
    for which, a, b in zip(("y", *NAMES), ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=lambda m, name=which: f"{name}: {m}")


@pytest.mark.parametrize("weighed", [False, True])
def test_combine_of_rows_wider_than_a_block(weighed):
    """Integers, so exactly; tokens of 0 to 5 assignments, one dropped, three parts of the gate weights' gradient."""
    from dmoe.kernels.moe_mlp_rows import combine
    from dmoe.kernels.operands import Rows

    torch.manual_seed(0)
    width, offsets = 1500, torch.tensor([0, 2, 2, 3, 8], dtype=torch.int32)
    token_rows = torch.tensor([3, 0, 6, 1, 4, 2, 8, 5], dtype=torch.int32)
    token_rows[4] = -1
    values, gates = torch.randint(-9, 9, (9, width)).float(), torch.randint(1, 9, (8,)).float()
    residual, parts = torch.randint(-9, 9, (4, width)).float(), torch.randint(-9, 9, (3, 9)).float()
    nothing = torch.empty(0, dtype=torch.int32)
    rows = Rows(nothing, nothing, 16, nothing, num_rows=9, token_offsets=offsets, token_rows=token_rows)
    out, guarded = torch.empty(4, width), torch.full((16,), math.nan)
    gate_grads = guarded[:8]
    combine(values, gates if weighed else None, residual, out, rows, row_grads=parts, gate_grads=gate_grads)
    expected = residual.clone()
    for token in range(4):
        for j in range(int(offsets[token]), int(offsets[token + 1])):
            if token_rows[j] >= 0:
                expected[token] += values[token_rows[j]] * (gates[j] if weighed else 1)
    assert torch.equal(out, expected)
    assert guarded[8:].isnan().all()
    assert torch.equal(gate_grads, parts.sum(0)[token_rows.clamp(min=0).long()] * (token_rows >= 0))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_passes_through_every_activation(activation):
    """A NaN pre-activation gives NaN, not 0: relu as well."""
    call, _, tiling = drawn("masked plain")
    token = int(call.row_to_token.max())  # one that has a row
    call.x[token] = math.nan
    call = call._replace(activation=activation, activation_dropout=0.0, expert_dropout=0.0)
    with small_blocks(**tiling):
        y = moe_mlp_inference_cuda(*call)
    assert y[token].isnan().all()
    assert y[torch.arange(len(y)) != token].isfinite().all()


@pytest.mark.parametrize("gathered", ["a", "b", "neither"])
@pytest.mark.parametrize("sick", [None, 3, 5])
def test_the_last_step_of_a_weight_gradient_ends_at_the_experts_last_row(gathered, sick):
    """With whole steps by the copy engine: less than one, exactly one, one and a bit; holes; and nobody else's rows.

    Integers, so exactly. Behind the last expert's rows, and in a sick expert's, lies NaN.
    """
    from dmoe.kernels.moe_mlp import weight_grad
    from dmoe.kernels.operands import Rows

    torch.manual_seed(0)
    counts = [0, 1, 15, 16, 17, 33, 40, 2]
    offsets = torch.tensor([0, *np.cumsum(counts)], dtype=torch.int32)
    used, num_rows, tokens = int(offsets[-1]), int(offsets[-1]) + 20, 50
    of_row = torch.randint(0, tokens, (num_rows,), dtype=torch.int32)
    of_row[::7] = -1
    values = {name: torch.randint(-4, 5, (num_rows, width)).half() for name, width in (("a", 48), ("b", 40))}
    for tensor in values.values():
        tensor[of_row < 0] = 0
    picked = dict(values)
    if gathered != "neither":
        values[gathered] = torch.randint(-4, 5, (tokens, values[gathered].shape[1])).half()
        picked[gathered] = values[gathered][of_row.clamp(min=0).long()] * (of_row >= 0)[:, None]
        values[gathered][0] = math.nan  # nobody's, but what a row without a token could read
        picked[gathered][of_row == 0] = 0
        of_row[of_row == 0] = -1
    for name in {"a", "b"} - {gathered}:
        values[name][of_row < 0] = 0
        picked[name] = values[name].clone()
        values[name][used:] = math.nan
        if sick is not None:
            values[name][offsets[sick] : offsets[sick + 1]] = math.nan
    nothing = torch.empty((0, 2), dtype=torch.int32)
    rows = Rows(nothing, torch.arange(8, dtype=torch.int32), 16, offsets, num_rows, row_to_token=of_row)
    out = torch.full((8, 48, 40), math.nan)
    with small_blocks(block_n=16, block_k=16, parts=2, block_m=16, group=1):
        weight_grad(values["a"], values["b"], out, rows, gather_a=gathered == "a", gather_b=gathered == "b")
    for expert in range(8):
        mine = slice(int(offsets[expert]), int(offsets[expert + 1]))
        if expert == sick:
            assert out[expert].isnan().all()
        else:
            assert torch.equal(out[expert], picked["a"][mine].float().T @ picked["b"][mine].float()), expert
