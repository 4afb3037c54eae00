"""router_logits, router_scores, gate_weights: compiled path, reference and autograd against the oracle."""

from __future__ import annotations

import oracle
import pytest
import torch
from helpers import on_threads
from hypothesis import given, settings
from hypothesis import strategies as st

from dmoe.ops import gate_weights, router_logits, router_scores
from dmoe.ops._library import compiled
from dmoe.ops.gate_weights import gate_weights_backward_ref, gate_weights_ref
from dmoe.ops.router_logits import router_logits_ref
from dmoe.ops.router_scores import router_scores_ref
from dmoe.ops.router_top_k import TopKRule, router_top_k


@given(st.integers(0, 7), st.integers(1, 9), st.integers(1, 6), st.booleans(), st.integers(0, 2**20))
def test_router_logits(tokens, hidden, experts, with_bias, seed):
    torch.manual_seed(seed)
    x = torch.randn(tokens, hidden, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(experts, hidden, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(experts, dtype=torch.float64, requires_grad=True) if with_bias else None
    grad = torch.randn(tokens, experts, dtype=torch.float64)
    rows = [[sum(x[t, h] * weight[e, h] for h in range(hidden)) + (bias[e] if with_bias else 0) for e in range(experts)]
            for t in range(tokens)]  # fmt: skip
    expected = torch.stack([torch.stack(row) for row in rows]) if tokens else torch.zeros(0, experts).double()
    leaves = [x, weight, *([bias] if with_bias else [])]
    torch.testing.assert_close(router_logits(x, weight, bias), expected)
    if tokens:
        ours = torch.autograd.grad(router_logits(x, weight, bias), leaves, grad)
        for a, b in zip(ours, torch.autograd.grad(expected, leaves, grad), strict=True):
            torch.testing.assert_close(a, b)


def test_router_logits_of_bfloat16_are_computed_in_float32():
    torch.manual_seed(0)
    x, weight = torch.randn(5, 64).bfloat16(), torch.randn(3, 64).bfloat16()
    logits = router_logits(x, weight, dtype=torch.float32)
    torch.testing.assert_close(logits.double(), x.double() @ weight.double().t(), rtol=1e-5, atol=1e-5)
    leaf = x.clone().requires_grad_()
    router_logits(leaf, weight, dtype=torch.float32).sum().backward()
    assert leaf.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("tokens", "experts", "hidden"), [(5000, 3, 70), (130, 70, 600), (1, 1, 1), (0, 2, 3)])
def test_gradients_of_every_block_and_piece(tokens, experts, hidden, weight_dtype, dtype):
    """More than one of each that the work is cut into; sums in float32 or wider, rounded once, on any threads."""
    torch.manual_seed(0)
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    x, grad = torch.randn(tokens, hidden).to(dtype), torch.randn(tokens, experts, dtype=arithmetic)
    weight = torch.randn(experts, hidden).to(weight_dtype)
    with on_threads(1):
        ours = torch.ops.dmoe.router_logits_backward(grad, x, weight, 0.0, None)
    with on_threads(3):
        again = torch.ops.dmoe.router_logits_backward(grad, x, weight, 0.0, None)
    expected = grad.double() @ weight.double(), grad.double().T @ x.double()
    magnitudes = grad.double().abs() @ weight.double().abs(), grad.double().abs().T @ x.double().abs()
    for got, other, exact, magnitude, kind in zip(ours, again, expected, magnitudes, (x, weight), strict=True):
        assert got.dtype == kind.dtype
        assert torch.equal(got, other)
        rounding = torch.finfo(kind.dtype).eps / 2 * exact.abs() + torch.finfo(arithmetic).eps * 4 * magnitude
        assert ((got.double() - exact).abs() <= rounding).all()


@given(
    st.integers(0, 7), st.integers(1, 6), st.sampled_from(["softmax", "sigmoid"]), st.booleans(), st.integers(0, 2**20)
)
def test_router_scores(tokens, experts, function, with_log_z, seed):
    torch.manual_seed(seed)
    logits = (4 * torch.randn(tokens, experts, dtype=torch.float64)).requires_grad_()
    scores, log_z = router_scores(logits, function, with_log_z=with_log_z)
    exps = logits.exp()
    expected = exps / exps.sum(-1, keepdim=True) if function == "softmax" else 1 / (1 + 1 / exps)
    torch.testing.assert_close(scores, expected)
    grad = torch.randn_like(scores)
    loss, reference = (scores * grad).sum(), (expected * grad).sum()
    if with_log_z:
        torch.testing.assert_close(log_z, exps.sum(-1).log())
        loss, reference = loss + log_z.square().sum(), reference + exps.sum(-1).log().square().sum()
    else:
        assert log_z is None
    (a,), (b,) = torch.autograd.grad(loss, logits), torch.autograd.grad(reference, logits)
    torch.testing.assert_close(a, b)


@st.composite
def gate_cases(draw):
    experts = draw(st.integers(1, 6))
    tokens, top_k = draw(st.integers(0, 6)), draw(st.integers(1, experts))
    seed = draw(st.integers(0, 2**20))
    p = draw(st.sampled_from([None, 1.0, 2.0, 1.5]))
    return tokens, experts, top_k, seed, p, draw(st.booleans()), draw(st.sampled_from([1.0, 0.5, 3.0]))


@settings(max_examples=80)
@given(gate_cases())
def test_gate_weights(case):
    tokens, experts, top_k, seed, p, after_drop, scale = case
    torch.manual_seed(seed)
    logits = torch.randn(tokens, experts, dtype=torch.float64, requires_grad=True)
    indices = torch.rand(tokens, experts).argsort(-1)[:, :top_k]
    fate = torch.randint(0, 3, (tokens, top_k))  # 0 masked, 1 dropped, 2 kept
    indices = indices.masked_fill(fate == 0, experts)
    rows = torch.where(fate == 2, 5, -1).int()
    kept = [[None if f == 0 else f == 2 for f in row] for row in fate.tolist()]
    expected = oracle.gate_weights(logits, indices.tolist(), kept, p=p, after_drop=after_drop, scale=scale)
    expected = expected if tokens else torch.zeros(0, top_k).double()
    ours = gate_weights(logits.softmax(-1), indices, rows, normalization=p, after_drop=after_drop, scale=scale)
    plain = gate_weights_ref(logits.softmax(-1), indices, rows, float(p or 0), after_drop, scale)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(plain, expected)
    if tokens:
        grad = torch.randn_like(ours)
        (a,), (b,) = torch.autograd.grad(ours, logits, grad), torch.autograd.grad(expected, logits, grad)
        torch.testing.assert_close(a, b)
        scores = logits.softmax(-1)
        by_reference = gate_weights_backward_ref(grad, scores.detach(), indices, rows, float(p or 0), after_drop, scale)
        torch.testing.assert_close(torch.autograd.grad(scores, logits, by_reference)[0], b)


def test_gate_weights_of_zero_scores_are_zero():
    scores = torch.zeros(1, 3, requires_grad=True)
    weights = gate_weights(scores, torch.tensor([[0, 2]]), normalization=1.0)
    weights.sum().backward()
    assert weights.tolist() == [[0, 0]]


OPS = torch.ops.dmoe


def opcheck_cases():
    torch.manual_seed(0)
    x = torch.randn(5, 4, requires_grad=True)
    w, b = torch.randn(3, 4, requires_grad=True), torch.randn(3, requires_grad=True)
    yield OPS.router_logits, (x, w, b, torch.float32, 0.0, None)
    yield OPS.router_logits, (x, w, None, torch.float64, 0.1, torch.tensor(5))
    yield OPS.router_product_backward, (torch.randn(5, 3), x.detach(), w.detach())
    logits = torch.randn(5, 3, requires_grad=True)
    for function in ("softmax", "sigmoid"):
        for with_log_z in (False, True):
            yield OPS.router_scores, (logits, function, with_log_z)
    scores = logits.detach().softmax(-1).requires_grad_()
    indices = torch.tensor([[0, 2], [1, 3], [3, 3], [2, 1], [1, 0]])
    rows = torch.where(indices < 2, 1, -1).int()
    yield OPS.gate_weights, (scores, indices, None, 0.0, False, 1.0)
    yield OPS.gate_weights, (scores, indices, rows, 1.0, True, 2.0)


@pytest.mark.parametrize("case", list(opcheck_cases()), ids=lambda case: str(case[0]).split(".")[1])
def test_opcheck(case):
    torch.library.opcheck(case[0].default, case[1])


def test_references_are_what_the_operations_do():
    torch.manual_seed(0)
    x, w, logits = torch.randn(5, 4), torch.randn(3, 4), torch.randn(5, 3)
    torch.testing.assert_close(router_logits(x, w), router_logits_ref(x, w, None, torch.float32, 0.0, None))
    torch.testing.assert_close(router_scores(logits)[0], router_scores_ref(logits, "softmax", False)[0])


def test_second_derivatives_are_refused_in_one_sentence():
    logits = torch.randn(5, 3, requires_grad=True)
    (first,) = torch.autograd.grad(router_scores(logits)[0].square().sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match=r"router_scores_backward.*double backward is not supported"):
        first.sum().backward()


SCORES, FEW = torch.rand(2, 3), torch.zeros(2, 1).long()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: router_logits(SCORES, torch.randn(4, 5)), ValueError, r"router_logits: .*\(2, 3\) and \(4, 5\)"),
        (lambda: router_logits(FEW, SCORES), TypeError, "router_logits: x: expected a floating-point tensor, got"),
        (lambda: router_logits(SCORES, SCORES, FEW), TypeError, "router_logits: bias: expected a floating-point"),
        (lambda: router_scores(SCORES, "tanh"), ValueError, "router_scores: score_function: expected one of .*'tanh'"),
        (lambda: router_scores(torch.randn(3)), ValueError, r"router_scores: router_logits: expected shape \(T, E\)"),
        (lambda: router_scores(FEW), TypeError, "router_scores: router_logits: expected a floating-point tensor"),
        (lambda: gate_weights(SCORES, FEW.new_zeros(3, 1)), ValueError, r"gate_weights: expected scores \(T, E\)"),
        (lambda: gate_weights(FEW, FEW), TypeError, "gate_weights: scores: expected a floating-point tensor, got"),
        (lambda: gate_weights(SCORES, SCORES), TypeError, "gate_weights: expert_indices: expected dtype int32 or"),
        (
            lambda: gate_weights(SCORES, FEW, normalization=0.5),
            ValueError,
            "gate_weights: normalization: expected a finite p >= 1",
        ),
        (
            lambda: router_top_k(SCORES, TopKRule(1), expert_indices=SCORES),
            TypeError,
            "router_top_k: expert_indices: expected dtype int32 or int64, got torch.float32",
        ),
    ],
)
def test_errors_name_the_operation(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.skipif(not compiled, reason="checks of the compiled operation, which is not built here")
@pytest.mark.parametrize("operand", ["x", "weight", "bias"])
def test_the_compiled_product_names_an_operand_of_integers(operand):
    given = {"x": torch.randn(2, 3), "weight": torch.randn(4, 3), "bias": torch.randn(4)}
    given[operand] = given[operand].long()
    message = "router_product{}: {}: expected a floating-point tensor, got Long"
    with pytest.raises(RuntimeError, match=message.format("", operand)):
        OPS.router_product(*given.values(), torch.float32)
    if operand != "bias":
        with pytest.raises(RuntimeError, match=message.format("_backward", operand)):
            OPS.router_product_backward(torch.randn(2, 4), given["x"], given["weight"])
