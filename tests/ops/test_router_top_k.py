"""router_top_k: kernels and references against plain Python on one token after the other."""

from __future__ import annotations

import importlib
import math

import oracle
import pytest
import torch
from helpers import assert_as_accurate, nudged, small_config, where_kernels_run
from hypothesis import given, settings
from hypothesis import strategies as st

import dmoe
from dmoe import MoE
from dmoe.ops.router_top_k import (
    TopKRule,
    router_top_k,
    router_top_k_backward_cuda,
    router_top_k_backward_ref,
    router_top_k_cuda,
    router_top_k_ref,
    select_experts,
)

module = importlib.import_module("dmoe.ops.router_top_k")  # dmoe.ops.router_top_k is the function
kernel, backward_kernel = where_kernels_run(router_top_k_cuda), where_kernels_run(router_top_k_backward_cuda)
IMPLEMENTATIONS = {
    "op": (torch.ops.dmoe.router_top_k, torch.ops.dmoe.router_top_k_backward),
    "ref": (router_top_k_ref, router_top_k_backward_ref),
    "kernel": (kernel, backward_kernel),
}
# NumPy, under the interpreter, speaks up where a GPU does not: 1 / 0, log 0, inf - inf.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
implementations = pytest.mark.parametrize("name", IMPLEMENTATIONS)
OP = torch.ops.dmoe.router_top_k.default


def ranked(values):
    """Positions from the largest to the smallest: NaN first, then the larger, then the earlier."""
    return sorted(range(len(values)), key=lambda i: (not math.isnan(values[i]), -values[i], i))


def chosen_experts(scores, rule, bias):
    """Ids (T, K) of float32 scores, by sorting Python tuples; sums are rounded to float32."""
    values = scores if bias is None else scores + bias
    chosen = []
    for row in values:
        size = len(row) // rule.num_groups
        groups = [row[g * size : (g + 1) * size] for g in range(rule.num_groups)]
        best = [[float(group[i]) for i in ranked(group.tolist())] for group in groups]
        if rule.group_score == "top2_sum":
            best = [[float(torch.tensor(group[0]) + torch.tensor(group[1]))] if size > 1 else group for group in best]
        allowed = ranked([group[0] for group in best])[: rule.top_k_groups]
        limited = [v if e // size in allowed else -math.inf for e, v in enumerate(row.tolist())]
        chosen.append(ranked(limited)[: rule.top_k])
    return chosen


@st.composite
def rules(draw, numbers_of_groups=(1, 2, 3, 5)):
    groups = draw(st.sampled_from(numbers_of_groups))
    experts = groups * draw(st.integers(1, 6))
    kept = draw(st.integers(1, groups))
    return experts, TopKRule(
        draw(st.integers(1, experts // groups * kept)),
        draw(st.sampled_from(["softmax", "sigmoid"])),
        groups,
        kept,
        draw(st.sampled_from(["top2_sum", "max"])),
        draw(st.sampled_from([0.0, 1.0, 2.0, 1.5, 3.0])),
        draw(st.sampled_from([1.0, 2.5])),
    )


class Case:
    """Inputs of one call, and the truth about it for given choices, differentiable, in the dtype of the logits."""

    def __init__(self, tokens, experts, rule, seed, *, biased=False, masked=False, replayed=False):
        generator = torch.Generator().manual_seed(seed)
        self.rule, self.experts, self.tokens = rule, experts, tokens
        self.logits = 2 * torch.randn(tokens, experts, generator=generator)
        self.bias = torch.randn(experts, generator=generator) if biased else None
        self.mask = torch.rand(tokens, generator=generator) < 0.7 if masked else None
        self.given = None
        if replayed:
            self.given = torch.rand(tokens, experts, generator=generator).argsort(1)[:, : rule.top_k]
            self.given = self.given.masked_fill(torch.rand(self.given.shape, generator=generator) < 0.2, experts)
            self.given = self.given.to(torch.int32 if seed % 2 else torch.int64)
        self.grads = [
            torch.randn(size, generator=generator) for size in ((tokens, experts), tokens, (tokens, rule.top_k))
        ]

    def arguments(self, log_z=True, count=True):
        return (self.logits, self.bias, self.mask, self.given, log_z, count, *self.rule)

    def expected_choice(self, scores):
        chosen = self.given.tolist() if self.given is not None else chosen_experts(scores, self.rule, self.bias)
        counts = [True] * self.tokens if self.mask is None else self.mask.tolist()
        return [row if real else [self.experts] * self.rule.top_k for row, real in zip(chosen, counts, strict=True)]

    def truth(self, logits, chosen):
        """scores, log_z, weights in the dtype of logits."""
        powers = (logits - logits.detach().amax(1, keepdim=True)).exp()
        softmax = self.rule.score_function == "softmax"
        scores = powers / powers.sum(1, keepdim=True) if softmax else 1 / (1 + (-logits).exp())
        kept = [[True if e < self.experts else None for e in row] for row in chosen]
        weights = oracle.gate_weights(
            logits,
            chosen,
            kept,
            score=self.rule.score_function,
            p=self.rule.normalization or None,
            scale=self.rule.scale,
        )
        return scores, powers.sum(1).log() + logits.detach().amax(1), weights

    def gradient(self, logits, chosen, used):
        logits = logits.detach().requires_grad_()
        found = zip(self.truth(logits, chosen), self.grads, used, strict=True)
        loss = sum((one * grad.to(one.dtype)).sum() for one, grad, use in found if use)
        return torch.autograd.grad(loss, logits)[0]


def check(name, case, used=(True, True, True)):
    forward, backward = IMPLEMENTATIONS[name]
    scores, log_z, chosen, weights, first = forward(*case.arguments())
    assert (chosen.dtype, first.dtype) == (torch.int64, torch.int32)
    assert chosen.shape == weights.shape == (case.tokens, case.rule.top_k)
    expected = case.expected_choice(scores)
    assert chosen.tolist() == expected
    assert first.tolist() == [sum(row[0] == e for row in expected) for e in range(case.experts)]

    copies = [case.logits, nudged(case.logits), nudged(case.logits)]
    if not case.tokens:
        return
    exact = case.truth(case.logits.double(), expected)
    own = [list(zip(case.truth(x, expected), case.truth(x.double(), expected), strict=True)) for x in copies]
    for i, (what, found) in enumerate((("scores", scores), ("log_z", log_z), ("weights", weights))):
        assert_as_accurate(what, found, exact[i], [pairs[i] for pairs in own])

    if any(used):
        grads = [grad if use else None for grad, use in zip(case.grads, used, strict=True)]
        grad = backward(*grads, scores, case.logits, chosen, case.rule.score_function, *case.rule[-2:])
        truth = case.gradient(case.logits.double(), expected, used)
        own = [(case.gradient(x, expected, used), case.gradient(x.double(), expected, used)) for x in copies]
        noise = 1e-6 * case.rule.scale  # differences of numbers of this size
        assert_as_accurate("gradient", grad, truth, own, noise=noise)


@implementations
@settings(max_examples=40)
@given(
    rules(), st.integers(0, 9), st.booleans(), st.booleans(), st.booleans(),
    st.tuples(st.booleans(), st.booleans(), st.booleans()), st.integers(0, 2**20),
)  # fmt: skip
def test_equals_one_token_after_the_other(name, drawn, tokens, biased, masked, replayed, used, seed):
    experts, rule = drawn
    check(name, Case(tokens, experts, rule, seed, biased=biased, masked=masked, replayed=replayed), used)


@implementations
@pytest.mark.parametrize(
    ("tokens", "experts", "rule"),
    [
        (70, 33, TopKRule(4, normalization=1.0)),  # several programs, the last one not full
        (3, 130, TopKRule(130, "sigmoid", normalization=2.0)),
        (40, 128, TopKRule(8, "sigmoid", 8, 4, "top2_sum", 1.0, 2.5)),
        (2, 1000, TopKRule(5, "softmax", 8, 3, "max", 1.5)),
        (2, 2100, TopKRule(3)),  # more experts than a program holds of several tokens
        (200, 1, TopKRule(1, normalization=1.0)),
    ],
)
def test_sizes_of_real_layers(name, tokens, experts, rule):
    check(name, Case(tokens, experts, rule, 3, biased=True, masked=True))


odd_values = st.sampled_from([0.0, -0.0, 1.0, 1.0, -2.0, 200.0, math.inf, -math.inf, math.nan])


@implementations
@settings(max_examples=80)
@given(rules(), st.data())
def test_ties_and_values_that_are_no_numbers(name, drawn, data):
    """Ids are what plain sorting of the op's own scores gives; scores and log_z are PyTorch's, NaN for NaN."""
    experts, rule = drawn
    tokens = data.draw(st.integers(1, 3))
    lists = st.lists(odd_values, min_size=experts, max_size=experts)
    logits = torch.tensor(data.draw(st.lists(lists, min_size=tokens, max_size=tokens)))
    bias = data.draw(st.none() | lists.map(torch.tensor))
    scores, log_z, chosen, weights, _ = IMPLEMENTATIONS[name][0](logits, bias, None, None, True, False, *rule)
    plain = logits.softmax(1) if rule.score_function == "softmax" else logits.sigmoid()
    torch.testing.assert_close(scores, plain, equal_nan=True)
    torch.testing.assert_close(log_z, logits.logsumexp(1), equal_nan=True)
    assert chosen.tolist() == chosen_experts(scores, rule, bias)
    picked = scores.gather(1, chosen)
    assert (weights.isnan() | ~picked.isnan()).all()  # what is NaN stays NaN
    good = ~picked.isnan().any(1)
    assert weights[good].isfinite().all()


@implementations
@pytest.mark.parametrize(
    ("groups", "kept", "bias", "expected"),
    [
        # Experts outside the best groups stand at -inf, beside those inside that a bias has put there: by id.
        (2, 1, [0, 0, 0, 1, -math.inf, -math.inf], [3, 0]),
        # Groups of three are padded to four columns, and no expert may be taken a second time from a padding column.
        (3, 2, [-math.inf] * 3 + [0, -math.inf, -math.inf] * 2, [3, 6, 0, 1, 2, 4]),
        (3, 2, [-math.inf] * 3 + [0, -math.inf, -math.inf] + [-math.inf] * 3, [3, 0, 1, 2, 4, 5]),
    ],
)
def test_experts_at_minus_infinity_are_taken_once_by_id(name, groups, kept, bias, expected):
    rule = TopKRule(len(expected), "sigmoid", groups, kept, "max")
    logits = torch.zeros(1, len(bias))
    chosen = IMPLEMENTATIONS[name][0](logits, torch.tensor(bias).float(), None, None, False, False, *rule)[2]
    assert chosen.tolist() == [expected]


def test_a_bad_token_spoils_nothing_but_itself():
    torch.manual_seed(0)
    logits = torch.randn(5, 6)
    rule = TopKRule(2, normalization=1.0)
    clean = kernel(logits, None, None, None, True, False, *rule)
    spoiled = logits.clone()
    spoiled[2, 4] = math.nan
    found = kernel(spoiled, None, None, None, True, False, *rule)
    others = torch.tensor([0, 1, 3, 4])
    for mine, theirs in zip(found[:4], clean[:4], strict=True):
        assert torch.equal(mine[others], theirs[others])
    assert found[2][2].tolist() == [0, 1]
    assert found[3][2].isnan().all()


def test_small_scores_are_normalised_without_underflow():
    logits = torch.tensor([[0.0, -85.0, -86.0, -100.0]])
    given = torch.tensor([[1, 2]])
    for p in (1.0, 2.0, 3.0):
        for forward, _ in IMPLEMENTATIONS.values():
            weights = forward(logits, None, None, given, False, False, *TopKRule(2, normalization=p))[3]
            ratio = math.exp(-1)
            norm = (1 + ratio**p) ** (1 / p)
            torch.testing.assert_close(weights, torch.tensor([[1 / norm, ratio / norm]]), rtol=1e-5, atol=0)


def test_strided_inputs_are_read_as_they_are():
    torch.manual_seed(0)
    wide, mask = torch.randn(12, 10), torch.arange(10) % 4 != 1  # every second one is True
    given = torch.randint(0, 6, (2, 5))
    case = (wide.T[::2, ::2], torch.randn(12)[::2], mask[::2], given.T, True, True, *TopKRule(2, normalization=1.0))
    for mine, theirs in zip(kernel(*case), router_top_k_ref(*case), strict=True):
        torch.testing.assert_close(mine, theirs)
    grads = [torch.randn(()).expand(5, 6), torch.randn(()).expand(5), torch.randn(2, 5).T]
    scores, _, chosen, *_ = router_top_k_ref(*case)
    for function in ("softmax", "sigmoid"):
        arguments = (*grads, scores, case[0], chosen, function, 1.0, 1.0)
        torch.testing.assert_close(backward_kernel(*arguments), router_top_k_backward_ref(*arguments))


def test_replayed_ids_out_of_range_take_no_expert():
    given = torch.tensor([[-1, 2**40], [1, 3]])
    _, _, chosen, weights, first = kernel(torch.randn(2, 3), None, None, given, False, True, *TopKRule(2))
    assert chosen.tolist() == [[3, 3], [1, 3]]
    assert (weights != 0).tolist() == [[False, False], [True, False]]
    assert first.tolist() == [0, 1, 0]


def layer_options():
    yield {}
    yield {
        "score_function": "sigmoid",
        "selection_bias": True,
        "gate_normalization": 1.0,
        "router_z_loss_coefficient": 0.1,
    }
    yield {"num_experts": 6, "num_groups": 3, "top_k_groups": 2, "load_balancing_choices": "first"}
    yield {"softmax_order": "after_topk", "gate_scale": 2.0, "load_balancing_coefficient": 0.0}
    yield {"capacity_factor": 0.7, "normalize_when": "after_drop", "gate_normalization": 1.0}


@pytest.mark.parametrize("options", list(layer_options()), ids=str)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_layer_is_the_same_with_the_operation_as_with_its_parts(options, compiled, monkeypatch):
    """What is compared is the wiring, autograd's included."""
    torch.manual_seed(0)
    layer = MoE(small_config(**options))
    x, mask = torch.randn(9, 8), torch.rand(9) < 0.8

    def run():
        layer.zero_grad()
        step = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
        y = step(x, token_mask=mask)
        loss = y.square().sum() + dmoe.aux_loss(layer)
        loss.backward()
        return [y.detach(), loss.detach(), *(p.grad for p in layer.parameters())]

    used = []
    monkeypatch.setattr(module, "_fits_one_launch", lambda logits: False)
    apart = run()
    monkeypatch.setattr(module, "_fits_one_launch", lambda logits: used.append(True) or True)
    torch.compiler.reset()
    together = run()
    assert bool(used) == ("capacity_factor" not in options)
    for mine, theirs in zip(together, apart, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_the_reference_backend_never_takes_the_operation(monkeypatch):
    monkeypatch.setattr(module, "_fits_one_launch", lambda logits: True)
    logits = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    weights = router_top_k(logits, TopKRule(2, normalization=1.0), backend="reference").gate_weights
    (first,) = torch.autograd.grad(weights.square().sum(), logits, create_graph=True)
    first.sum().backward()
    weights = router_top_k(logits, TopKRule(2, normalization=1.0)).gate_weights
    (first,) = torch.autograd.grad(weights.square().sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match=r"router_top_k_backward.*double backward is not supported"):
        first.sum().backward()


@settings(max_examples=25)
@given(rules(numbers_of_groups=(1,)), st.integers(1, 4), st.integers(0, 2**20))
def test_gradcheck(drawn, tokens, seed):
    experts, rule = drawn
    torch.manual_seed(seed)
    ranks = torch.rand(tokens, experts).argsort(1)  # no two closer than 0.1: a nudge must not change the choice
    logits = (0.3 * ranks + 0.2 * torch.rand(tokens, experts, dtype=torch.float64) - 1).requires_grad_()
    mask = torch.rand(tokens) < 0.8

    def run(x):
        scores, log_z, _, weights, _ = OP(x, None, mask, None, True, False, *rule)
        return scores, log_z, weights

    assert torch.autograd.gradcheck(run, logits)


def test_only_asked_results_come_back():
    logits = torch.randn(4, 3)
    plain = router_top_k(logits, TopKRule(2), with_weights=False)
    assert plain.log_z is plain.gate_weights is plain.first_choices_per_expert is None
    full = router_top_k(logits, TopKRule(2), with_log_z=True, count_first=True)
    torch.testing.assert_close(full.log_z, logits.logsumexp(1))
    assert full.first_choices_per_expert.sum() == 4
    assert torch.equal(plain.expert_indices, select_experts(logits.softmax(1), TopKRule(2)))


@pytest.mark.parametrize("function", ["softmax", "sigmoid"])
@pytest.mark.parametrize("with_log_z", [False, True])
def test_registration(function, with_log_z):
    torch.manual_seed(0)
    logits = torch.randn(5, 6, requires_grad=True)
    rule = TopKRule(2, function, 3, 2, "max", 1.0, 2.0)
    mask, given = torch.rand(5) < 0.7, torch.tensor([[0, 2], [1, 6], [6, 6], [2, 1], [1, 0]])
    torch.library.opcheck(OP, (logits, torch.randn(6), mask, None, with_log_z, True, *rule))
    torch.library.opcheck(OP, (logits, None, None, given, with_log_z, False, *rule))
    torch.library.opcheck(OP, (logits, None, mask, given.int(), with_log_z, False, *rule))
