"""MegaBlocks' modules and names: each is here, or says why not; the table in the docs is the truth about which."""

from __future__ import annotations

import functools
import importlib
import re
import subprocess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from megablocks_cases import arguments, layer_of
from torch import nn

from dmoe.compat import grouped_gemm, megablocks
from dmoe.compat._not_offered import NOT_OFFERED
from dmoe.compat.megablocks import ops
from dmoe.compat.megablocks.layers import all_to_all, dmlp_registry, glu, mlp, moe, mpu, router, sharedexpert_registry
from dmoe.compat.megablocks.layers.activation_fn import act_fn
from dmoe.compat.megablocks.layers.gelu import gelu, gelu_backward_
from dmoe.ops import sparse_matrix
from dmoe.ops.topology import expert_topology

ROOT = Path(__file__).resolve().parents[2]
DOCS = (ROOT / "docs" / "megablocks.md").read_text()
ROWS = re.findall(r"^\| `([\w.]+)` \| (yes|no) \| (.*) \|$", DOCS, re.MULTILINE)
IN_AN_OBJECT = {"layers.moe.ParallelMLP": "MoE", "layers.dmoe.ParallelDroplessMLP": "dMoE grouped"}


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# ---- The table


def module_and_rest(name):
    """The longest part of a dotted name that is a module, and what is left."""
    package, parts = "dmoe.compat", name.split(".")
    if parts[0] != "grouped_gemm":
        package += ".megablocks"
    for end in range(len(parts), -1, -1):
        try:
            return importlib.import_module(".".join([package, *parts[:end]])), parts[end:]
        except ModuleNotFoundError:
            continue
    raise AssertionError(name)


@pytest.mark.parametrize(("name", "offered", "note"), ROWS, ids=[name for name, *_ in ROWS])
def test_the_table_in_the_docs_is_true(name, offered, note):
    def find():
        found, rest = module_and_rest(name)
        for part in rest:
            owner = next((kind for path, kind in IN_AN_OBJECT.items() if name == f"{path}.{part}"), None)
            found = getattr(found if owner is None else layer_of(owner)[0].experts, part)
        return found

    if offered == "yes":
        assert find() is not None
        assert name not in NOT_OFFERED
    else:
        assert note == NOT_OFFERED[name]
        with pytest.raises(ImportError, match=re.escape(f"{name} is not offered: {note}")):
            find()


def test_the_table_is_complete():
    names = [name for name, *_ in ROWS]
    assert len(names) == len(set(names)) > 60
    assert set(NOT_OFFERED) <= set(names)
    for module in (megablocks, ops, moe, mlp, mpu, router):
        path = module.__name__.removeprefix("dmoe.compat.megablocks").strip(".")
        public = getattr(module, "__all__", None) or [
            name
            for name, value in vars(module).items()
            if getattr(value, "__module__", None) == module.__name__ and not name.startswith("_")
        ]
        listed = {name.removeprefix(f"{path}.").split(".")[0] for name in names if name.startswith(path)}
        assert set(public) <= listed, path
    assert "(docs/megablocks.md)" in (ROOT / "README.md").read_text()


def test_a_name_that_nobody_knows_is_an_ordinary_error():
    for module in (moe, mlp, router):
        with pytest.raises(AttributeError, match=rf"module '{module.__name__}' has no attribute 'nonsense'"):
            _ = module.nonsense
    with pytest.raises(ImportError, match="cannot import name 'nonsense'"):
        exec("from dmoe.compat.megablocks.layers.mlp import nonsense")
    with pytest.raises(ImportError, match=r"^layers\.mlp\.memory_optimized_mlp is not offered: "):
        exec("from dmoe.compat.megablocks.layers.mlp import memory_optimized_mlp")


# ---- The substitution


LINES = """\
import megablocks, torch; from megablocks import ops as first
from megablocks.layers.moe import MoE; from megablocks.layers.dmoe import dMoE
import megablocks.layers.mlp as m, grouped_gemm
count = megablocks.ops.round_up(torch.tensor(3), 2).item()
args = megablocks.layers.arguments.Arguments(device="cpu", moe_num_experts=count)
both = [megablocks.Arguments is type(args), grouped_gemm.ops.gmm is grouped_gemm.ops.gmm, args.mlp_impl == "grouped"]
def megablocks_of(x): return x  # a name that only contains it
class Config: megablocks = 1
kept = Config.megablocks
"""


def test_the_substitution_in_the_readme_takes_every_name_on_a_line_and_runs_twice(tmp_path):
    (command,) = re.findall(r"^sed .*megablocks.* train\.py$", (ROOT / "README.md").read_text(), re.MULTILINE)
    file = tmp_path / "train.py"
    file.write_text(LINES.replace("class Config: megablocks = 1\nkept = Config.megablocks\n", ""))
    for _ in range(2):
        subprocess.run(command, shell=True, cwd=tmp_path, check=True)
        names = {}
        exec(compile(file.read_text(), "train.py", "exec"), names)
        assert names["both"] == [True, True, True]
        assert names["m"] is mlp
        assert names["args"].moe_num_experts == 4
        assert "megablocks_of" in names
    file.write_text("kept = config.megablocks\n")
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    assert file.read_text() == "kept = config.megablocks\n"


# ---- Expert parallelism over one rank


def parallel(**options):
    return arguments(moe_expert_model_parallelism=True, bias=False, **options)


def test_expert_parallelism_over_one_rank_is_what_it_is_without(one_rank):
    torch.manual_seed(0)
    x = torch.randn(3, 4, 6)
    for args in (parallel(), parallel(expert_parallel_group=dist.group.WORLD), parallel(moe_weight_parallelism=True)):
        layer, plain = megablocks.dMoE(args), megablocks.dMoE(arguments(bias=False))
        plain.load_state_dict(layer.state_dict())
        assert torch.equal(layer(x), plain(x))
        assert layer.experts.forward_fn == layer.experts.parallel_forward_once
        assert mpu.param_is_expert_model_parallel(layer.experts.mlp.w1)
        assert not mpu.param_is_expert_model_parallel(plain.experts.mlp.w1)
        megablocks.clear_load_balancing_loss()
    assert mpu.get_expert_parallel_world_size(args) == mpu.expert_sharding_degree(args) == 1


def test_a_loss_may_be_asked_for_with_expert_parallelism_and_no_process_group():
    """As open_lm does on one GPU: other Arguments than the layers have, made to compute the loss."""
    layer = megablocks.dMoE(arguments(bias=False))
    layer(torch.randn(3, 4, 6))
    asked = megablocks.batched_load_balancing_loss(parallel())
    assert asked == megablocks.batched_load_balancing_loss(layer.experts.args)


@pytest.mark.parametrize(
    ("ranks", "options", "error", "message"),
    [
        (3, {}, ValueError, "moe_num_experts: expected a multiple of the 3 ranks of expert_parallel_group, got 4"),
        (6, {}, ValueError, "moe_num_experts: expected a divisor of the 6 ranks of expert_parallel_group, .*, got 4"),
        (16, {}, ValueError, "ffn_hidden_size: expected a multiple of 4, the ranks that share an expert, got 10"),
        (
            2,
            {"moe_weight_parallelism": True},
            NotImplementedError,
            "moe_weight_parallelism: expected False, or one rank, .* got True over 2 ranks: .* FSDP2",
        ),
        (
            3,
            {"moe_weight_parallelism": True, "moe_expert_model_parallelism": False},
            ValueError,
            r"ffn_hidden_size: expected .* a multiple of the 3 ranks of weight_parallel_group, got 4 \* 10",
        ),
    ],
)
def test_experts_that_ranks_do_not_divide_are_refused(monkeypatch, ranks, options, error, message):
    options = {"moe_expert_model_parallelism": True, **options}
    args = arguments()
    vars(args).update(options)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: ranks)
    monkeypatch.setattr(dist, "get_rank", lambda group=None: 0)
    with pytest.raises(error, match=rf"^Arguments: {message}"):
        arguments(**options)
    for layer in (megablocks.dMoE, megablocks.MoE):
        with pytest.raises(error, match=rf"^Arguments: {message}"):
            layer(args)
    arguments(expert_parallel_group=object())  # without the switch it has no meaning, as there


def test_a_group_that_is_none_is_refused_and_weights_with_a_capacity_are_not_cut(one_rank, monkeypatch):
    with pytest.raises(TypeError, match=r"^Arguments: expert_parallel_group: expected a torch.distributed Process"):
        parallel(expert_parallel_group=3)
    monkeypatch.setattr(mpu, "get_weight_parallel_world_size", lambda args: 2)
    with pytest.raises(NotImplementedError, match=r"^MoE: moe_weight_parallelism: expected False.*2 ranks.*FSDP2"):
        megablocks.MoE(arguments(moe_weight_parallelism=True))


def test_rows_come_back_from_an_exchange_with_oneself(one_rank):
    x = torch.randn(5, 3, requires_grad=True)
    for async_op in (False, True):
        y, handle = all_to_all.all_to_all(x[1:4], [3], [3], None, async_op)
        if async_op:
            handle.wait()
        assert torch.equal(y, x[1:4])
        (grad,) = torch.autograd.grad((y * torch.arange(3.0)).sum(), x)
        assert torch.equal(grad[1:4], torch.arange(3.0).expand(3, 3))
        assert not grad[[0, 4]].any()


def test_marks_go_from_parameter_to_parameter(one_rank, capsys):
    a, b, c = torch.zeros(1), torch.zeros(1), torch.zeros(1)
    mpu.set_expert_model_parallel_attributes(a, True)
    mpu.copy_expert_model_parallel_attributes(b, a)
    mpu.copy_expert_model_parallel_attributes(c, torch.zeros(1))
    assert [mpu.is_moe_param(each) for each in (a, b, c)] == [True, True, False]
    assert mpu.param_is_expert_model_parallel(b)
    with pytest.raises(ValueError, match=r"^set_expert_model_parallel_attributes: expected a tensor without"):
        mpu.set_expert_model_parallel_attributes(a, False)
    mpu.synchronized_print(None, "x", 3)
    assert capsys.readouterr().out == "rank = 0 x 3\n"


# ---- Small pieces


def test_registries_build_what_the_arguments_ask_for():
    for (kind, impl), cls in {
        ("mlp", "grouped"): mlp.GroupedMLP, ("mlp", "sparse"): mlp.SparseMLP,
        ("glu", "grouped"): glu.GroupedGLU, ("glu", "sparse"): glu.SparseGLU,
    }.items():  # fmt: skip
        assert type(dmlp_registry.get(arguments(mlp_type=kind, mlp_impl=impl))) is cls
    assert type(sharedexpert_registry.get(arguments(mlp_type="glu"))) is glu.SharedGLU
    assert type(sharedexpert_registry.get(arguments())) is mlp.SharedMLP
    args = arguments()
    args.mlp_type = "moe"
    for registry in (dmlp_registry, sharedexpert_registry):
        name = registry.__name__.rpartition(".")[2]
        with pytest.raises(ValueError, match=rf"^{name}: mlp_type: expected one of \['glu', 'mlp'\], got 'moe'"):
            registry.get(args)


def sparse(data):
    offsets = torch.tensor([0, 16, 32], dtype=torch.int32)
    return sparse_matrix((32, 32), data, expert_topology(offsets, 16, 16, 2))


def test_activations_act_on_the_values_of_a_sparse_matrix():
    x = sparse(torch.randn(2, 16, 16, dtype=torch.float64))
    y = act_fn(x, F.silu)
    assert torch.equal(y.data, F.silu(x.data))
    assert (y.size(), y.column_indices.tolist()) == (x.size(), x.column_indices.tolist())
    y, backward = act_fn(x, F.gelu, return_grad_fn=True, approximate="tanh")
    assert torch.equal(y.data, gelu(x).data)
    upstream = torch.randn_like(x.data)
    backward(upstream)
    expected = torch.autograd.grad(
        F.gelu(leaf := x.data.detach().requires_grad_(), approximate="tanh"), leaf, upstream
    )[0]
    torch.testing.assert_close(x.data.grad, expected)
    grad = sparse(upstream.clone())
    torch.testing.assert_close(gelu_backward_(grad, sparse(x.data.detach())).data, expected)
    assert torch.equal(grad.data, gelu_backward_(upstream.clone(), x.data.detach()))  # in place
    for function in (functools.partial(act_fn, function=F.silu), gelu):
        with pytest.raises(TypeError, match=r"expected an stk\.Matrix, got Tensor"):
            function(upstream)


def test_a_scaled_gradient_and_a_local_part():
    x = torch.ones(3, requires_grad=True)
    assert torch.equal(mlp.scale_gradient(x, 0.25), x)
    mlp.ScaleGradient.apply(x, 0.25).sum().backward()
    assert x.grad.tolist() == [0.25] * 3
    assert mlp.resolve_dtensor(x) is x
    layer = mlp.GroupedMLP(arguments())
    assert layer.scale_grad(layer.w1) is layer.w1
    layer.gradient_scale = 0.5
    grads = []
    for scale in (None, 0.5):
        layer.gradient_scale = scale
        layer.zero_grad()
        layer(torch.ones(4, 6), torch.tensor([1, 1, 1, 1])).sum().backward()
        grads.append(layer.w2.grad.clone())
    assert torch.equal(grads[1], grads[0] / 2)


def test_weights_are_created_in_the_users_orientation():
    def init(tensor):
        seen.append(tuple(tensor.shape))
        nn.init.constant_(tensor, 3)

    seen = []
    args = arguments(fp16=True)
    weights = mlp.create_dmoe_expert_weights(args, 4, 10, 6, init)
    assert (tuple(weights.shape), weights.dtype, seen) == ((40, 6), torch.float16, [(4, 10, 6)])
    assert mlp.create_moe_expert_weights(args, 4, 10, 6, init).shape == (4, 10, 6)
    assert (weights == 3).all()


def test_uniform_assignment_by_hand():
    experts = torch.zeros(5, 2, dtype=torch.int64)
    assert router._uniform_expert_assignment(experts, 4).tolist() == [[0, 1], [2, 3], [0, 1], [2, 3], [0, 1]]


def test_a_number_of_bits_may_be_given_where_it_means_none():
    """Trailing ``num_bits`` of MegaBlocks 0.5, by position."""
    indices, bin_ids, bins = torch.tensor([1, 0, 2]), torch.tensor([0, 1, 1]), torch.tensor([1, 3])
    padded_bins, x = torch.tensor([4, 8]), torch.randn(8, 6)
    for function, inputs in (
        (ops.scatter, (x[:3], indices, bin_ids, None, bins, 1)),
        (ops.padded_scatter, (x, indices, bin_ids, None, bins, padded_bins, 1)),
    ):
        assert torch.equal(function(*inputs, -1), function(*inputs))
        with pytest.raises(NotImplementedError, match=rf"^{function.__name__}: num_bits: expected -1.*got 8"):
            function(*inputs, 8)


def test_both_losses_in_one_call():
    """What Muennighoff's fork calls ``batched_load_balancing_loss``: with the z-loss, over layers, tokens and K."""
    args = arguments(bias=False, moe_zloss_weight=0.3, num_layers=2)
    layers = [megablocks.dMoE(args) for _ in range(2)]
    logits = []
    for layer in layers:
        layer.router.layer.register_forward_hook(lambda module, i, o: logits.append(o))
        layer(torch.randn(3, 4, 6))
    balance, z = moe.batched_load_balancing_and_z_loss(args)
    assert torch.equal(balance, megablocks.batched_load_balancing_loss(args))
    expected = sum((each.exp().sum(-1).log() ** 2).sum() for each in logits) * 0.3 / (2 * 12 * 2)
    torch.testing.assert_close(z, expected)
    assert z.requires_grad


# ---- grouped_gemm's permute and unpermute


@given(st.integers(0, 6), st.integers(1, 3), st.sampled_from([None, 0, 1, 4]), st.booleans(), st.integers(0, 2**20))
def test_tokens_are_permuted_by_expert_and_back(tokens, top_k, kept, flat, seed):
    torch.manual_seed(seed)
    top_k = 1 if flat else top_k
    x = torch.randn(tokens, 4, dtype=torch.float64, requires_grad=True)
    experts = (
        torch.stack([torch.randperm(4)[:top_k] for _ in range(tokens)]) if tokens else torch.zeros(0, top_k).long()
    )
    probs = torch.rand(tokens, top_k, dtype=torch.float64, requires_grad=True)
    kept = None if kept is not None and kept > tokens * top_k else kept
    rows, row_id_map = grouped_gemm.ops.permute(x, (experts[:, 0] if flat else experts).int(), kept)
    order = sorted((e, t, k) for t, row in enumerate(experts.tolist()) for k, e in enumerate(row))
    order = order[: kept or len(order)]
    assert rows.shape == (len(order), 4)
    assert all(torch.equal(rows[r], x[t]) for r, (_, t, _) in enumerate(order))
    place = {(t, k): r for r, (_, t, k) in enumerate(order)}
    assert row_id_map.tolist() == [place.get((t, k), -1) for k in range(top_k) for t in range(tokens)]
    assert row_id_map.dtype == torch.int32

    scaled = rows * torch.arange(1, len(order) + 1, dtype=rows.dtype).unsqueeze(1)
    y = grouped_gemm.ops.unpermute(scaled, row_id_map, probs)
    expected = torch.zeros_like(x)
    for (t, k), r in place.items():
        expected = expected + F.pad((probs[t, k] * (r + 1) * x[t]).unsqueeze(0), (0, 0, t, tokens - t - 1))
    torch.testing.assert_close(y, expected)
    upstream = torch.randn_like(y)
    for got, wanted in zip(
        torch.autograd.grad(y, (x, probs), upstream, retain_graph=True),
        torch.autograd.grad(expected, (x, probs), upstream, allow_unused=True)
        if place
        else (torch.zeros_like(x), torch.zeros_like(probs)),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted)
    if top_k == 1:
        plain = grouped_gemm.ops.unpermute(rows, row_id_map)
        assert plain.shape == x.shape
        assert all(torch.equal(plain[t], x[t]) for t, _ in place)


def test_what_does_not_fit_permute_is_named():
    x, experts = torch.randn(3, 4), torch.zeros(3, 2, dtype=torch.int32)
    rows, row_id_map = grouped_gemm.ops.permute(x, experts)
    for call, error, message in (
        (lambda: grouped_gemm.ops.permute(x, experts[:2]), ValueError, r"permute: indices: expected shape \(3,\) or"),
        (lambda: grouped_gemm.ops.permute(x, experts.float()), TypeError, "permute: indices: expected int32 or int64"),
        (
            lambda: grouped_gemm.ops.permute(x, experts, 7),
            ValueError,
            "permute: num_out_tokens: expected 0 to 6, got 7",
        ),
        (
            lambda: grouped_gemm.ops.unpermute(rows, row_id_map, torch.rand(2, 2)),
            ValueError,
            r"unpermute: probs: expected \(T, K\) of 6 assignments, got \(2, 2\)",
        ),
        (
            lambda: grouped_gemm.ops.unpermute(rows, row_id_map.float()),
            TypeError,
            "unpermute: row_id_map: expected int",
        ),
    ):
        with pytest.raises(error, match=f"^{message}"):
            call()


def test_importing_the_names_needs_no_stk():
    for path in (ROOT / "dmoe" / "compat").rglob("*.py"):
        assert not re.search(r"^(import|from) stk", path.read_text(), re.MULTILINE), path
