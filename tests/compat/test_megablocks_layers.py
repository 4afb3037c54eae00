"""MegaBlocks' layers on dmoe: against loops over tokens, whole and in pieces."""

from __future__ import annotations

import copy
import types
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_as_accurate, nudged, without_generated_products
from hypothesis import given, settings
from hypothesis import strategies as st
from megablocks_cases import arguments
from megablocks_oracle import (
    ACTIVATIONS,
    bias_added,
    choose,
    expert,
    experts_by_loops,
    grads_as_checkpoint,
    is_moe,
    layer_by_loops,
    layer_with,
    layers,
    leaves,
)
from torch import nn

import dmoe
from dmoe.compat import megablocks
from dmoe.compat.megablocks.layers import common, mpu
from dmoe.compat.megablocks.layers.glu import GroupedGLU
from dmoe.compat.megablocks.layers.mlp import GroupedMLP
from dmoe.compat.megablocks.layers.router import batched_router_zloss, clear_router_zloss

pytestmark = without_generated_products


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
    layer, args = layer_with(
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
        layer, args = layer_with(kind, fp16=fp16, bf16=True, shared_expert=True)  # fp16 comes first
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
        layer, args = layer_with(kind, activation_fn=activation, bias=False)
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
    layer, args = layer_with("dMoE", moe_jitter_eps=0.5, bias=False)
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
    layer, _ = layer_with("MoE", moe_capacity_factor=factor, moe_top_k=top_k, moe_num_experts=experts)
    assert layer.experts.expert_capacity(tokens) == rows


def test_the_capacity_drops_later_tokens_and_nothing_else():
    layer, _ = layer_with("MoE", moe_num_experts=2, moe_top_k=1, moe_capacity_factor=1, bias=False)
    x = torch.randn(6, 1, 6)
    top, weights = torch.tensor([[0], [0], [1], [0], [0], [1]]), torch.ones(6, 1)
    y = layer.experts(x, torch.zeros(6, 2), weights, top)
    assert (y.abs().sum((1, 2)) > 0).tolist() == [True, True, True, True, False, True]
    layer.experts.args.moe_capacity_factor = 0  # all
    megablocks.clear_load_balancing_loss()
    assert (layer.experts(x, torch.zeros(6, 2), weights, top).abs().sum((1, 2)) > 0).all()


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
    layer, args = layer_with("dMoE", mlp_type="glu")
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
    layer, args = layer_with(kind, mlp_type=mlp_type, bias=False)
    x = torch.randn(3, 4, 6)
    results = []
    for run in (layer, torch.compile(layer, backend="aot_eager")):
        layer.zero_grad()
        (run(x).square().sum() + megablocks.batched_load_balancing_loss(args)).backward()
        megablocks.clear_load_balancing_loss()
        results.append([parameter.grad.clone() for parameter in layer.parameters()])
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(plain, compiled)
    torch.compiler.reset()
    layer.eval()
    whole = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(whole(x), layer(x))


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
    layer, _ = layer_with("dMoE")
    with pytest.raises(error, match="^" + message):
        layer(x)
    with pytest.raises(TypeError, match=r"^dMoE: args: expected Arguments, got dict"):
        type(layer)({})
    for name, bad in (("hidden_size", "6"), ("moe_top_k", 1.0), ("init_method", None)):
        with pytest.raises(ValueError, match=f"^Arguments: {name}: expected .*, got {bad!r}"):
            megablocks.Arguments(**{name: bad})


def test_a_deep_copy_knows_its_experts():
    layer, _ = layer_with("dMoE")
    whose = [dmoe.is_expert_param(parameter) for parameter in layer.parameters()]
    assert True in whose
    assert [dmoe.is_expert_param(parameter) for parameter in copy.deepcopy(layer).parameters()] == whose
