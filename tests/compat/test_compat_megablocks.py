"""MegaBlocks' layers on dmoe: against loops over tokens and checkpoints in its layout, its losses, its known bugs."""

from __future__ import annotations

import copy
import gc
import importlib
import pickle
import re
import types
import warnings
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_as_accurate, nudged, without_generated_products
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import dmoe
from dmoe.compat import megablocks
from dmoe.compat.megablocks.layers import common, mpu, saved
from dmoe.compat.megablocks.layers.arguments import DEFAULT_ACTIVATION_FN, from_megatron
from dmoe.compat.megablocks.layers.glu import GroupedGLU
from dmoe.compat.megablocks.layers.mlp import GroupedMLP, fused_activation
from dmoe.compat.megablocks.layers.moe import _LOADS
from dmoe.compat.megablocks.layers.router import _LOGITS, batched_router_zloss, clear_router_zloss

pytestmark = without_generated_products
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _nothing_left_over():
    for rounds in (_LOADS, _LOGITS):
        rounds.clear()
        rounds._warned = False
    yield
    for rounds in (_LOADS, _LOGITS):
        rounds.clear()


def arguments(**options):
    base = {"hidden_size": 6, "ffn_hidden_size": 10, "moe_num_experts": 4, "moe_top_k": 2, "fp16": False}
    return megablocks.Arguments(**{**base, "device": "cpu", **options})


def layer_of(kind, **options):
    args = arguments(**options)
    return (megablocks.MoE if kind == "MoE" else megablocks.dMoE)(args), args


def is_moe(layer):
    return type(layer) is megablocks.MoE


# ---- The oracle: token by token, from a checkpoint in MegaBlocks' names and shapes. Imports nothing of dmoe.


def expert(state, e, token, args, capacity_form):
    """One token (H,) through expert e, read out of w1, v1 and w2 as MegaBlocks stores them."""
    width = args.ffn_hidden_size
    w1, w2 = state["experts.mlp.w1"], state["experts.mlp.w2"]
    if capacity_form:  # (E, H, F) and (E, F, H)
        return args.activation_fn(token @ w1[e]) @ w2[e]
    rows = slice(e * width, (e + 1) * width)  # (E * F, H)
    hidden = args.activation_fn(w1[rows] @ token)
    if args.mlp_type == "glu":
        hidden = hidden * (state["experts.mlp.v1"][rows] @ token)
    return hidden @ w2[rows]


def choose(scores, args):
    """Ids (T, K) and weights (T, K) of each token's choices."""
    tokens, top_k = scores.shape[0], args.moe_top_k
    chosen = [sorted(range(args.moe_num_experts), key=lambda e: -row[e])[:top_k] for row in scores.detach().tolist()]
    weights = scores.gather(1, torch.tensor(chosen).view(tokens, top_k).long())
    if args.moe_normalize_expert_weights:
        p = float(args.moe_normalize_expert_weights)
        weights = weights / (weights**p).sum(1, keepdim=True) ** (1 / p)
    if args.uniform_expert_assignment:
        chosen = [[(t * top_k + k) % args.moe_num_experts for k in range(top_k)] for t in range(tokens)]
    return chosen, weights


def experts_by_loops(state, tokens, chosen, weights, args, capacity_form):
    """Weighted sums (T, H) and the number of assignments of each expert, with MegaBlocks' capacity and drop order."""
    counts = [sum(row.count(e) for row in chosen) for e in range(args.moe_num_experts)]
    limit = max(counts, default=0)
    if capacity_form:
        share = args.moe_top_k * tokens.shape[0] / args.moe_num_experts
        limit = int(args.moe_capacity_factor * share) or limit
    used, rows = [0] * args.moe_num_experts, []
    for t, token in enumerate(tokens):
        total = torch.zeros(tokens.shape[1], dtype=weights.dtype)
        for k, e in enumerate(chosen[t]):
            used[e] += 1
            if used[e] <= limit:
                total = total + weights[t, k] * expert(state, e, token, args, capacity_form)
        rows.append(total)
    out = torch.stack(rows).to(tokens.dtype) if rows else tokens * 0
    return out, counts


def layer_by_loops(state, x, args, capacity_form):
    """(output with the bias added, scores, counts, router logits)."""
    tokens = x.reshape(-1, x.shape[-1])
    logits = tokens @ state["router.layer.weight"].T
    scores = torch.softmax(logits, -1)
    chosen, weights = choose(scores, args)
    out, counts = experts_by_loops(state, tokens, chosen, weights, args, capacity_form)
    if args.bias:
        out = out + state["experts.bias"]
    if args.shared_expert:
        linear = {
            name: (state[f"shared_expert.{name}.weight"], state.get(f"shared_expert.{name}.bias"))
            for name in ("up_proj", "down_proj", "gate_proj")
            if f"shared_expert.{name}.weight" in state
        }
        hidden = F.linear(tokens, *linear["up_proj"])
        if args.mlp_type == "glu":
            hidden = hidden * args.activation_fn(F.linear(tokens, *linear["gate_proj"]))
        else:
            hidden = args.activation_fn(hidden)
        shared = F.linear(hidden, *linear["down_proj"])
        if args.shared_expert_weighted_sum:
            share = 1 / (args.moe_top_k + 1)
            out, shared = out * (1 - share), shared * share
        out = out + shared
    return out.view(x.shape), scores, counts, logits


ACTIVATIONS = {
    "default": DEFAULT_ACTIVATION_FN,
    "gelu": F.gelu,
    "silu": F.silu,
    "relu": nn.ReLU(),
    "unknown": lambda x: torch.sin(x) + x,
}


@st.composite
def layers(draw):
    kind = draw(st.sampled_from(["MoE", "dMoE"]))
    experts = draw(st.integers(1, 5))
    torch.manual_seed(draw(st.integers(0, 2**20)))
    shared = draw(st.booleans())
    layer, args = layer_of(
        kind,
        hidden_size=draw(st.integers(1, 7)),
        ffn_hidden_size=draw(st.integers(1, 9)),
        moe_num_experts=experts,
        moe_top_k=draw(st.integers(1, experts)),
        moe_capacity_factor=draw(st.sampled_from([0, 0.4, 1, 1.1, 2])),
        moe_normalize_expert_weights=draw(st.sampled_from([None, 0, 1, 2, 3.5])),
        mlp_type="mlp" if kind == "MoE" else draw(st.sampled_from(["mlp", "glu"])),
        mlp_impl=draw(st.sampled_from(["grouped", "sparse"])),
        memory_optimized_mlp=draw(st.booleans()),
        bias=draw(st.booleans()),
        return_bias=draw(st.booleans()),
        uniform_expert_assignment=draw(st.booleans()),
        activation_fn=ACTIVATIONS[draw(st.sampled_from(sorted(ACTIVATIONS)))],
        shared_expert=shared,
        shared_expert_weighted_sum=draw(st.booleans()),
        shared_expert_hidden_size=draw(st.sampled_from([None, 5])),
        moe_zloss_weight=draw(st.sampled_from([0, 0.3])),
        init_method=partial(nn.init.normal_, std=0.7),
        output_layer_init_method=partial(nn.init.normal_, std=0.5),
    )
    layer = layer.double()
    if args.bias:
        nn.init.normal_(layer.experts.bias)
    leading = draw(st.sampled_from([(0, 3), (1, 1), (4, 3), (7, 2), (5,), (2, 2, 3)]))
    x = torch.randn(*leading, 2 * args.hidden_size, dtype=torch.float64)[..., 1::2]
    return layer, args, x.detach()


def bias_added(result, args):
    """The layer's result as one tensor, after a look at its form."""
    if not (args.bias and args.return_bias):
        return result
    out, bias = result
    return out + bias


def leaves(layer):
    return {name: tensor.clone().requires_grad_() for name, tensor in layer.state_dict().items()}


def grads_as_checkpoint(layer):
    """The parameters' gradients, in the names and shapes of a checkpoint."""
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        for to, parameter in zip(twin.parameters(), layer.parameters(), strict=True):
            to.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    return twin.state_dict()


@given(layers())
@settings(max_examples=150)
def test_a_layer_is_the_loop_and_so_are_its_gradients_and_losses(case):
    layer, args, x = case
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    result = layer(ours)
    assert isinstance(result, tuple) == (args.bias and args.return_bias)
    y = bias_added(result, args)
    state = leaves(layer)
    expected, scores, counts, logits = layer_by_loops(state, theirs, args, is_moe(layer))
    close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-11)
    assert y.shape == x.shape
    close(y, expected)
    ((saved_counts, saved_scores),) = megablocks.get_load_balancing_loss()
    assert saved_counts.tolist() == counts
    close(saved_scores, scores)

    tokens = scores.shape[0]
    share = torch.tensor(counts, dtype=torch.float64) / max(tokens * args.moe_top_k, 1)
    balance = args.moe_loss_weight * args.moe_num_experts * (share * scores.sum(0) / max(tokens, 1)).sum()
    loss = megablocks.batched_load_balancing_loss(args)
    close(loss, balance)
    upstream = torch.randn_like(y)
    total, expected_total = (y * upstream).sum() + loss, (expected * upstream).sum() + balance
    if args.moe_zloss_weight:
        z = batched_router_zloss(args)
        terms = [torch.logsumexp(row, 0) ** 2 for row in logits]
        expected_z = args.moe_zloss_weight * (torch.stack(terms).mean() if terms else logits.sum())
        close(z, expected_z[None])
        total, expected_total = total + z.sum(), expected_total + expected_z
    total.backward()
    expected_total.backward()
    close(ours.grad, theirs.grad)
    for name, grad in grads_as_checkpoint(layer).items():
        close(grad, torch.zeros_like(grad) if state[name].grad is None else state[name].grad, msg=name)
    megablocks.clear_load_balancing_loss()
    clear_router_zloss()


@given(
    st.sampled_from(["MoE", "dMoE", "dMoE glu"]),
    st.sampled_from(["default", "unknown"]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.integers(0, 2**20),
)
@settings(max_examples=40)
def test_experts_are_as_accurate_as_plain_products(kind, activation, dtype, seed):
    torch.manual_seed(seed)
    layer, args = layer_of(
        kind.split()[0],
        mlp_type="glu" if kind.endswith("glu") else "mlp",
        activation_fn=ACTIVATIONS[activation],
        bias=False,
        init_method=partial(nn.init.normal_, std=0.5),
        output_layer_init_method=partial(nn.init.normal_, std=0.5),
    )
    layer = layer.to(dtype).eval()
    x = torch.randn(3, 4, args.hidden_size).to(dtype)
    scores, weights, top = layer.router(x)
    assert scores.dtype == weights.dtype == dtype
    assert top.dtype == torch.int64
    y = layer.experts(x, scores, weights, top)
    assert y.dtype == dtype
    state = layer.state_dict()

    def loops(state, x, weights, wide):
        state = {name: tensor.to(wide) for name, tensor in state.items()}
        x, weights = x.to(wide).flatten(0, 1), weights.to(wide)
        return experts_by_loops(state, x, top.tolist(), weights, args, is_moe(layer))[0]

    own = []
    for _ in range(6):
        moved = {name: nudged(tensor) for name, tensor in state.items()}, nudged(x), weights
        own.append((loops(*moved, dtype), loops(*moved, torch.float64)))
    exact = loops(state, x, weights, torch.float64)
    assert_as_accurate("y", y.flatten(0, 1), exact, own)


@pytest.mark.parametrize("fp16", [True, False])
def test_dtypes_are_those_of_the_arguments(fp16):
    dtype = torch.float16 if fp16 else torch.bfloat16
    for kind in ("MoE", "dMoE"):
        layer, args = layer_of(kind, fp16=fp16, bf16=True, shared_expert=True)  # fp16 comes first
        assert {parameter.dtype for parameter in layer.parameters()} == {dtype}
        out, bias = layer(torch.randn(3, 2, 6, dtype=dtype))
        assert out.dtype == bias.dtype == dtype
        assert megablocks.batched_load_balancing_loss(args).dtype == dtype
        args.moe_lbl_in_fp32 = True
        assert megablocks.batched_load_balancing_loss(args).dtype == torch.float32
        megablocks.clear_load_balancing_loss()
    assert common.dtype(arguments()) is None


def test_under_autocast_tokens_are_cast_before_they_move():
    torch.manual_seed(0)
    for kind, activation in (("MoE", F.silu), ("dMoE", ACTIVATIONS["unknown"])):
        layer, args = layer_of(kind, activation_fn=activation, bias=False)
        x = torch.randn(3, 4, 6, requires_grad=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(x)
            loss = megablocks.batched_load_balancing_loss(args)
        assert y.dtype == torch.bfloat16
        assert loss.dtype == torch.float32  # a softmax runs in float32 under autocast
        megablocks.clear_load_balancing_loss()
        torch.testing.assert_close(y.float(), layer(x), rtol=0.1, atol=0.02 * layer(x).abs().max().item())
        y.float().sum().backward()
        assert x.grad.dtype == torch.float32
        megablocks.clear_load_balancing_loss()


def test_jitter_moves_the_router_alone_and_only_in_training(monkeypatch):
    torch.manual_seed(0)
    layer, args = layer_of("dMoE", moe_jitter_eps=0.5, bias=False)
    layer = layer.double()
    x = torch.randn(40, 50, 6, dtype=torch.float64)
    noise = layer.router.jitter(x)
    assert 0.5 <= noise.min() < 0.51
    assert 1.49 < noise.max() < 1.5
    assert noise.dtype == x.dtype
    monkeypatch.setattr(layer.router, "jitter", lambda x: noise)
    state = layer.state_dict()
    scores = torch.softmax((x * noise).flatten(0, 1) @ state["router.layer.weight"].T, -1)
    chosen, weights = choose(scores, args)
    expected, _ = experts_by_loops(state, x.flatten(0, 1)[:30], chosen[:30], weights[:30], args, False)
    torch.testing.assert_close(layer(x).flatten(0, 1)[:30], expected)
    layer.eval()
    expected, *_ = layer_by_loops(state, x[:2], args, False)
    torch.testing.assert_close(layer(x)[:2], expected)


# ---- The capacity


@pytest.mark.parametrize(
    ("factor", "tokens", "top_k", "experts", "rows"),
    [(1, 8, 2, 4, 4), (1, 7, 2, 4, 3), (1.1, 10, 1, 1, 11), (0.5, 3, 1, 4, 0), (0, 100, 2, 4, 0), (1, 0, 1, 4, 0)],
)
def test_capacity_is_counted_once_per_choice(factor, tokens, top_k, experts, rows):
    layer, _ = layer_of("MoE", moe_capacity_factor=factor, moe_top_k=top_k, moe_num_experts=experts)
    assert layer.experts.expert_capacity(tokens) == rows


def test_the_capacity_drops_later_tokens_and_nothing_else():
    layer, _ = layer_of("MoE", moe_num_experts=2, moe_top_k=1, moe_capacity_factor=1, bias=False)
    x = torch.randn(6, 1, 6)
    top, weights = torch.tensor([[0], [0], [1], [0], [0], [1]]), torch.ones(6, 1)
    y = layer.experts(x, torch.zeros(6, 2), weights, top)
    assert (y.abs().sum((1, 2)) > 0).tolist() == [True, True, True, True, False, True]
    layer.experts.args.moe_capacity_factor = 0  # all
    megablocks.clear_load_balancing_loss()
    assert (layer.experts(x, torch.zeros(6, 2), weights, top).abs().sum((1, 2)) > 0).all()


# ---- Checkpoints


@pytest.mark.parametrize(
    ("kind", "mlp_type", "shapes"),
    [
        ("MoE", "mlp", {"w1": (4, 6, 10), "w2": (4, 10, 6)}),
        ("dMoE", "mlp", {"w1": (40, 6), "w2": (40, 6)}),
        ("dMoE", "glu", {"w1": (40, 6), "v1": (40, 6), "w2": (40, 6)}),
    ],
)
def test_a_state_dict_has_megablocks_names_and_shapes_and_loads_again(kind, mlp_type, shapes, tmp_path):
    layer, _ = layer_of(kind, mlp_type=mlp_type, shared_expert=True)
    model = nn.Sequential(nn.Linear(6, 6), layer).eval()
    state = model.state_dict()
    names = {f"1.experts.mlp.{name}": shape for name, shape in shapes.items()}
    names |= {"1.router.layer.weight": (4, 6), "1.experts.bias": (6,), "0.weight": (6, 6), "0.bias": (6,)}
    linears = {"up_proj": (10, 6), "down_proj": (6, 10)} | ({"gate_proj": (10, 6)} if mlp_type == "glu" else {})
    for name, shape in linears.items():
        names |= {f"1.shared_expert.{name}.weight": shape, f"1.shared_expert.{name}.bias": shape[:1]}
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == names
    assert all(tensor.is_contiguous() and not tensor.requires_grad for tensor in state.values())

    torch.save(state, tmp_path / "model.pt")
    fresh = nn.Sequential(nn.Linear(6, 6), layer_of(kind, mlp_type=mlp_type, shared_expert=True)[0]).eval()
    before = fresh(torch.ones(1, 6))[0]
    missing, unexpected = fresh.load_state_dict(torch.load(tmp_path / "model.pt"))
    assert (missing, unexpected) == ([], [])
    for (name, ours), (_, theirs) in zip(fresh.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    x = torch.randn(5, 6)
    assert torch.equal(fresh(x)[0], model(x)[0])
    assert not torch.equal(before, fresh(torch.ones(1, 6))[0])

    meta = copy.deepcopy(model).to("meta")
    meta.load_state_dict(state, assign=True)
    assert torch.equal(meta(x)[0], model(x)[0])
    assert all(parameter.is_contiguous() for parameter in meta.parameters())
    assert dmoe.is_expert_param(meta[1].experts.mlp.w2)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x)[0], model(x)[0])


@pytest.mark.parametrize(("kind", "mlp_type"), [("MoE", "mlp"), ("dMoE", "mlp"), ("dMoE", "glu")])
def test_a_checkpoint_that_megablocks_wrote_computes_the_same(kind, mlp_type):
    torch.manual_seed(0)
    layer, args = layer_of(kind, mlp_type=mlp_type, return_bias=False)
    capacity_form = kind == "MoE"
    state = {"router.layer.weight": torch.randn(4, 6), "experts.bias": torch.randn(6)}
    state["experts.mlp.w1"] = torch.randn(4, 6, 10) if capacity_form else torch.randn(40, 6)
    state["experts.mlp.w2"] = torch.randn(4, 10, 6) if capacity_form else torch.randn(40, 6)
    if mlp_type == "glu":
        state["experts.mlp.v1"] = torch.randn(40, 6)
    layer.load_state_dict({name: tensor.clone() for name, tensor in state.items()})
    x = torch.randn(3, 4, 6)
    torch.testing.assert_close(layer(x), layer_by_loops(state, x, args, capacity_form)[0], rtol=1e-4, atol=1e-4)
    again = layer.state_dict()
    assert all(torch.equal(again[name], state[name]) for name in state)


def test_what_a_checkpoint_lacks_or_has_too_much_is_named():
    layer, _ = layer_of("dMoE", mlp_type="glu")
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    kept = layer.experts.mlp.v1.detach().clone()
    partial_state = {name: tensor + 1 for name, tensor in state.items() if not name.endswith("v1")}
    with pytest.raises(RuntimeError, match=r"Missing key.*experts\.mlp\.v1"):
        layer.load_state_dict(partial_state)
    layer.load_state_dict(state)
    missing, unexpected = layer.load_state_dict({**partial_state, "experts.mlp.up_proj": kept}, strict=False)
    assert (missing, unexpected) == (["experts.mlp.v1"], ["experts.mlp.up_proj"])
    assert torch.equal(layer.experts.mlp.v1, kept)
    assert torch.equal(layer.experts.mlp.w1, state["experts.mlp.w1"] + 1)
    with pytest.raises(RuntimeError, match=r"size mismatch for experts\.mlp\.w2: .*\[20, 6\].*\[40, 6\]"):
        layer.load_state_dict({**state, "experts.mlp.w2": state["experts.mlp.w2"][:20]})


def test_the_users_functions_initialise_weights_in_megablocks_orientation():
    seen = []

    def init(tensor):
        seen.append(tuple(tensor.shape))
        with torch.no_grad():
            tensor.copy_(torch.arange(tensor.shape[-2]).unsqueeze(1).expand_as(tensor))

    gated, _ = layer_of("dMoE", mlp_type="glu", init_method=init, output_layer_init_method=nn.init.ones_)
    assert seen == [(4, 6), (4, 10, 6), (4, 10, 6)]
    rows = torch.arange(10.0).repeat(4).unsqueeze(1).expand(40, 6)
    state = gated.state_dict()
    assert torch.equal(state["experts.mlp.w1"], rows)
    assert torch.equal(state["experts.mlp.v1"], rows)
    assert (state["experts.mlp.w2"] == 1).all()
    moe, _ = layer_of("MoE", init_method=init, output_layer_init_method=nn.init.ones_)
    assert torch.equal(moe.state_dict()["experts.mlp.w1"], torch.arange(10.0).expand(4, 6, 10))
    assert not moe.experts.bias.any()
    layer_of("dMoE", device="meta")  # nothing to fill


# ---- The losses over layers


def test_the_batched_loss_is_one_when_even_and_counts_every_layer():
    args = arguments(num_layers=3, moe_loss_weight=0.5)
    for _ in range(3):
        megablocks.save_load_balancing_loss((torch.tensor([3, 3, 3, 3]), torch.full((6, 4), 0.25)))
    assert megablocks.batched_load_balancing_loss(args).item() == pytest.approx(0.5)
    megablocks.clear_load_balancing_loss()
    # every token to expert 0, with certainty: E times as much
    for _ in range(3):
        megablocks.save_load_balancing_loss((torch.tensor([12, 0, 0, 0]), torch.eye(4)[[0] * 6]))
    assert megablocks.batched_load_balancing_loss(args).item() == pytest.approx(2.0)


def test_a_pipeline_stage_has_its_share_of_layers():
    entry = (torch.tensor([3, 3, 3, 3]), torch.full((6, 4), 0.25))
    for options, count in (
        ({"num_layers": 6, "pipeline_model_parallel_size": 3}, 2),
        ({"num_layers": 6, "pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1}, 1),
    ):
        args = arguments(**options)
        assert saved.layers_per_stage(args) == count
        for _ in range(count):
            with pytest.raises(ValueError, match=rf"expected {count} layers .*got {len(_LOADS)} since"):
                megablocks.batched_load_balancing_loss(args)
            megablocks.save_load_balancing_loss(entry)
        # the whole model's loss is the sum over its stages
        assert megablocks.batched_load_balancing_loss(args).item() == pytest.approx(0.1 * count / 6)
        megablocks.clear_load_balancing_loss()


def test_counts_beyond_half_precision_do_not_overflow():
    megablocks.save_load_balancing_loss((torch.tensor([70_000]), torch.ones(70_000, 1, dtype=torch.float16)))
    loss = megablocks.batched_load_balancing_loss(arguments(moe_num_experts=1, moe_top_k=1, moe_loss_weight=0.25))
    assert loss.dtype == torch.float16
    assert loss.item() == 0.25


def test_shapes_that_disagree_and_a_weight_of_zero():
    args = arguments(num_layers=2)
    megablocks.save_load_balancing_loss((torch.zeros(4), torch.zeros(6, 4)))
    megablocks.save_load_balancing_loss((torch.zeros(4), torch.zeros(5, 4)))
    with pytest.raises(ValueError, match=r"expert_scores \(6, 4\) of every layer, got \(4,\) and \(5, 4\)"):
        megablocks.batched_load_balancing_loss(args)
    assert megablocks.batched_load_balancing_loss(arguments(moe_loss_weight=0)) == 0.0
    layer, _ = layer_of("dMoE", moe_loss_weight=0)
    megablocks.clear_load_balancing_loss()
    layer(torch.randn(2, 3, 6))
    assert megablocks.get_load_balancing_loss() == []


def test_a_layers_own_loss_is_the_same_without_its_weight():
    layer, args = layer_of("MoE")
    layer(torch.randn(5, 2, 6))
    ((counts, scores),) = megablocks.get_load_balancing_loss()
    own = layer.experts.load_balancing_loss(counts, scores) * args.moe_loss_weight
    torch.testing.assert_close(own, megablocks.batched_load_balancing_loss(args))


@pytest.mark.parametrize("kind", ["MoE", "dMoE"])
def test_zero_tokens_give_zero_losses_and_gradients(kind):
    layer, args = layer_of(kind, moe_zloss_weight=1.0, shared_expert=True)
    x = torch.zeros(0, 3, 6, requires_grad=True)
    out, _ = layer(x)
    loss = out.sum() + megablocks.batched_load_balancing_loss(args) + batched_router_zloss(args).sum()
    assert loss.item() == 0
    loss.backward()
    assert all(not parameter.grad.any() for parameter in layer.parameters() if parameter.grad is not None)
    assert x.grad.shape == x.shape


def test_an_evaluation_leaves_nothing():
    layer, args = layer_of("dMoE", moe_zloss_weight=1.0)
    layer.eval()
    for _ in range(3):
        layer(torch.randn(2, 3, 6))
    assert len(_LOADS) == len(_LOGITS) == 0
    assert batched_router_zloss(args).item() == 0
    with pytest.raises(ValueError, match="got 0 since"):
        megablocks.batched_load_balancing_loss(args)
    with pytest.warns(UserWarning, match="moe_zloss_weight is 0"):
        assert batched_router_zloss(arguments()) == 0


def test_the_z_loss_has_a_value_for_each_router_in_the_dtype_asked_for():
    model, args = stack(2, bf16=True)
    model(torch.randn(3, 6, dtype=torch.bfloat16))
    logits = [logits.double() for logits in _LOGITS.values()]
    expected = 0.1 * torch.stack([torch.logsumexp(rows, 1).square().mean() for rows in logits])
    for in_fp32, dtype in ((False, torch.bfloat16), (True, torch.float32)):
        args.moe_zloss_in_fp32 = in_fp32
        z = batched_router_zloss(args)
        assert z.dtype == dtype
        torch.testing.assert_close(z.double(), expected, rtol=8 * torch.finfo(dtype).eps, atol=0)


def stack(count, **options):
    args = arguments(bias=False, moe_zloss_weight=0.1, **options)
    return nn.Sequential(*(megablocks.dMoE(args) for _ in range(count))), args


@pytest.mark.parametrize("num_layers", [1, 3])
def test_rounds_that_nobody_clears_do_not_pile_up(num_layers):
    model, args = stack(3, num_layers=num_layers)
    first = []

    def record(module, inputs, output):
        first.append(weakref.ref(output[0]))

    handle = model[0].router.register_forward_hook(record)
    model(torch.randn(2, 5, 6))
    handle.remove()
    gc.collect()
    assert first[0]() is not None  # kept for the loss
    assert len(megablocks.get_load_balancing_loss()) == 3  # every layer's, whatever num_layers says
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(5):
            model(torch.randn(2, 5, 6))
            assert (len(_LOADS), len(_LOGITS)) == (3, 3)
    for what in ("load-balancing loss", "router z-loss"):  # once each
        assert len([w for w in caught if f"the {what} of the first was cleared" in str(w.message)]) == 1
    gc.collect()
    assert first[0]() is None
    if num_layers == 3:  # what is left is one whole round, of the last forward
        own = megablocks.batched_load_balancing_loss(args)
        megablocks.clear_load_balancing_loss()
        assert own.requires_grad


def test_clearing_lets_the_graph_go():
    model, args = stack(2, num_layers=2)
    scores = []
    model[1].router.register_forward_hook(lambda module, inputs, output: scores.append(weakref.ref(output[0])))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            out = model(torch.randn(2, 5, 6))
            (out.sum() + megablocks.batched_load_balancing_loss(args) + batched_router_zloss(args).sum()).backward()
            megablocks.clear_load_balancing_loss()
            clear_router_zloss()
            del out
            gc.collect()
    assert len(scores) == 3
    assert all(ref() is None for ref in scores)


def test_one_layer_called_twice_in_a_forward_counts_twice():
    layer, args = layer_of("dMoE", num_layers=2, bias=False)
    for _ in range(2):
        layer(layer(torch.randn(2, 3, 6)))
        assert len(_LOADS) == 2
        megablocks.batched_load_balancing_loss(args)
        megablocks.clear_load_balancing_loss()


def test_what_is_handed_out_is_the_callers_own_list():
    layer, _ = layer_of("dMoE")
    layer(torch.randn(2, 3, 6))
    handed = megablocks.get_load_balancing_loss()
    handed.clear()
    assert len(megablocks.get_load_balancing_loss()) == 1


def test_checkpointed_layers_leave_their_loss_once():
    torch.manual_seed(0)
    model, args = stack(2, num_layers=2)
    model = model.double()
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    grads = []
    for checkpointed in (False, True):
        model.zero_grad()
        y = x
        for layer in model:
            y = checkpoint(layer, y, use_reentrant=False) if checkpointed else layer(y)
        loss = y.sum() + megablocks.batched_load_balancing_loss(args) + batched_router_zloss(args).sum()
        megablocks.clear_load_balancing_loss()
        clear_router_zloss()
        loss.backward()
        assert len(_LOADS) == len(_LOGITS) == 0  # the second forward, inside backward, left nothing
        grads.append([parameter.grad.clone() for parameter in model.parameters()])
    for plain, again in zip(*grads, strict=True):
        torch.testing.assert_close(plain, again)


def test_a_loss_that_has_lost_its_graph_is_refused():
    model, args = stack(1)
    x = torch.randn(2, 5, 6, requires_grad=True)
    checkpoint(model, x, use_reentrant=True)
    with pytest.raises(RuntimeError, match=r"load-balancing loss has no graph.*use_reentrant=False"):
        megablocks.batched_load_balancing_loss(args)
    with pytest.raises(RuntimeError, match=r"router z-loss has no graph"):
        batched_router_zloss(args)
    with torch.no_grad():
        assert megablocks.batched_load_balancing_loss(args) > 0


# ---- Options


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"quantize_inputs_num_bits": 8}, NotImplementedError, "does not quantize"),
        ({"quantize_rematerialize_num_bits": 4}, NotImplementedError, "does not quantize"),
        ({"quantize_scatter_num_bits": 8}, NotImplementedError, "does not quantize"),
        ({"mlp_type": "moe"}, ValueError, "'mlp' or 'glu'"),
        ({"mlp_impl": "torch"}, ValueError, "'grouped' or 'sparse'"),
        ({"moe_top_k": 5}, ValueError, "1 to moe_num_experts = 4"),
        ({"moe_top_k": 0}, ValueError, "1 to moe_num_experts = 4"),
        ({"hidden_size": 0}, ValueError, "at least 1"),
        ({"ffn_hidden_size": 0}, ValueError, "at least 1"),
        ({"num_layers": 0}, ValueError, "at least 1"),
        ({"moe_num_experts": 0}, ValueError, "at least 1"),
        ({"pipeline_model_parallel_size": 0}, ValueError, "at least 1"),
        ({"moe_capacity_factor": -1}, ValueError, "at least 0"),
        ({"moe_normalize_expert_weights": 0.5}, ValueError, "finite p >= 1"),
        ({"moe_normalize_expert_weights": float("inf")}, ValueError, "finite p >= 1"),
        ({"moe_jitter_eps": -0.1}, ValueError, "at least 0"),
        ({"moe_loss_weight": -1.0}, ValueError, "at least 0"),
        ({"moe_zloss_weight": -1.0}, ValueError, "at least 0"),
        ({"activation_fn": None}, ValueError, "a function"),
        ({"shared_expert_hidden_size": 0}, ValueError, "at least 1"),
    ],
)
def test_what_is_not_offered_is_refused(options, error, message):
    (name, value), args = *options.items(), arguments()
    pattern = rf"^Arguments: {name}: expected .*got {re.escape(repr(value))}"
    with pytest.raises(error, match=pattern) as caught:
        arguments(**options)
    assert message in str(caught.value)
    setattr(args, name, value)  # as Megatron's adapters do
    for layer in (megablocks.MoE, megablocks.dMoE, megablocks.ParallelMLP, megablocks.ParallelDroplessMLP):
        with pytest.raises(error, match=pattern):
            layer(args)


def test_gated_experts_with_a_capacity_are_refused():
    with pytest.raises(ValueError, match=r"MoE: mlp_type: expected 'mlp', got 'glu'"):
        layer_of("MoE", mlp_type="glu")


def test_every_option_of_megablocks_exists_with_its_default():
    args = megablocks.Arguments()
    defaults = {
        "hidden_size": 1024, "ffn_hidden_size": 4096, "num_layers": 1, "bias": True, "return_bias": True,
        "moe_num_experts": 1, "moe_top_k": 1, "moe_capacity_factor": 1, "moe_normalize_expert_weights": None,
        "moe_loss_weight": 0.1, "moe_jitter_eps": None, "moe_lbl_in_fp32": False,
        "moe_expert_model_parallelism": False, "expert_parallel_group": None, "pipeline_model_parallel_size": 1,
        "num_layers_per_virtual_pipeline_stage": None, "memory_optimized_mlp": False, "mlp_type": "mlp",
        "mlp_impl": "grouped", "fp16": True, "bf16": False, "uniform_expert_assignment": False,
        "shared_expert": False, "fc_cls": nn.Linear, "fc_kwargs": {}, "remat_act_fn": True,
        "shared_expert_hidden_size": 4096, "shared_expert_weighted_sum": False, "moe_zloss_weight": 0,
        "moe_zloss_in_fp32": False,
    }  # fmt: skip
    assert {name: getattr(args, name) for name in defaults} == defaults
    x = torch.randn(5)
    assert torch.equal(args.activation_fn(x), F.gelu(x, approximate="tanh"))
    for init in (args.init_method, args.output_layer_init_method):
        drawn = init(torch.empty(100_000))
        assert drawn.std() == pytest.approx(0.02, rel=0.02)
    expected = torch.cuda.current_device() if torch.cuda.is_available() else torch.device("cpu")
    assert args.device == expected


def test_arguments_of_megatron_are_taken_by_name():
    theirs = types.SimpleNamespace(
        hidden_size=12, ffn_hidden_size=20, moe_num_experts=8, moe_top_k=2, micro_batch_size=3, fp16=False
    )
    args = from_megatron(theirs)
    assert (args.hidden_size, args.moe_num_experts, args.moe_top_k, args.fp16) == (12, 8, 2, False)
    assert args.shared_expert_hidden_size == 20
    theirs.quantize_inputs_num_bits = 8
    with pytest.raises(NotImplementedError, match="quantize_inputs_num_bits"):
        from_megatron(theirs)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (DEFAULT_ACTIVATION_FN, "gelu_tanh"), (F.gelu, "gelu"), (partial(F.gelu, approximate="none"), "gelu"),
        (partial(F.gelu), "gelu"), (nn.GELU(), "gelu"), (nn.GELU("tanh"), "gelu_tanh"), (F.silu, "silu"),
        (nn.SiLU(), "silu"), (F.relu, "relu"), (torch.relu, "relu"), (nn.ReLU(), "relu"), (torch.tanh, None),
        (partial(F.silu, inplace=True), None), (lambda x: x, None), (None, None),
    ],
)  # fmt: skip
def test_known_activations_are_fused(function, name):
    assert fused_activation(function) == name


def test_a_shared_expert_takes_any_linear():
    made = []

    class Linear(nn.Linear):
        def __init__(self, *sizes, bias, device, init_std):
            super().__init__(*sizes, bias=bias, device=device)
            made.append((sizes, bias, init_std))

    layer, _ = layer_of(
        "dMoE", mlp_type="glu", bias=False, shared_expert=True, shared_expert_hidden_size=7, fc_cls=Linear,
        fc_kwargs={"init_std": 0.1},
    )  # fmt: skip
    assert made == [((6, 7), False, 0.1), ((7, 6), False, 0.1), ((6, 7), False, 0.1)]
    assert layer.shared_expert.down_proj._is_residual
    assert layer(torch.randn(2, 3, 6)).shape == (2, 3, 6)


# ---- The pieces by themselves


def test_experts_run_on_rows_that_the_user_has_sorted():
    torch.manual_seed(0)
    rows, sizes = torch.randn(9, 6, dtype=torch.float64), [4, 0, 5, 0]
    for cls, mlp_type in ((GroupedMLP, "mlp"), (GroupedGLU, "glu")):
        args = arguments(mlp_type=mlp_type)
        mlp = cls(args).double()
        state = {f"experts.mlp.{name}": tensor for name, tensor in mlp.state_dict().items()}
        expected = torch.stack([expert(state, 0 if r < 4 else 2, rows[r], args, False) for r in range(9)])
        torch.testing.assert_close(mlp(rows, torch.tensor(sizes)), expected)

    mlp = megablocks.MLP(arguments()).double()
    state = {f"experts.mlp.{name}": tensor for name, tensor in mlp.state_dict().items()}
    bins = torch.randn(4, 3, 6, dtype=torch.float64)
    expected = torch.stack([
        torch.stack([expert(state, e, token, mlp.args, True) for token in bins[e]]) for e in range(4)
    ])  # fmt: skip
    torch.testing.assert_close(mlp(bins), expected)


@pytest.mark.parametrize("mlp_type", ["mlp", "glu"])
def test_sparse_experts_read_megablocks_topology(mlp_type):
    torch.manual_seed(0)
    args = arguments(mlp_type=mlp_type, mlp_impl="sparse", ffn_hidden_size=8)
    mlp = (megablocks.SparseGLU if mlp_type == "glu" else megablocks.SparseMLP)(args).double()
    padded_bins = torch.tensor([8, 8, 12, 12], dtype=torch.int32)
    topo = types.SimpleNamespace(
        offsets=torch.arange(0, 7, 2, dtype=torch.int32), column_indices=megablocks.ops.topology(padded_bins, 4, 3, 2)
    )
    rows = torch.randn(12, 6, dtype=torch.float64)
    state = {f"experts.mlp.{name}": tensor for name, tensor in mlp.state_dict().items()}
    expected = torch.stack([expert(state, 0 if r < 8 else 2, rows[r], args, False) for r in range(12)])
    torch.testing.assert_close(mlp(rows, topo), expected)
    with pytest.raises(ValueError, match=rf"^{type(mlp).__name__}: expected rows and ffn_hidden_size 8 in whole"):
        mlp(rows[:10], topo)
    mixed = types.SimpleNamespace(offsets=topo.offsets, column_indices=topo.column_indices.flip(0))
    with pytest.raises(ValueError, match="topo: expected all 2 block columns of one expert in each row block"):
        mlp(rows, mixed)
    empty = types.SimpleNamespace(offsets=topo.offsets[:1], column_indices=topo.column_indices[:0])
    assert mlp(rows[:0], empty).shape == (0, 6)


def test_parameters_say_what_they_are():
    layer, args = layer_of("dMoE", mlp_type="glu")
    kinds = {name: mpu.is_moe_param(parameter) for name, parameter in layer.named_parameters()}
    assert kinds == {
        "router.layer.weight": False,
        "experts.bias": False,
        "experts.mlp.w1": True,
        "experts.mlp.w2": True,
        "experts.mlp.v1": True,
    }
    for parameter in layer.parameters():
        assert mpu.is_moe_param(parameter) == dmoe.is_expert_param(parameter)
        assert not mpu.param_is_expert_model_parallel(parameter)
    assert (mpu.get_expert_parallel_world_size(args), mpu.get_expert_parallel_rank(args)) == (1, 0)
    assert (mpu.experts_per_rank(args), mpu.features_per_rank(args)) == (4, 10)
    assert isinstance(layer.experts.mlp, megablocks.SparseMLP)
    assert isinstance(layer.experts, megablocks.ParallelDroplessMLP)


def test_a_users_router_drives_the_experts():
    torch.manual_seed(0)
    args = arguments(bias=False)
    experts = megablocks.ParallelDroplessMLP(args).double()
    state = {f"experts.{name}": tensor for name, tensor in experts.state_dict().items()}
    x, top = torch.randn(5, 6, dtype=torch.float64), torch.randint(0, 4, (5, 2), dtype=torch.int32)
    weights, scores = torch.rand(5, 2, dtype=torch.float64), torch.rand(5, 4, dtype=torch.float64)
    expected, counts = experts_by_loops(state, x, top.tolist(), weights, args, False)
    torch.testing.assert_close(experts(x, scores, weights, top), expected)
    ((saved_counts, saved_scores),) = megablocks.get_load_balancing_loss()
    assert saved_counts.tolist() == counts
    assert saved_scores is scores


@pytest.mark.parametrize(("kind", "mlp_type"), [("MoE", "mlp"), ("dMoE", "glu")])
def test_compiled_layers_keep_their_losses(kind, mlp_type):
    torch._dynamo.reset()
    layer, args = layer_of(kind, mlp_type=mlp_type, bias=False)
    x = torch.randn(3, 4, 6)
    results = []
    for run in (layer, torch.compile(layer, backend="aot_eager")):
        layer.zero_grad()
        (run(x).square().sum() + megablocks.batched_load_balancing_loss(args)).backward()
        megablocks.clear_load_balancing_loss()
        results.append([parameter.grad.clone() for parameter in layer.parameters()])
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(plain, compiled)
    torch._dynamo.reset()
    layer.eval()
    whole = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(whole(x), layer(x))


IMPORTS = """
import megablocks.ops as ops
from megablocks import Arguments, MoE, dMoE, ops, grouped_gemm_util as gg
from megablocks import ParallelMLP, ParallelDroplessMLP, SparseMLP, MLP, SparseGLU, get_load_balancing_loss
from megablocks.layers import common, mpu
from megablocks.layers.arguments import Arguments, DEFAULT_ACTIVATION_FN, InitFn, from_megatron
from megablocks.layers.moe import MoE, ParallelMLP, save_load_balancing_loss, get_load_balancing_loss
from megablocks.layers.moe import clear_load_balancing_loss, batched_load_balancing_loss
from megablocks.layers.dmoe import dMoE, ParallelDroplessMLP
from megablocks.layers.router import LearnedRouter, batched_router_zloss, clear_router_zloss
from megablocks.layers.mlp import MLP, SparseMLP, GroupedMLP, SharedMLP
from megablocks.layers.glu import SparseGLU, GroupedGLU, SharedGLU
from megablocks.grouped_gemm_util import backend, ops as gg_ops
from megablocks.ops import sort, histogram, inclusive_cumsum, exclusive_cumsum, replicate, topology, gather, scatter
from megablocks.ops import padded_gather, padded_scatter, binned_gather, binned_scatter, repeat, round_up, sum
"""


def test_one_substitution_moves_a_users_imports():
    exec(IMPORTS.replace("megablocks", "dmoe.compat.megablocks"), {})
    exec(
        "import grouped_gemm.ops\nfrom grouped_gemm import backend".replace("grouped_gemm", "dmoe.compat.grouped_gemm")
    )
    for module in (megablocks, megablocks.ops, importlib.import_module("dmoe.compat.megablocks.layers")):
        assert all(hasattr(module, name) for name in module.__all__)


def _inits(top):
    return (ROOT / top).rglob("__init__.py")


def test_every_package_is_installed():
    folders = [path.parent.relative_to(ROOT).parts for top in ("dmoe", "integrations") for path in _inits(top)]
    packages = {".".join(parts if parts[0] == "dmoe" else ("dmoe", *parts)) for parts in folders}
    assert set(re.findall(r'^  "(dmoe[\w.]*)",$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)) == packages


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        ([1.0], TypeError, "dMoE: x: expected a tensor, got list"),
        (
            torch.ones(2, 3, 6, dtype=torch.int32),
            TypeError,
            "dMoE: x: expected a floating-point tensor",
        ),
        (torch.ones(2, 3, 5), ValueError, r"dMoE: x: expected shape \(..., hidden_size = 6\), got \(2, 3, 5\)"),
        (torch.ones(()), ValueError, r"dMoE: x: expected shape \(..., hidden_size = 6\), got \(\)"),
    ],
    ids=["list", "integers", "width", "scalar"],
)
def test_bad_input_of_a_layer_is_named(x, error, message):
    layer, _ = layer_of("dMoE")
    with pytest.raises(error, match="^" + message):
        layer(x)
    with pytest.raises(TypeError, match=r"^dMoE: args: expected Arguments, got dict"):
        type(layer)({})
    for name, bad in (("hidden_size", "6"), ("moe_top_k", 1.0), ("init_method", None)):
        with pytest.raises(ValueError, match=f"^Arguments: {name}: expected .*, got {bad!r}"):
            megablocks.Arguments(**{name: bad})


def test_a_deep_copy_knows_its_experts():
    layer, _ = layer_of("dMoE")
    whose = [dmoe.is_expert_param(parameter) for parameter in layer.parameters()]
    assert True in whose
    assert [dmoe.is_expert_param(parameter) for parameter in copy.deepcopy(layer).parameters()] == whose
