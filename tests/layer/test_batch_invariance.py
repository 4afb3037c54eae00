"""``batch_invariant=True``: a token's bits whatever else is in the batch; what cannot promise it says so."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import on_threads
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

import dmoe
from dmoe import MoE, MoEConfig
from dmoe.ops._library import compiled
from dmoe.ops.grouped_gemm_invariant import linear_invariant

needs_kernels = pytest.mark.skipif(not compiled, reason="csrc/ was not built, and nothing else promises it")
RESULTS = ("logits", "choices", "gates", "y", "x's gradient", "gates' gradient")
SIZES = {"hidden_size": 12, "ffn_hidden_size": 16, "num_experts": 4, "top_k": 2, "load_balancing_coefficient": 0.0}


@st.composite
def layers(draw):
    """A layer that promises it, a batch of tokens for it with gradients, and a few of these in any order."""
    experts = draw(st.integers(1, 9))
    scores = draw(st.sampled_from(["softmax", "sigmoid", "sqrt_softplus"]))
    shared = draw(st.sampled_from([None, 5, 24]))
    fields = {
        "hidden_size": draw(st.sampled_from([1, 7, 32, 40, 130, 288])),
        "ffn_hidden_size": draw(st.sampled_from([3, 16, 33, 270])),
        "num_experts": experts,
        "top_k": draw(st.integers(1, experts)),
        "gated": draw(st.booleans()),
        "activation": draw(st.sampled_from(["silu", "gelu"])),
        "bias": draw(st.sampled_from(["none", "expert", "output"])),
        "gate_weight_on": draw(st.sampled_from(["output", "activation", "input"])),
        "score_function": scores,
        "softmax_order": draw(
            st.sampled_from(["before_topk", "after_topk"] if scores == "softmax" else ["before_topk"])
        ),
        "gate_normalization": draw(st.sampled_from([None, 1.0, 2.0])),
        "router_bias": draw(st.booleans()),
        "router_logit_softcap": draw(st.sampled_from([None, 2.0])),
        "router_dtype": draw(st.sampled_from(["float32", "input"])),
        "selection_bias": draw(st.booleans()),
        "shared_ffn_hidden_size": shared,
        "shared_expert_gate": shared is not None and draw(st.booleans()),
        "recompute_pre_activation": draw(st.booleans()),
        "load_balancing_coefficient": 0.0,
        "batch_invariant": True,
    }
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    count = draw(st.sampled_from([2, 9, 40, 150, 300]))
    torch.manual_seed(draw(st.integers(0, 2**20)))
    layer = MoE(**fields, dtype=dtype)
    x, grad = (torch.randn(count, fields["hidden_size"], dtype=torch.float64).to(dtype) for _ in range(2))
    if draw(st.booleans()):  # one hot expert: its rows are cut into blocks
        x = x[:1] + 0.01 * x
    some = torch.randperm(count)[: draw(st.integers(1, min(count, 70)))]
    return layer, x, grad, some


def results_of(layer, x, grad):
    """What each token gets, forward and backward."""
    x = x.clone().requires_grad_()
    y, routing = layer(x, return_routing=True)
    routing.gate_weights.retain_grad()
    y.backward(grad)
    gates = routing.gate_weights
    return routing.router_logits.detach(), routing.expert_indices, gates.detach(), y.detach(), x.grad, gates.grad


def differing(whole, part, tokens):
    return [name for name, a, b in zip(RESULTS, whole, part, strict=True) if not torch.equal(a[tokens], b)]


@needs_kernels
@settings(max_examples=60)
@given(case=layers())
def test_a_token_has_the_same_bits_in_any_batch(case):
    layer, x, grad, some = case
    whole = results_of(layer, x, grad)
    assert not differing(whole, results_of(layer, x[some], grad[some]), some)
    for token in some[:3]:  # as in a decode step
        assert not differing(whole, results_of(layer, x[token : token + 1], grad[token : token + 1]), [int(token)])
    with torch.no_grad():  # another operation
        assert torch.equal(layer(x[some]), whole[3][some])


@needs_kernels
@settings(max_examples=25)
@given(case=layers())
def test_it_computes_what_the_layer_computes(case):
    """In float64, where no rounding of a weighted row hides a wrong one; the weights' gradients as well."""
    layer, x, grad, _ = case
    layer, x, grad = layer.double(), x.double(), grad.double()
    plain = MoE(MoEConfig(**{**vars_of(layer.config), "batch_invariant": False}), dtype=torch.float64)
    plain.load_state_dict(layer.state_dict())
    for mine, theirs in zip(results_of(layer, x, grad), results_of(plain, x, grad), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
    for (name, mine), theirs in zip(layer.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(
            mine.grad, theirs.grad, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}"
        )


def vars_of(config):
    return {name: getattr(config, name) for name in config.__dataclass_fields__}


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_without_it_bits_depend_on_the_batch(dtype):
    """What the option is for, and that these tests would see it."""
    torch.manual_seed(0)
    fields = SIZES | {
        "hidden_size": 512,
        "ffn_hidden_size": 640,
        "score_function": "sigmoid",
        "gate_normalization": 1.0,
    }
    x, grad = torch.randn(2, 333, 512, dtype=torch.float64).to(dtype)
    for invariant in (False, True):
        layer = MoE(**fields, batch_invariant=invariant, dtype=dtype)
        whole = results_of(layer, x, grad)
        found = {name for t in range(12) for name in differing(whole, results_of(layer, x[t:][:1], grad[t:][:1]), [t])}
        assert found == set() if invariant else {"y", "x's gradient", "gates' gradient"} & found


@needs_kernels
@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_nothing(threads):
    torch.manual_seed(1)
    layer = MoE(**SIZES | {"hidden_size": 64, "ffn_hidden_size": 96}, batch_invariant=True)
    x, grad = torch.randn(2, 700, 64)
    alone = results_of(layer, x, grad)
    with on_threads(threads):
        assert not differing(alone, results_of(layer, x, grad), slice(None))


@needs_kernels
def test_prefill_equals_decode_with_padding_and_a_batch_dimension():
    torch.manual_seed(2)
    layer = MoE(**SIZES, batch_invariant=True).eval()
    x, mask = torch.randn(3, 5, 12), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]]).bool()
    x[~mask] = torch.nan
    prefill = layer(x, token_mask=mask)
    for sequence, length in enumerate(mask.sum(1).tolist()):
        for place in range(length):
            assert torch.equal(layer(x[sequence, place]), prefill[sequence, place])


@needs_kernels
@pytest.mark.parametrize("how", ["views", "packed", "transposed"])
def test_weights_that_lie_otherwise(how):
    """Transposed weights take the other kernel, which has its own order; packed experts have widths of their own."""
    torch.manual_seed(3)
    E, F, H, T = 3, 21, 34, 90
    up, down = torch.randn(E, 2, F, H), torch.randn(E, H, F)
    weights = dmoe.ExpertWeights(up_proj=up, down_proj=down, gated=True)
    if how == "transposed":
        up, down = (w.transpose(-1, -2).contiguous().transpose(-1, -2) for w in (up, down))
        weights = dmoe.ExpertWeights(up_proj=up, down_proj=down, gated=True)
    elif how == "packed":
        widths = (5, 9, 7)
        weights = dmoe.ExpertWeights(
            up_proj=torch.randn(2, 21, H), down_proj=torch.randn(H, 21), gated=True, ffn_sizes=widths
        )
    elif how == "views":
        both = torch.randn(E, 2 * F, H).unflatten(1, (F, 2)).transpose(1, 2)  # gate and up take turns
        weights = dmoe.ExpertWeights(up_proj=both, down_proj=down, gated=True)
    x, ids = torch.randn(T, H), torch.stack([torch.randperm(E)[:2] for _ in range(T)])
    gates = torch.rand(T, 2)

    def run(tokens):
        given, weighed = x[tokens].clone().requires_grad_(), gates[tokens].clone().requires_grad_()
        y = dmoe.functional.moe_mlp(given, ids[tokens], weighed, weights, batch_invariant=True)
        y.square().sum().backward()
        return y.detach(), given.grad, weighed.grad

    whole = run(slice(None))
    exact = dmoe.functional.moe_mlp(x, ids, gates, weights, backend="reference")
    torch.testing.assert_close(whole[0], exact, rtol=1e-4, atol=1e-4)
    for token in (0, 7, 89):
        for mine, its in zip(run(slice(token, token + 1)), whole, strict=True):
            assert torch.equal(mine, its[token : token + 1])


@needs_kernels
def test_autocast_copies_and_checkpoints():
    torch.manual_seed(4)
    layer = MoE(**SIZES, batch_invariant=True, shared_ffn_hidden_size=6, shared_expert_gate=True)
    x = torch.randn(40, 12)
    with torch.autocast("cpu", torch.bfloat16):
        y = copy.deepcopy(layer)(x)
        assert y.dtype == torch.bfloat16
        assert torch.equal(layer(x[5:6]), y[5:6])
    plain, again = x.clone().requires_grad_(), x.clone().requires_grad_()
    layer(plain).square().sum().backward()
    gradients = [parameter.grad.clone() for parameter in layer.parameters()]
    layer.zero_grad()
    checkpoint(layer, again, use_reentrant=False).square().sum().backward()
    assert torch.equal(plain.grad, again.grad)
    assert all(torch.equal(a, b.grad) for a, b in zip(gradients, layer.parameters(), strict=True))


@needs_kernels
@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_compiled_in_one_graph_for_any_number_of_tokens(scores):
    torch.manual_seed(5)
    layer = MoE(**SIZES | {"score_function": scores}, batch_invariant=True, shared_ffn_hidden_size=6)
    graph, x = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True), torch.randn(9, 12)
    for count in (9, 5):
        given, eager = (x[:count].clone().requires_grad_() for _ in range(2))
        y, expected = graph(given), layer(eager)
        y.square().sum().backward()
        expected.square().sum().backward()
        assert torch.equal(y, expected)
        assert torch.equal(given.grad, eager.grad)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"backend": "torch"}, "backend"),
        ({"backend": "reference"}, "backend"),
        ({"backend": "block_sparse"}, "backend"),
        ({"expert_compute": "fp8"}, "expert_compute"),
        ({"saved_activations": "fp8"}, "saved_activations"),
        ({"activation": torch.nn.functional.mish}, "activation"),
        ({"activation_dropout": 0.1}, "activation_dropout"),
        ({"expert_dropout": 0.1}, "expert_dropout"),
        ({"input_jitter": 0.1}, "input_jitter"),
        ({"capacity": 3}, "capacity"),
        ({"capacity_factor": 1.0}, "capacity_factor"),
        ({"eval_capacity_factor": 1.0}, "eval_capacity_factor"),
        ({"max_rows_received": 4}, "max_rows_received"),
        ({"overlap_degree": 2}, "overlap_degree"),
        ({"gate_normalization": 1.5}, "gate_normalization"),
        ({"router": "cosine"}, "router"),
        ({"router": "sinkhorn", "causal": False}, "router"),
        ({"router": dmoe.routing.TopK(logit_noise="gumbel")}, "logit_noise"),
        ({"router": dmoe.routing.TopK(second_expert="random")}, "second_expert"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_options_that_cannot_promise_it_are_refused(fields, named):
    sizes = SIZES | {"ffn_hidden_size": 16}
    MoEConfig(**sizes | fields)
    with pytest.raises(ValueError, match=rf"^(MoEConfig|TopK): {named}: expected .* with batch_invariant=True"):
        MoEConfig(**sizes | fields, batch_invariant=True)


def test_calls_that_cannot_promise_it_are_refused():
    x, ids, gates = torch.randn(3, 8), torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1)
    weights = dmoe.ExpertWeights(up_proj=torch.randn(2, 2, 16, 8), down_proj=torch.randn(2, 8, 16), gated=True)

    def call(**options):
        return dmoe.functional.moe_mlp(x, ids, gates, weights, batch_invariant=True, **options)

    with pytest.raises(ValueError, match=r"^moe_mlp: backend: expected None or grouped with batch_invariant=True"):
        call(backend="torch")
    with pytest.raises(ValueError, match=r"^moe_mlp: expected no expert_compute='fp8' with batch_invariant=True"):
        call(expert_compute="fp8")
    with pytest.raises(ValueError, match=r"^moe_mlp: expert_dropout: expected 0 with batch_invariant=True"):
        call(expert_dropout=0.5)
    with pytest.raises(TypeError, match=r"^moe_mlp: batch_invariant: expected True or False, got 1$"):
        dmoe.functional.moe_mlp(x, ids, gates, weights, batch_invariant=1)
    meta = dmoe.ExpertWeights(up_proj=weights.up_proj.to("meta"), down_proj=weights.down_proj.to("meta"), gated=True)
    given = (x.to("meta"), ids.to("meta"), gates.to("meta"))
    assert dmoe.functional.moe_mlp(*given, meta, batch_invariant=True).shape == (3, 8)


@needs_kernels
@pytest.mark.parametrize("targets", ["router", "experts"])
def test_adapters_are_refused(targets):
    layer = MoE(**SIZES, batch_invariant=True)
    layer(torch.randn(3, 12))
    dmoe.lora.add(layer, rank=2, targets=(targets,))
    with pytest.raises(ValueError, match=r"expected no adapter.* with batch_invariant=True"):
        layer(torch.randn(3, 12))


def test_devices_that_nobody_promises_it_for_are_refused():
    """CUDA's answer, which needs no GPU to be read: the implementation behind the operation."""
    from dmoe.ops.batch_invariance import refuse

    with pytest.raises(NotImplementedError, match=r"^batch_invariant: expected CPU tensors .*, got tensors on meta"):
        refuse(torch.empty(2, device="meta"), None, 3)


@needs_kernels
def test_operations_keep_pytorchs_contract():
    torch.manual_seed(5)
    a, b = torch.randn(7, 6, dtype=torch.float64), torch.randn(2, 5, 6, dtype=torch.float64)
    offsets = torch.tensor([0, 3, 6], dtype=torch.int32)
    op = torch.ops.dmoe.grouped_gemm_invariant.default
    torch.library.opcheck(op, (a.requires_grad_(), b.requires_grad_(), offsets, True))
    torch.library.opcheck(torch.ops.dmoe.router_scores_invariant.default, (a, "sigmoid", True))
    assert torch.autograd.gradcheck(lambda a, b: op(a, b, offsets, True), (a, b))
    assert torch.autograd.gradcheck(lambda a, b: op(a, b.transpose(1, 2), offsets, False), (a, b))
    assert torch.autograd.gradcheck(linear_invariant, (a, b[0].detach().requires_grad_()))
    for name in ("softmax", "sigmoid", "sqrt_softplus"):
        scores = lambda x, name=name: torch.ops.dmoe.router_scores_invariant(x, name, True)  # noqa: E731
        assert torch.autograd.gradcheck(scores, (4 * a.detach()).requires_grad_())
    assert op(a[:0], b, torch.zeros(3, dtype=torch.int32), True).shape == (0, 5)
    assert op(a, b, offsets, True)[6].abs().sum() == 0  # a row of no expert


@needs_kernels
def test_scores_far_from_zero():
    far = torch.tensor(
        [-1e30, -200.0, -90.0, -20.0, -1e-8, 0.0, 1e-8, 20.0, 200.0, 1e30, torch.nan, torch.inf, -torch.inf]
    )
    for name in ("sigmoid", "sqrt_softplus"):
        for dtype in (torch.float32, torch.float64):
            x = far.to(dtype).unsqueeze(0)
            mine, plain = (
                op(x, name, False)[0] for op in (torch.ops.dmoe.router_scores_invariant, torch.ops.dmoe.router_scores)
            )
            torch.testing.assert_close(mine, plain, equal_nan=True)
