"""The parts that kernels share, each on its own: how many tiles there are, the short sigmoid, what is compiled anew."""

from __future__ import annotations

import math
import os

import pytest
import torch
from kernel_cases import expert_mlp

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
pieces = pytest.importorskip("dmoe.kernels._pieces")

from dmoe.activations import kind_and_numbers  # noqa: E402
from dmoe.ops.activation import activate, activate_backward  # noqa: E402  # behind the check for Triton
from dmoe.ops.tile_table import tile_table  # noqa: E402

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


@triton.jit
def _count(offsets, out, num_experts, most, BLOCK_M: tl.constexpr):
    tl.store(out, pieces.count_tiles(offsets, num_experts, most, BLOCK_M))


@pytest.mark.parametrize("tile_rows", [16, 128])
@pytest.mark.parametrize("experts", [1, 2, 300, 1024, 1025, 5000])
def test_programs_count_the_tiles_of_the_table(experts, tile_rows):
    """With empty experts, and with nothing but empty ones; never beyond the table."""
    torch.manual_seed(experts)
    for most_rows in (0, 1, 300):
        rows = torch.randint(0, most_rows + 1, (experts,)) * (torch.rand(experts) < 0.7)
        offsets = torch.cat([torch.zeros(1), rows.cumsum(0)]).to(torch.int32)
        tiles, _ = tile_table(offsets, int(rows.sum()), tile_rows)
        wanted = int((-(-rows // tile_rows)).sum())
        assert wanted == int((tiles[:, 0] >= 0).sum())
        for bound in {len(tiles), wanted, max(wanted - 1, 0)}:
            out = torch.full((1,), -7, dtype=torch.int32, device=DEVICE)
            _count[(1,)](offsets.to(DEVICE), out, experts, bound, BLOCK_M=tile_rows)
            assert int(out) == min(wanted, bound)


@triton.jit
def _short(x, alone, value, slope, SIZE: tl.constexpr, ACTIVATION: tl.constexpr):
    at = tl.arange(0, SIZE)
    inputs = tl.load(x + at)
    both = pieces.act_slope(inputs, ACTIVATION, True)
    tl.store(alone + at, pieces.act(inputs, ACTIVATION, True))
    tl.store(value + at, both[0])
    tl.store(slope + at, both[1])


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "sigmoid"])
def test_short_activations_are_good_to_far_less_than_sixteen_bits_hold(activation):
    """Value to 2^-16 of itself wherever it is a number of the normal range, slope to 2^-14: bfloat16 rounds at 2^-9."""
    x = torch.cat([torch.linspace(-80, 80, 8192 - 2048), torch.linspace(-6, 6, 2048)]).to(DEVICE)
    alone, value, slope = (torch.empty_like(x) for _ in range(3))
    _short[(1,)](x, alone, value, slope, SIZE=len(x), ACTIVATION=activation)
    wide = x.double()  # PyTorch's own cancels in 1 + tanh
    inside = 1.5957691216057308 * (wide + 0.044715 * wide**3) if activation == "gelu_tanh" else wide
    exact = torch.sigmoid(inside) * (1 if activation == "sigmoid" else wide)
    # gelu_tanh's exponent goes with the cube of x, and so does its rounding
    relative = 2.0**-14 if activation == "gelu_tanh" else 2.0**-16
    for result in (alone, value):
        assert ((result - exact).abs() <= relative * exact.abs() + 1e-36).all()
    exact = activate_backward(torch.ones_like(x).double(), x.double(), activation, False)
    assert ((slope - exact).abs() <= 2.0**-14 * exact.abs().clamp(min=2.0**-10)).all()
    x.fill_(math.nan)
    _short[(1,)](x, alone, value, slope, SIZE=len(x), ACTIVATION=activation)
    assert all(result.isnan().all() for result in (alone, value, slope))


@triton.jit
def _of_both_halves(
    x,
    value,
    slope,
    factor,
    passed,
    SIZE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SHORT: tl.constexpr,
    P0: tl.constexpr,
    P1: tl.constexpr,
    P2: tl.constexpr,
):
    at = tl.arange(0, SIZE)
    inputs = tl.load(x + at)
    both = pieces.act_slope(inputs, ACTIVATION, SHORT, P0, P1, P2)
    alone = pieces.act(inputs, ACTIVATION, SHORT, P0, P1, P2)
    tl.store(value + at, tl.where(tl.abs(alone - both[0]) > 1e-6 * tl.abs(alone), 1e9, alone))
    tl.store(slope + at, both[1])
    tl.store(factor + at, pieces.up_act(inputs, ACTIVATION, SHORT, P0, P1, P2))
    tl.store(passed + at, pieces.through_up_act(inputs * 0.0 + 1.0, inputs, ACTIVATION, SHORT, P0, P1, P2))


@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize(
    "activation", ["clamped_swiglu(7.0,1.702,1.0)", "clamped_swiglu(10.0,1.0,0.0)", "softcapped_swiglu(4.0,25.0)"]
)
def test_activations_of_both_halves_over_their_whole_range(activation, short):
    """Both factors and their slopes, at the limits as well, and near 0, where a cap must not cost digits."""
    kind, numbers = kind_and_numbers(activation)
    line = torch.cat([torch.linspace(-80, 80, 4096 - 8), torch.tensor([7.0, -7, 10, -10, 0, -0.0, 7.25, -7.25])])
    near = torch.logspace(-6, 0, 2048)
    x = torch.cat([line, near, -near]).to(DEVICE)
    results = [torch.empty_like(x) for _ in range(4)]
    options = dict(zip(("P0", "P1", "P2"), (*numbers, 0.0, 0.0, 0.0), strict=False))
    _of_both_halves[(1,)](x, *results, SIZE=len(x), ACTIVATION=kind, SHORT=short, **options)
    wide, one = x.double(), torch.ones(len(x), 1, dtype=torch.float64, device=x.device)
    # What is made of (gate, up) = (x, 1) and (1, x), and the derivatives; 1 itself as a factor is divided out.
    unit = torch.stack([one[:, 0], one[:, 0]], 1)
    whole = activate(unit, activation, True)
    as_gate, as_up = torch.stack([wide, one[:, 0]], 1), torch.stack([one[:, 0], wide], 1)
    factor_of_1 = {"clamped_swiglu": 1 + numbers[-1], "softcapped_swiglu": numbers[1] * math.tanh(1 / numbers[1])}[kind]
    gate_of_1 = whole[:, 0] / factor_of_1
    exact = [
        activate(as_gate, activation, True)[:, 0] / factor_of_1,
        activate_backward(one, as_gate, activation, True)[:, 0] / factor_of_1,
        activate(as_up, activation, True)[:, 0] / gate_of_1,
        activate_backward(one, as_up, activation, True)[:, 1] / gate_of_1,
    ]
    relative = 2.0**-15 if short else 2.0**-17
    for got, right, floor in zip(results, exact, (1e-30, 0.25, 2.0**-20, 0.25), strict=True):  # slopes cancel
        exponential = (2 + 2 * wide.abs()) / 64  # its error is that of its argument
        assert ((got - right).abs() <= relative * exponential.clamp(min=1) * right.abs().clamp(min=floor)).all()
    x.fill_(math.nan)
    _of_both_halves[(1,)](x, *results, SIZE=len(x), ACTIVATION=kind, SHORT=short, **options)
    assert all(result.isnan().all() for result in results[:3])


def _ftz(x):
    return torch.where(x.abs() < 2.0**-126, torch.zeros_like(x), x)


def _emulated_sigmoid(x, exp_error, rcp_error):
    """``_sigmoid``'s four instructions, with the errors that the PTX manual allows to the two approximate ones."""
    t = x * torch.tensor(-1.4426950408889634, dtype=torch.float32)
    t = _ftz((torch.exp2(t.double()) * (1 + exp_error)).float())
    return _ftz((1.0 / (t + 1.0).double() * (1 + rcp_error)).float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_four_instructions_of_the_short_sigmoid_on_every_number(dtype):
    """SiLU of every 16-bit number rounds to within half a unit and a hair, of itself: for large negative ones, too.

    Errors of 2^-22 of the exponential and 2^-23 of the reciprocal, either way, are the manual's for ``ex2.approx.ftz``
    and ``rcp.approx.ftz``.
    """
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = every[every.isfinite()].float()
    exact = x.double() / (1 + torch.exp(-x.double()))
    slope = activate_backward(torch.ones_like(x).double(), x.double(), "silu", False)
    normal = (exact.abs() >= 2.0**-126) & (x > -87)  # below, both are zeros
    for exp_error in (-(2.0**-22), 2.0**-22):
        for rcp_error in (-(2.0**-23), 2.0**-23):
            s = _emulated_sigmoid(x, exp_error, rcp_error)
            value = x * s
            assert ((value - exact).abs() <= 2.0**-16 * exact.abs())[normal].all()
            assert (value.abs() <= 2.0**-118)[x <= -88].all()
            assert torch.equal(value.isnan(), torch.zeros_like(value, dtype=torch.bool))
            got = s * (1 + x.clamp(max=100) * (1 - s))
            assert ((got - slope).abs() <= 2.0**-14 * slope.abs().clamp(min=2.0**-10)).all()


def test_the_hyperbolic_tangent_would_not_do():
    """Why not one instruction: ``tanh.approx`` is good to 2^-11, and SiLU(-8) would be wrong by half of itself."""
    x = torch.tensor([-8.0, -5.0, 3.0], dtype=torch.float64)
    wrong = x * 0.5 * (1 + torch.tanh(x / 2) * (1 - 2.0**-11))
    exact = x * torch.sigmoid(x)
    assert (((wrong - exact) / exact).abs() > torch.tensor([0.5, 0.03, 0.0])).all()
    assert ((wrong - exact) / exact).abs()[2] < 2.0**-9


def _specialisation(tokens, **sizes):
    """What Triton would compile for each launch of forward and backward: kernel, types and constants."""
    from dmoe.kernels import offline

    found = []

    def note(kernel, grid, *arguments, **options):
        names = kernel.arg_names
        fixed = {n: v for n, v in options.items() if n != "enable_fp_fusion"}
        key = [kernel.__name__, tuple(sorted((n, str(v)) for n, v in fixed.items()))]
        function = getattr(kernel, "fn", kernel)
        free = _not_specialised(function.__module__, kernel.__name__)
        for name, value in zip(names, arguments, strict=False):
            if isinstance(value, int) and name not in free:
                key.append((name, "1" if value == 1 else value % 16 == 0))
        found.append(tuple(key))

    with offline.instead_of_launching(note):
        expert_mlp(tokens=tokens, **sizes)
    return found


def _not_specialised(module, name):
    """From the source: the interpreter's functions do not remember what they were decorated with."""
    import ast
    import importlib
    import inspect

    tree = ast.parse(inspect.getsource(importlib.import_module(module)))
    (function,) = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == name]
    keywords = [k for d in function.decorator_list if isinstance(d, ast.Call) for k in d.keywords]
    return {e.value for k in keywords if k.arg == "do_not_specialize" for e in k.value.elts}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dropout": 0.1, "bias": True},
        {"gate_weight_on": "input", "residual": True},
        {"ffn": 200, "weights": "megablocks"},
    ],
)
def test_another_number_of_tokens_compiles_nothing_anew(options):
    """Numbers of rows and tiles that are multiples of 16, or are not, or one: the same binaries."""
    sizes = {"hidden": 256, "ffn": 512, "experts": 7, "top_k": 3, **options}
    first = _specialisation(4096, **sizes)
    for tokens in (4097, 5003, 8192):
        assert _specialisation(tokens, **sizes) == first


def test_what_changes_with_the_tokens_is_declared_in_every_kernel():
    """By name: a kernel that takes one of these has to say so."""
    import ast
    from pathlib import Path

    changing = {
        *("num_rows", "num_tiles", "most_tiles", "num_tokens", "num_assignments", "row_blocks", "share", "blocks"),
        *("dense_per_matrix", "out_per_matrix", "per_matrix"),
    }
    seen = set()
    for path in Path(pieces.__file__).parent.glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            jitted = isinstance(node, ast.FunctionDef) and any(
                "triton.jit" in ast.unparse(d) for d in node.decorator_list
            )
            if not jitted or not any(a.annotation and "constexpr" in ast.unparse(a.annotation) for a in node.args.args):
                continue
            if node.name in ("place", "count_tiles", "plus_product"):  # parts of kernels, not launched
                continue
            mine = {a.arg for a in node.args.args if a.annotation is None} & changing
            assert mine <= _not_specialised(f"dmoe.kernels.{path.stem}", node.name), f"{path.name}: {node.name}"
            seen |= mine
    assert seen == changing
