"""balanced_assignment against scipy's linear sum assignment on a matrix with T / E columns for every expert."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode

from dmoe.ops.balanced_assignment import balanced_assignment, balanced_assignment_ref

IMPLEMENTATIONS = pytest.mark.parametrize("op", [balanced_assignment, balanced_assignment_ref], ids=["op", "ref"])
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def optimum(scores: torch.Tensor) -> float:
    """The largest sum that any balanced assignment has."""
    T, E = scores.shape
    columns = np.repeat(scores.double().numpy(), T // E, axis=1)
    return float(columns[linear_sum_assignment(columns, maximize=True)].sum())


def total(scores: torch.Tensor, expert: torch.Tensor) -> float:
    """The sum of an assignment's scores, after a look at its form."""
    T, E = scores.shape
    assert expert.dtype == torch.int64
    assert expert.shape == (T,)
    assert expert.device == scores.device
    assert torch.equal(torch.bincount(expert, minlength=E), torch.full((E,), T // E))
    return scores.double().gather(1, expert.unsqueeze(1)).sum().item()


def assert_optimal(op, scores: torch.Tensor, means: torch.Tensor | None = None) -> None:
    """``means``: what the scores count as, where that is something else."""
    means = scores if means is None else means
    within = 1e-9 * means.double().abs().max().item() if means.numel() else 0
    assert total(means, op(scores)) == pytest.approx(optimum(means), rel=1e-9, abs=within)


def normal(tokens: int, experts: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def favoured(scores: torch.Tensor, seed: int) -> torch.Tensor:
    """Most tokens want the same few experts."""
    return scores + 3 * normal(1, scores.shape[1], seed)


def clustered(scores: torch.Tensor, seed: int) -> torch.Tensor:
    """Tokens of a few kinds, each alike."""
    return normal(5, scores.shape[1], seed)[torch.arange(scores.shape[0]) % 5] + 0.01 * scores


def tied(scores: torch.Tensor, seed: int) -> torch.Tensor:
    return scores.round()


SHAPES = {"even": lambda scores, seed: scores, "favoured": favoured, "clustered": clustered, "tied": tied}


@st.composite
def cases(draw):
    # 8 | 9 and 16 | 17 are where rows of the C++ get longer, 4 | 5 and 16 | 17 tokens where its trees grow.
    experts = draw(st.integers(1, 10) | st.sampled_from([15, 16, 17, 33]))
    share = draw(st.integers(0, 6) | st.sampled_from([15, 17])) if experts <= 10 else draw(st.integers(0, 3))
    seed = draw(st.integers(0, 2**32))
    scores = SHAPES[draw(st.sampled_from(sorted(SHAPES)))](normal(experts * share, experts, seed), seed + 1)
    return (scores * draw(st.sampled_from([1.0, 1e-3, 100.0]))).to(draw(st.sampled_from(DTYPES)))


@IMPLEMENTATIONS
@given(scores=cases())
@settings(max_examples=100)
def test_no_balanced_assignment_has_a_larger_sum(op, scores):
    assert_optimal(op, scores)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("tokens", "experts"), [(1000, 2), (640, 5), (1024, 8), (390, 130), (1024, 64), (200, 200)], ids=str
)
def test_many_tokens(tokens, experts, shape):
    scores = SHAPES[shape](normal(tokens, experts, 1), 2)
    assert_optimal(balanced_assignment, scores)
    if tokens <= 640:
        assert_optimal(balanced_assignment_ref, scores)


@IMPLEMENTATIONS
@pytest.mark.parametrize("lead", [0.0, 0.7, 5.0, 1e6])
def test_a_hot_expert(op, lead):
    scores = normal(240, 6, 3)
    scores[:, 4] += lead
    assert_optimal(op, scores)


@IMPLEMENTATIONS
def test_two_experts_that_outbid_each_other(op):
    """Prices of two favourites differ by little and stand far above the others': an auction takes long here."""
    scores = normal(96, 8, 4)
    scores[:, :2] = 1000 + 0.001 * scores[:, :2]
    assert_optimal(op, scores)


@IMPLEMENTATIONS
def test_paths_of_many_experts(op):
    """Everyone wants the next expert nearly as much: the token that is too many for the first pushes all others on."""
    E, share = 24, 3
    scores = torch.full((E * share, E), -50.0)
    for token in range(E * share):
        scores[token, token // share] = 1.0
        scores[token, min(token // share + 1, E - 1)] = 0.9 - 0.01 * (token % share)
    scores[-share:] = scores[:share]  # the last expert's tokens want the first
    assert_optimal(op, scores)
    assert total(scores, op(scores)) > 0


@IMPLEMENTATIONS
def test_a_token_that_has_gone_is_not_taken_for_its_step_again(op):
    rows = (
        "22132 20333 21323 13300 33001 12201 00320 11033 00121 01231 "
        "11212 30331 21030 01121 01333 22032 11323 02120 11133 12131"
    )
    assert_optimal(op, torch.tensor([[float(digit) for digit in row] for row in rows.split()]))


@IMPLEMENTATIONS
@pytest.mark.parametrize(("tokens", "experts"), [(0, 1), (0, 7), (5, 1), (9, 9), (40, 8)], ids=str)
def test_all_scores_equal(op, tokens, experts):
    scores = torch.full((tokens, experts), 0.25)
    assert total(scores, op(scores)) == tokens * 0.25


@IMPLEMENTATIONS
@pytest.mark.parametrize("seed", range(5))
def test_as_many_experts_as_tokens(op, seed):
    assert_optimal(op, normal(31, 31, seed))


@IMPLEMENTATIONS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_that_are_not_finite_count_as_the_smallest_finite_one(op, dtype):
    scores = normal(60, 5, 5).to(dtype)
    odd = scores.clone()
    places = torch.randperm(300, generator=torch.Generator().manual_seed(6))[:90]
    for value, some in zip((math.nan, math.inf, -math.inf), places.chunk(3), strict=True):
        odd.view(-1)[some] = value
    assert_optimal(op, odd, torch.where(odd.isfinite(), odd, odd[odd.isfinite()].min()))
    assert odd.isnan().sum() == 30, "the scores were written to"


@IMPLEMENTATIONS
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_finite_score(op, value):
    scores = torch.full((12, 3), value)
    total(scores, op(scores))
    scores[7, 1] = -2.0
    total(scores, op(scores))


@IMPLEMENTATIONS
@pytest.mark.parametrize("power", [-1070, -1000, 1016])
def test_scores_of_any_size(op, power):
    """A power of two changes nothing, up to the largest float64 (2**1024), where every step to be made overflows."""
    scores = -(128 + normal(48, 6, 7).abs() * 32).round()
    scores[:, 2] *= -1
    scaled = scores * 2.0**power
    assert scaled.isfinite().all()
    assert_optimal(op, scaled, scores)


@IMPLEMENTATIONS
def test_strided_scores(op):
    base = normal(40, 120, 8)
    for scores in (base.t()[:, ::5], base[::2, ::12], base[:1, :8].expand(24, 8), base.t()[::3, 3:8]):
        assert torch.equal(op(scores), op(scores.contiguous()))
        assert_optimal(op, scores)


def test_other_devices_ask_the_host():
    scores = normal(12, 3)
    elsewhere = SimpleNamespace(device=torch.device("meta"), cpu=lambda: scores)
    got = balanced_assignment_ref(elsewhere)
    assert (got.device.type, got.dtype, got.shape) == ("meta", torch.int64, (12,))
    # CUDA graphs cannot hold what waits for the host; inductor leaves out what says so.
    assert torch.Tag.cudagraph_unsafe in torch.ops.dmoe.balanced_assignment.default.tags


def test_compiled_it_is_one_operation():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(balanced_assignment, fullgraph=True, dynamic=True, backend=counter)
    for tokens in (8, 20, 36, 64):
        scores = normal(tokens, 4, tokens)
        assert total(scores, compiled(scores)) == pytest.approx(optimum(scores), rel=1e-12)
    assert counter.frame_count <= 2
    assert [node.target for node in counter.graphs[-1].graph.nodes if node.op == "call_function"].count(
        torch.ops.dmoe.balanced_assignment.default
    ) == 1
    with pytest.raises((ValueError, RuntimeError), match=r"divisible by the num_experts = 4, got 10"):
        compiled(normal(10, 4))


def test_registration():
    for scores in (normal(12, 4), torch.randn(0, 8), normal(6, 18).t().bfloat16(), torch.zeros(6, 2).half()):
        torch.library.opcheck(torch.ops.dmoe.balanced_assignment.default, (scores,))
    assert not balanced_assignment(torch.randn(4, 2, requires_grad=True)).requires_grad
    with FakeTensorMode():
        fake = balanced_assignment(torch.empty(12, 4, dtype=torch.bfloat16))
    assert (fake.shape, fake.dtype) == ((12,), torch.int64)
    with torch.autocast("cpu", torch.bfloat16):  # no rounding of its scores
        close = torch.tensor([[1.0, 1.0], [1.0001, 1.0]])
        assert balanced_assignment(close).tolist() == [1, 0]


def test_bad_input():
    scores = torch.randn(10, 4)
    with pytest.raises(
        TypeError, match=r"balanced_assignment: scores: expected a floating-point tensor, got torch.int"
    ):
        balanced_assignment(scores.int())
    with pytest.raises(ValueError, match=r"balanced_assignment: scores: expected shape \(T, E\), got \(2, 5, 4\)"):
        balanced_assignment(scores.view(2, 5, 4))
    indivisible = r"balanced_assignment: scores: expected a number of tokens divisible by the num_experts = 4, got 10$"
    none = r"balanced_assignment: scores: expected shape \(T, E\) with at least one expert, got \(10, 0\)$"
    for bad, match in ((scores, indivisible), (scores[:, :0], none)):
        with pytest.raises(ValueError, match=match):
            balanced_assignment(bad)
        for op in (torch.ops.dmoe.balanced_assignment, balanced_assignment_ref):  # where a symbol hid the sizes
            with pytest.raises(RuntimeError, match="dmoe::" + match):
                op(bad)
