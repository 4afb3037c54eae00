"""Thin products (csrc/few_rows.cpp): as exact as float32 sums rounded once, on each level of instructions."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import few_rows_cases
import pytest
import torch
from few_rows_cases import DTYPES, LEVELS, added, excess, offsets_of, product, random, weight_gradient
from hypothesis import given, settings
from hypothesis import strategies as st
from patience import PATIENCE

from dmoe.functional import ExpertWeights, moe_mlp
from dmoe.ops._library import compiled
from dmoe.ops.grouped_gemm import grouped_gemm

counts = st.integers(0, 18) | st.sampled_from([31, 32, 33, 40])
sizes = st.integers(1, 80) | st.sampled_from([255, 257, 1025])


@pytest.mark.skipif(not compiled, reason="promised of the compiled library; csrc/ is not built")
@pytest.mark.parametrize("level", LEVELS if platform.machine() == "x86_64" else ["as it comes"])
def test_every_level_sums_in_float32_and_rounds_once(level):
    program = Path(few_rows_cases.__file__)
    path = os.pathsep.join([str(program.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | LEVELS[level] | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == []


@given(rows=counts, inner=sizes, columns=sizes, dtype=st.sampled_from(DTYPES), trans_b=st.booleans())
@settings(max_examples=60, deadline=None)
def test_so_do_other_sizes(rows, inner, columns, dtype, trans_b):
    for shape in ((rows, inner, columns), (inner, rows, columns), (columns, inner, rows)):
        assert product(*shape, dtype, trans_b) <= 1
        assert added(*shape, dtype, trans_b) <= 1
        assert weight_gradient(*shape, dtype) <= 1


def test_the_bound_sees_a_sum_that_is_rounded_twice():
    a, b = (random(*shape, dtype=torch.bfloat16, seed=1) for shape in ((4, 64), (64, 50)))
    assert excess((a.double() @ b.double()).float().bfloat16(), a, b) <= 1
    halves = a[:, :32] @ b[:32] + a[:, 32:] @ b[32:]
    assert excess(halves, a, b) > 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("trans_b", [True, False])
@pytest.mark.parametrize(("rows", "inner", "columns"), [*((n, 37, 45) for n in (1, 2, 3, 6)), (45, 37, 3), (45, 5, 37)])
def test_nan_stays_in_its_row_and_its_column(rows, inner, columns, trans_b, dtype):
    a = random(rows, inner, dtype=dtype, seed=1)
    b = random(1, columns, inner, dtype=dtype, seed=2)
    a[-1, -1], b[0, -1, 0] = torch.nan, torch.nan
    got = grouped_gemm(a, b if trans_b else b.mT.contiguous(), offsets_of([rows]), trans_b=trans_b)
    expected = torch.zeros(rows, columns, dtype=torch.bool)
    expected[-1], expected[:, -1] = True, True
    assert torch.equal(got.isnan(), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("trans_b", [True, False])
def test_infinities_and_numbers_below_the_smallest_normal_one(trans_b, dtype):
    """In float16 both have bit patterns of their own."""
    tiny = torch.finfo(torch.float16).smallest_normal / 4
    a = torch.tensor([[1.0, 0.0], [0.0, 1024.0], [1.0, 1.0]]).to(dtype)
    b = torch.tensor([[torch.inf, -torch.inf, 1.0], [tiny, 0.0, -tiny]]).to(dtype)
    got = grouped_gemm(a, (b.T if trans_b else b).contiguous()[None], offsets_of([3]), trans_b=trans_b)
    torch.testing.assert_close(got, (a.double() @ b.double()).to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.skipif(not compiled, reason="promised of the compiled library; csrc/ is not built")
@pytest.mark.parametrize("trans_b", [True, False])
def test_a_float32_row_has_the_same_bits_among_few_others(trans_b):
    a, b = (random(*shape, dtype=torch.float32, seed=n) for n, shape in enumerate([(4, 300), (1, 300, 130)]))
    b = b.mT.contiguous() if trans_b else b
    alone = torch.cat([grouped_gemm(row[None], b, offsets_of([1]), trans_b=trans_b) for row in a])
    for rows in (2, 3, 4):
        assert torch.equal(grouped_gemm(a[:rows], b, offsets_of([rows]), trans_b=trans_b), alone[:rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_a_few_tokens_and_their_gradients(tokens, transposed, dtype):
    """Experts of one row and of several, and experts of none, whose gradients are zero."""
    E, F, H, K = 5, 37, 45, 2
    x, gates = random(tokens, H, dtype=dtype, seed=0), random(tokens, K, dtype=torch.float32, seed=1)
    up, down = random(E, 2, F, H, dtype=dtype, seed=2), random(E, H, F, dtype=dtype, seed=3)
    indices = torch.stack([torch.ones(tokens, dtype=torch.long), torch.arange(tokens) % 2 * 2], 1)
    grad = random(tokens, H, dtype=dtype, seed=4)
    if transposed:
        up, down = (weight.mT.contiguous().mT for weight in (up, down))
    leaves = [tensor.requires_grad_() for tensor in (x, gates, up, down)]
    y = moe_mlp(x, indices, gates, ExpertWeights(up, down))
    got = [y, *torch.autograd.grad(y, leaves, grad)]
    assert not got[3][3:].any()
    assert not got[4][3:].any()

    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    wide = torch.zeros(tokens, H, dtype=torch.float64)
    for t in range(tokens):
        for k in range(K):
            gate, value = exact[2][indices[t, k]] @ exact[0][t]
            hidden = torch.nn.functional.silu(gate) * value
            wide[t] += exact[1][t, k] * (exact[3][indices[t, k]] @ hidden)
    expected = [wide, *torch.autograd.grad(wide, exact, grad.double(), allow_unused=True)] if tokens else [wide]
    tolerance = 2e-6 if dtype == torch.float32 else 1e-2  # of the norm: four roundings of 2e-3 in bfloat16
    for one, truth in zip(got, expected, strict=bool(tokens)):
        assert (one.double() - truth).norm() <= tolerance * truth.norm()
