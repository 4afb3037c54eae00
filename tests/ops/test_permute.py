"""permute: an exact copy, and its gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_cases import PlanCase, make_plan, plan_cases

from dmoe.ops.permute import permute, permute_ref

IMPLEMENTATIONS = pytest.mark.parametrize("op", [permute, permute_ref], ids=["op", "ref"])


def plan_of(case: PlanCase) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return case.row_to_token, case.token_offsets, case.token_rows


def numbered(tokens: int, hidden: int, dtype: torch.dtype) -> torch.Tensor:
    """Small integers, exact in every dtype, that differ between neighbours."""
    return (torch.arange(1, tokens * hidden + 1).view(tokens, hidden) % 251 - (0 if dtype == torch.uint8 else 100)).to(
        dtype
    )


@IMPLEMENTATIONS
@given(
    case=plan_cases(),
    hidden=st.sampled_from([0, 1, 3, 8, 33]),
    dtype=st.sampled_from(
        [
            torch.float32,
            torch.float64,
            torch.bfloat16,
            torch.float16,
            torch.int64,
            torch.uint8,
            torch.bool,
            torch.complex64,
        ]
    ),
)
@settings(max_examples=60)
def test_is_an_exact_copy(op, case, hidden, dtype):
    x = numbered(case.tokens, hidden, dtype)
    rows = op(x, *plan_of(case))
    assert rows.shape == (case.rows, hidden)
    assert rows.dtype == dtype
    for row, owner in enumerate(case.row_owner):
        expected = torch.zeros(hidden, dtype=dtype) if owner is None else x[owner[0]]
        assert torch.equal(rows[row], expected)


@given(case=plan_cases(), hidden=st.sampled_from([1, 3, 9]), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
@settings(max_examples=40)
def test_gradient_sums_the_rows_of_each_token(case, hidden, dtype):
    x = numbered(case.tokens, hidden, dtype).requires_grad_()
    upstream = (torch.arange(case.rows * hidden).view(case.rows, hidden) % 13 - 6).to(dtype)
    permute(x, *plan_of(case)).backward(upstream)
    for token, slots in enumerate(case.assignments):
        expected = [sum(upstream[row, h].item() for row in slots if row >= 0) for h in range(hidden)]
        assert x.grad[token].tolist() == expected


def test_gradient_is_summed_in_float32():
    # 256 + 1 + 1 is 258 in float32; bfloat16 would lose each 1.
    plan = plan_of(make_plan([[0, 1, 2]], 3))
    x = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    permute(x, *plan).backward(torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16))
    assert x.grad.item() == 258


def test_capacity_form_is_a_view():
    case = make_plan([[0, 1], [0, 2], [0, 1], [2, 0]], 4, capacity=2)
    x = numbered(4, 5, torch.float32)
    binned = permute(x, *plan_of(case)).view(4, 2, 5)
    zero = torch.zeros(5)
    expected = [[x[0], x[1]], [x[0], x[2]], [x[1], x[3]], [zero, zero]]
    assert torch.equal(binned, torch.stack([torch.stack(slice_) for slice_ in expected]))


def test_padded_form_starts_every_expert_on_a_block():
    case = make_plan([[0, 1], [0, 3], [0, 1]], 4, block=4)
    x = numbered(3, 2, torch.int64)
    rows = permute(x, *plan_of(case))
    assert case.expert_starts == [0, 4, 8, 8, 12]
    zero = torch.zeros(2, dtype=torch.int64)
    expected = [x[0], x[1], x[2], zero, x[0], x[2], zero, zero, x[1], zero, zero, zero]
    assert torch.equal(rows, torch.stack(expected))


@IMPLEMENTATIONS
def test_strided_tokens(op):
    case = make_plan([[1], [0], [1], [0]], 2)
    base = numbered(7, 9, torch.float32)
    for x in (base.t()[:4], base[:4, ::2], base[:1].expand(4, 9), base.flatten()[1:37].view(4, 9)):
        assert torch.equal(op(x, *plan_of(case)), torch.stack([x[1], x[3], x[0], x[2]]))


def test_many_rows_over_all_threads():
    experts = torch.randint(0, 17, (3000, 4), generator=torch.Generator().manual_seed(0)).tolist()
    case = make_plan(experts, 16, block=8, tail=50)
    x = torch.randint(-1000, 1000, (3000, 96), generator=torch.Generator().manual_seed(1))
    assert torch.equal(permute(x, *plan_of(case)), permute_ref(x, *plan_of(case)))


def test_gradcheck_and_second_derivative():
    case = make_plan([[0, 1], [1, 2], [2, 2], [3, 0]], 3, capacity=2)
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(0))
    run = lambda x: permute(x, *plan_of(case))  # noqa: E731
    assert torch.autograd.gradcheck(run, (x,))
    assert torch.autograd.gradgradcheck(run, (x,))


def test_registration():
    for case in (make_plan([[0, 1], [1, 2]], 2), make_plan([], 3), make_plan([[0], [0]], 2, capacity=3)):
        x = torch.randn(case.tokens, 4, requires_grad=True)
        torch.library.opcheck(torch.ops.dmoe.permute.default, (x, *plan_of(case)))


def test_bad_input():
    plan = plan_of(make_plan([[0], [1]], 2))
    x = torch.randn(2, 4)
    with pytest.raises(ValueError, match=r"permute: x: expected shape \(T, H\), got \(2, 4, 1\)"):
        permute(x.unsqueeze(2), *plan)
    with pytest.raises(TypeError, match=r"permute: row_to_token: expected int32, got torch.int64"):
        permute(x, plan[0].long(), *plan[1:])
    with pytest.raises(ValueError, match=r"permute: token_rows: expected one dimension, got shape \(2, 1\)"):
        permute(x, *plan[:2], plan[2].view(2, 1))
    with pytest.raises(ValueError, match=r"permute: token_offsets: expected shape \(4,\).*got \(3,\)"):
        permute(torch.randn(3, 4), *plan)
    with pytest.raises(ValueError, match=r"permute: row_to_token: expected on cpu like the data, got meta"):
        permute(x, plan[0].to("meta"), *plan[1:])
    for token in (2, -2):
        with pytest.raises(
            RuntimeError, match=rf"row_to_token: expected tokens from 0 to 1, or -1, got {token} at row 1"
        ):
            permute(x, torch.tensor([0, token], dtype=torch.int32), *plan[1:])
