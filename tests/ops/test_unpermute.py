"""unpermute: the weighted sum over a token's rows, and its gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_cases import PlanCase, make_plan, plan_cases

from dmoe.ops.permute import _unpermute_backward, permute, unpermute, unpermute_backward_ref, unpermute_ref

IMPLEMENTATIONS = pytest.mark.parametrize("op", [unpermute, unpermute_ref], ids=["op", "ref"])
BACKWARDS = pytest.mark.parametrize("op", [_unpermute_backward, unpermute_backward_ref], ids=["op", "ref"])
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])


def plan_of(case: PlanCase) -> tuple[torch.Tensor, ...]:
    return case.row_to_token, case.row_to_slot, case.token_offsets, case.token_rows


def integers(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """From -4 to 4, so that sums of products are exact in every dtype."""
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def poison_holes(rows: torch.Tensor, case: PlanCase) -> torch.Tensor:
    for row, owner in enumerate(case.row_owner):
        if owner is None:
            rows[row] = float("nan")
    return rows


@IMPLEMENTATIONS
@given(
    case=plan_cases(),
    hidden=st.sampled_from([0, 1, 3, 8, 33]),
    dtype=DTYPES,
    weighted=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=60)
def test_sums_the_rows_of_each_token(op, case, hidden, dtype, weighted, seed):
    rows = poison_holes(integers((case.rows, hidden), dtype, seed), case)
    weights = integers((case.token_rows.shape[0],), torch.float32, seed + 1)
    got = op(rows, weights if weighted else None, *plan_of(case))
    assert got.shape == (case.tokens, hidden)
    assert got.dtype == dtype
    assignment = 0
    for token, slots in enumerate(case.assignments):
        expected = [0.0] * hidden
        for row in slots:
            if row >= 0:
                weight = weights[assignment].item() if weighted else 1.0
                expected = [e + weight * v for e, v in zip(expected, rows[row].tolist(), strict=True)]
            assignment += 1
        assert got[token].tolist() == expected


@BACKWARDS
@given(
    case=plan_cases(),
    hidden=st.sampled_from([0, 1, 7, 8, 9, 33]),
    dtype=DTYPES,
    weight_dtype=DTYPES,
    seed=st.integers(0, 99),
)
@settings(max_examples=60)
def test_gradients(op, case, hidden, dtype, weight_dtype, seed):
    rows = integers((case.rows, hidden), dtype, seed)
    weights = integers((case.token_rows.shape[0],), weight_dtype, seed + 1)
    upstream = integers((case.tokens, hidden), dtype, seed + 2)
    grad_rows, grad_weights = op(upstream, rows, weights, *plan_of(case))
    assert grad_rows.dtype == dtype
    assert grad_rows.shape == rows.shape
    assert grad_weights.dtype == weight_dtype
    assert grad_weights.shape == weights.shape
    expected_rows = [[0.0] * hidden for _ in range(case.rows)]
    expected_weights = []
    for token, slots in enumerate(case.assignments):
        dy = upstream[token].tolist()
        for row in slots:
            weight = weights[len(expected_weights)].item()
            if row >= 0:
                expected_rows[row] = [weight * g for g in dy]
            expected_weights.append(
                sum(g * v for g, v in zip(dy, rows[row].tolist(), strict=True)) if row >= 0 else 0.0
            )
    assert grad_rows.tolist() == expected_rows
    assert grad_weights.tolist() == expected_weights


@IMPLEMENTATIONS
def test_sums_in_float32_in_slot_order(op):
    # In float32, (2^24 + 1) + 1 stays 2^24 while (1 + 1) + 2^24 does not; in bfloat16 256 + 1 + 1 would stay 256.
    case = make_plan([[2, 0, 1], [0, 1, 2]], 3)
    column = torch.empty(6, 1)
    for token, values in enumerate([[2.0**24, 1.0, 1.0], [1.0, 1.0, 2.0**24]]):
        for slot, value in enumerate(values):
            column[case.assignments[token][slot]] = value
    assert op(column, None, *plan_of(case)).tolist() == [[2.0**24], [2.0**24 + 2]]
    small = make_plan([[0, 1, 2]], 3)
    bf16 = torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16)
    assert op(bf16, None, *plan_of(small)).tolist() == [[258.0]]


@pytest.mark.parametrize("shape", ["flat", "per token"])
def test_weights_of_both_shapes_and_strided_inputs(shape):
    case = make_plan([[0, 1], [1, 2], [2, 0]], 3, capacity=2)
    rows = integers((10, 6), torch.float32, 0).t()[:, :5]
    weights = integers((3, 4), torch.float32, 1)[:, ::2]
    given_weights = weights.flatten() if shape == "flat" else weights
    expected = torch.zeros(3, 5)
    for token, slots in enumerate(case.assignments):
        for slot, row in enumerate(slots):
            expected[token] += weights[token, slot] * rows[row]
    assert torch.equal(unpermute(rows, given_weights, *plan_of(case)), expected)


def test_gradient_flows_through_strides_and_both_weight_shapes():
    case = make_plan([[0, 1], [1, 1], [2, 0]], 3, block=2, tail=1)
    leaf_rows = integers((4, case.rows), torch.float32, 0).requires_grad_()
    weights = integers((3, 2), torch.float32, 1).requires_grad_()
    unpermute(leaf_rows.t(), weights, *plan_of(case)).sum().backward()  # sum(): an expanded gradient
    owner = case.row_owner
    expected = torch.tensor([0.0 if o is None else weights[o].item() for o in owner]).expand(4, -1)
    sums = leaf_rows.detach().sum(0).tolist()
    assert torch.equal(leaf_rows.grad, expected)
    assert torch.equal(weights.grad, torch.tensor([[sums[r] for r in s] for s in case.assignments]))


def test_undoes_permute_without_weights():
    case = make_plan([[0, 1], [2, 3], [1, 0], [3, 2]], 4, block=4)
    x = integers((4, 16), torch.float32, 3)
    rows = permute(x, case.row_to_token, case.token_offsets, case.token_rows)
    assert torch.equal(unpermute(rows, None, *plan_of(case)), 2 * x)
    # The capacity form is a view of the rows.
    binned = make_plan([[0, 1], [2, 3], [1, 0], [3, 2]], 4, capacity=2)
    rows = permute(x, binned.row_to_token, binned.token_offsets, binned.token_rows).view(4, 2, 16)
    assert torch.equal(unpermute(rows.flatten(0, 1), None, *plan_of(binned)), 2 * x)


def test_many_rows_over_all_threads():
    experts = torch.randint(0, 17, (3000, 4), generator=torch.Generator().manual_seed(0)).tolist()
    case = make_plan(experts, 16, block=8, tail=50)
    rows = integers((case.rows, 96), torch.float32, 1)
    weights = integers((12000,), torch.float32, 2)
    upstream = integers((3000, 96), torch.float32, 3)
    assert torch.equal(unpermute(rows, weights, *plan_of(case)), unpermute_ref(rows, weights, *plan_of(case)))
    compiled = _unpermute_backward(upstream, rows, weights, *plan_of(case))
    for got, expected in zip(compiled, unpermute_backward_ref(upstream, rows, weights, *plan_of(case)), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("weighted", [False, True])
def test_gradcheck(weighted):
    case = make_plan([[0, 1], [1, 2], [2, 2], [3, 0], []], 3, capacity=2)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(6, 3, dtype=torch.float64, requires_grad=True, generator=generator)
    weights = torch.randn(8, dtype=torch.float64, requires_grad=True, generator=generator)
    if weighted:
        assert torch.autograd.gradcheck(lambda r, w: unpermute(r, w, *plan_of(case)), (rows, weights))
    else:
        assert torch.autograd.gradcheck(lambda r: unpermute(r, None, *plan_of(case)), (rows,))
        assert torch.autograd.gradgradcheck(lambda r: unpermute(r, None, *plan_of(case)), (rows,))


def test_double_backward_with_weights_is_refused():
    case = make_plan([[0, 1], [1, 0]], 2)
    rows = torch.randn(4, 3, requires_grad=True)
    weights = torch.randn(2, 2, requires_grad=True)
    (grad,) = torch.autograd.grad(unpermute(rows, weights, *plan_of(case)).sum(), rows, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        grad.sum().backward()


def test_saves_only_what_the_gradient_needs():
    case = make_plan([[0, 1], [1, 0]], 2)
    rows, weights = torch.randn(4, 3, requires_grad=True), torch.randn(4, requires_grad=True)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        unpermute(rows, None, *plan_of(case))
        assert not any(t.is_floating_point() for t in saved)
        saved.clear()
        unpermute(rows, weights, *plan_of(case))
    assert sorted(t.shape for t in saved if t.is_floating_point()) == [(4,), (4, 3)]


def test_registration():
    for case in (make_plan([[0, 1], [1, 2]], 2), make_plan([], 3), make_plan([[0], [0]], 2, capacity=3)):
        rows = torch.randn(case.rows, 4, requires_grad=True)
        weights = torch.randn(case.token_rows.shape[0], requires_grad=True)
        torch.library.opcheck(torch.ops.dmoe.unpermute.default, (rows, weights, *plan_of(case)))
        torch.library.opcheck(torch.ops.dmoe.unpermute.default, (rows, None, *plan_of(case)))
        grad = torch.randn(case.tokens, 4)
        torch.library.opcheck(
            torch.ops.dmoe.unpermute_backward.default, (grad, rows.detach(), weights.detach(), *plan_of(case))
        )


def test_bad_input():
    case = make_plan([[0], [1]], 2)
    plan = plan_of(case)
    rows, weights = torch.randn(2, 4), torch.randn(2)
    with pytest.raises(ValueError, match=r"unpermute: rows: expected shape \(R, H\), got \(2,\)"):
        unpermute(rows[0, :2], weights, *plan)
    with pytest.raises(TypeError, match=r"unpermute: rows: expected a floating-point tensor, got torch.int64"):
        unpermute(rows.long(), weights, *plan)
    with pytest.raises(TypeError, match=r"unpermute: gate_weights: expected a floating-point tensor, got torch.int64"):
        unpermute(rows, weights.long(), *plan)
    with pytest.raises(ValueError, match=r"unpermute: gate_weights: expected one for each of the 2 .*got shape \(3,\)"):
        unpermute(rows, torch.randn(3), *plan)
    with pytest.raises(TypeError, match=r"unpermute: token_rows: expected int32, got torch.int64"):
        unpermute(rows, weights, *plan[:3], plan[3].long())
    with pytest.raises(ValueError, match=r"unpermute: row_to_slot: expected shape \(2,\).*got \(1,\)"):
        unpermute(rows, weights, plan[0], plan[1][:1], *plan[2:])
    with pytest.raises(ValueError, match=r"unpermute: token_offsets: expected shape \(T \+ 1,\)"):
        unpermute(rows, weights, *plan[:2], plan[2][:0], plan[3])
    for bad in (2, -2):
        with pytest.raises(RuntimeError, match=r"unpermute: token 1: expected .*token_rows from 0 to 1, or -1"):
            unpermute(rows, weights, *plan[:3], torch.tensor([0, bad], dtype=torch.int32))
    for offsets in ([0, 2, 1], [0, 1, 3]):
        with pytest.raises(RuntimeError, match=r"unpermute: token 1: expected token_offsets ascending from 0 to 2"):
            unpermute(rows, weights, *plan[:2], torch.tensor(offsets, dtype=torch.int32), plan[3])
    for slot in (1, -1):
        slots = torch.tensor([0, slot], dtype=torch.int32)
        with pytest.raises(RuntimeError, match=rf"unpermute_backward: row 1: .*row_to_token 1, row_to_slot {slot}"):
            _unpermute_backward(rows, rows, weights, plan[0], slots, *plan[2:])
