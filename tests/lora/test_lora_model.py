"""dmoe.lora on a model: what is added and frozen, what survives copies and files, what is refused and how."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from lora_cases import dense_parameters, randomise, run_dense
from torch import nn
from torch.utils.checkpoint import checkpoint

import dmoe

SIZES = {"hidden_size": 6, "ffn_hidden_size": 8, "num_experts": 4, "top_k": 2, "load_balancing_coefficient": 0.0}


class Model(nn.Module):
    """Two layers in blocks."""

    def __init__(self, dtype=torch.float64, **fields):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"ffn": dmoe.MoE(**SIZES, **fields, dtype=dtype)}) for _ in range(2))
        self.head = nn.Linear(6, 3, dtype=dtype)

    def forward(self, x, recompute=False):
        for block in self.blocks:
            x = x + (checkpoint(block["ffn"], x, use_reentrant=False) if recompute else block["ffn"](x))
        return self.head(x)


def made(seed=0, **fields):
    torch.manual_seed(seed)
    return Model(**fields), torch.randn(3, 5, 6, dtype=fields.get("dtype", torch.float64))


def test_it_changes_nothing_at_first_and_trains_alone():
    model, x = made()
    expected = model(x)
    trained = dmoe.lora.add(model, rank=3)
    assert torch.equal(model(x), expected)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(trained)
    assert set(trained) == {
        f"blocks.{n}.ffn.experts.lora.default.{projection}.{factor}"
        for n in range(2)
        for projection in ("gate_up_proj", "down_proj")
        for factor in "ab"
    }
    shapes = [tuple(p.shape) for name, p in trained.items() if name.startswith("blocks.0")]
    assert shapes == [(4, 3, 6), (4, 2, 8, 3), (4, 3, 8), (4, 6, 3)]
    optimizer = torch.optim.AdamW(trained.values(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    assert all(p.grad.abs().max() > 0 for p in trained.values())
    assert model(x).square().sum() < expected.square().sum()
    assert all(p.grad is None for name, p in model.named_parameters() if name not in trained)
    assert all(dmoe.is_expert_param(p) for p in trained.values())
    assert dmoe.parallel.clip_grad_norm(model, 1e9) > 0
    with dmoe.lora.disable(model):
        assert torch.equal(model(x), expected)
    assert not torch.equal(model(x), expected)


def test_shared_factors_are_one_for_all_experts():
    for shared, shapes in (
        ({"share_a": True}, [(1, 3, 6), (4, 2, 8, 3), (1, 3, 8), (4, 6, 3)]),
        ({"share_b": True}, [(4, 3, 6), (1, 2, 8, 3), (4, 3, 8), (1, 6, 3)]),
    ):
        model, x = made()
        trained = dmoe.lora.add(model, rank=3, layers="*.0.*", **shared)
        assert [tuple(p.shape) for p in trained.values()] == shapes
        randomise(trained.values())
        y = model(x)
        dmoe.lora.merge(model)
        torch.testing.assert_close(model(x), y)


def test_layers_and_targets_are_patterns():
    model, _ = made(shared_ffn_hidden_size=5)
    some = dmoe.lora.add(model, rank=2, layers="*.1.*", targets=["*.down", "router"], freeze=False)
    path = "blocks.1.ffn"
    assert list(some) == [
        f"{path}.experts.lora.default.down_proj.a",
        f"{path}.experts.lora.default.down_proj.b",
        f"{path}.shared_expert.mlp.lora.default.down_proj.a",
        f"{path}.shared_expert.mlp.lora.default.down_proj.b",
        f"{path}.router.lora.default.weight.a",
        f"{path}.router.lora.default.weight.b",
    ]
    assert all(p.requires_grad for p in model.parameters())
    assert set(dmoe.lora.adapted_modules(model)) == {f"{path}.{m}" for m in ("experts", "shared_expert.mlp", "router")}
    assert not dmoe.is_expert_param(some[f"{path}.router.lora.default.weight.a"])
    assert not dmoe.is_expert_param(some[f"{path}.shared_expert.mlp.lora.default.down_proj.a"])
    other = dmoe.lora.add(model, rank=4, layers=["blocks.0.ffn"])  # the same name elsewhere
    assert len(other) == 4
    assert "rank=4" in repr(model.blocks[0])
    assert "active=['default']" in repr(model)


def test_a_rank_stabilised_scale_and_what_none_means():
    assert dmoe.lora.LoRA(rank=8).scale == dmoe.lora.LoRA(rank=8, rank_stabilized=True).scale == 1
    assert dmoe.lora.LoRA(rank=4, alpha=6).scale == 1.5
    assert dmoe.lora.LoRA(rank=4, alpha=6, rank_stabilized=True).scale == 3
    config = dmoe.lora.LoRA(rank=4, alpha=6, targets=["router"])
    assert dmoe.lora.LoRA.from_dict(config.to_dict()) == config


def test_initial_values_are_bounded_and_of_the_seed_alone():
    values = []
    for _ in range(2):
        model, _ = made()
        torch.manual_seed(7)
        values.append(dmoe.lora.add(model, rank=3))
    for name, value in values[0].items():
        assert torch.equal(value, values[1][name])
        if name.endswith("b"):
            assert not value.any()
        else:
            bound = value.shape[-1] ** -0.5
            assert bound / 2 < value.abs().max() <= bound
            assert len({row.sum().item() for row in value.flatten(0, 1)}) == 12  # no two experts, or rows, alike
    model, _ = made()
    normal = dmoe.lora.add(model, rank=400, init="gaussian")
    a = normal["blocks.0.ffn.experts.lora.default.down_proj.a"]
    assert abs(a.std() * 400 - 1) < 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_factors_may_be_wider_than_weights(dtype):
    model, x = made(dtype=torch.bfloat16)
    trained = dmoe.lora.add(model, rank=3, targets=("*",), dtype=dtype)
    assert {p.dtype for p in trained.values()} == {dtype}
    randomise(trained.values())
    y = model(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert {p.grad.dtype for p in trained.values()} == {dtype}
    exact = copy.deepcopy(model).double()
    torch.testing.assert_close(y.double(), exact(x.double()), rtol=0.1, atol=0.2)


def test_under_autocast_as_accurate_as_the_merged_weights():
    model, x = made(dtype=torch.float32)
    randomise(dmoe.lora.add(model, rank=3).values())
    merged = copy.deepcopy(model)
    dmoe.lora.merge(merged)
    exact = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        errors = [(m(x).float() - exact).abs().max() for m in (model, merged)]
    assert errors[0] < 2 * errors[1] + 4 * torch.finfo(torch.bfloat16).eps * exact.abs().max()


def test_dropout_is_of_training_and_keeps_the_mean():
    model, x = made()
    trained = dmoe.lora.add(model, rank=3, dropout=0.5, targets=("experts.up",), layers="blocks.0.*")
    randomise(trained.values())
    twin = copy.deepcopy(model)
    dmoe.lora.merge(twin)
    layer, plain = model.blocks[0]["ffn"], twin.blocks[0]["ffn"]
    assert not torch.allclose(layer(x), layer(x))
    layer.eval()
    torch.testing.assert_close(layer(x), plain.eval()(x))
    dmoe.lora.add(model, rank=3, name="late")  # beside a layer in evaluation
    assert not layer.experts.lora.late.training


def everywhere(model, rank=3, **options):
    trained = dmoe.lora.add(model, rank=rank, targets=("*",), **options)
    randomise(trained.values())
    return trained


def test_copies_pickles_casts_and_meta():
    model, x = made(shared_ffn_hidden_size=5)
    everywhere(model)
    expected = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), expected)
        twin.head(twin(x) @ torch.zeros(3, 6, dtype=x.dtype)).sum().backward()
        marked = [p for name, p in twin.named_parameters() if ".experts." in name]
        assert all(dmoe.is_expert_param(p) for p in marked)
        assert len({id(p) for p in marked} & {id(p) for p in model.parameters()}) == 0
    single = copy.deepcopy(model).float()
    torch.testing.assert_close(single(x.float()), expected.float(), rtol=1e-4, atol=1e-5)
    hollow = copy.deepcopy(model).to_empty(device="meta")
    dmoe.lora.add(hollow, rank=2, name="more")
    assert all(p.is_meta for p in hollow.parameters())
    hollow.to_empty(device="cpu")
    for module in hollow.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert all(p.isfinite().all() for p in hollow.parameters())
    a, b = (hollow.get_parameter(f"blocks.1.ffn.experts.lora.more.down_proj.{factor}") for factor in "ab")
    assert a.abs().max() > 0
    assert not b.any()


def test_a_models_state_dict_has_the_adapter_and_loads_into_another():
    model, x = made()
    everywhere(model)
    base, _ = made(seed=3)
    for part in ("router", "experts"):
        state = {name: value for name, value in model.state_dict().items() if f"{part}.lora" in name}
        with pytest.raises(RuntimeError, match=rf"Unexpected key.*0\.ffn\.{part}\.lora\.default.*1\.ffn\.{part}\.lora"):
            base.load_state_dict({**base.state_dict(), **state})
    dmoe.lora.add(base, rank=3, targets=("*",))
    for assign in (False, True):
        base.load_state_dict(model.state_dict(), assign=assign)
        assert torch.equal(base(x), model(x))
        assert dmoe.is_expert_param(base.blocks[0]["ffn"].experts.lora.default.down_proj.a)
    plain, _ = made(seed=4)
    with pytest.raises(RuntimeError, match=r"Missing key.*lora"):
        model.load_state_dict(plain.state_dict())
    model.load_state_dict(plain.state_dict(), strict=False)
    with dmoe.lora.disable(model):
        assert torch.equal(model(x), plain(x))


def test_an_adapter_alone_goes_through_a_file_and_is_added_where_it_is_missing():
    model, x = made(shared_ffn_hidden_size=5)
    everywhere(model, alpha=6.0, rank_stabilized=True)
    file = io.BytesIO()
    torch.save(dmoe.lora.state_dict(model), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert all(".lora." not in key for key in state["tensors"])
    assert len(state["tensors"]) == 2 * (4 + 4 + 2)
    other, _ = made(shared_ffn_hidden_size=5)
    dmoe.lora.load_state_dict(other, state, name="french")
    torch.testing.assert_close(other(x), model(x))
    assert all(p.requires_grad for p in other.parameters())
    there = dmoe.lora.state_dict(other, "french")
    assert there["config"] == state["config"]
    assert all(torch.equal(there["tensors"][key], value) for key, value in state["tensors"].items())
    for value in state["tensors"].values():
        value.mul_(0.5)
    dmoe.lora.load_state_dict(other, state, name="french")  # into what is there
    assert not torch.allclose(other(x), model(x))
    partly = {"config": {k: v for k, v in state["config"].items() if "router" in k}}
    partly["tensors"] = {k: v for k, v in state["tensors"].items() if "router" in k}
    dmoe.lora.load_state_dict(other, partly, name="routers")
    assert set(dmoe.lora.state_dict(other, "routers")["config"]) == set(partly["config"])


def test_what_does_not_load_is_named_and_changes_nothing():
    model, x = made()
    dmoe.lora.add(model, rank=3)
    state = dmoe.lora.state_dict(model)
    expected = model(x)
    key, gone = "blocks.0.ffn.experts.down_proj.a", "blocks.1.ffn.experts.down_proj.b"
    tensors = {**state["tensors"], key: torch.ones(4, 2, 8), "blocks.0.ffn.experts.other": torch.ones(1)}
    bad = {"config": state["config"], "tensors": {k: v for k, v in tensors.items() if k != gone}}
    with pytest.raises(ValueError, match=rf"{key} has shape \(4, 2, 8\), not \(4, 3, 8\); {gone} is missing; .*other"):
        dmoe.lora.load_state_dict(model, bad)
    scaled = {path: {**fields, "alpha": 1.0} for path, fields in state["config"].items()}
    with pytest.raises(ValueError, match=r"blocks\.0\.ffn\.experts has a scale of 1\.0, not 0\.33"):
        dmoe.lora.load_state_dict(model, {**state, "config": scaled})
    elsewhere = {"config": {"blocks.7.ffn.experts": {}}, "tensors": {"blocks.7.ffn.experts.down_proj.a": x}}
    with pytest.raises(
        ValueError, match=r"load_state_dict: layers: expected patterns of .*blocks\.0\.ffn.* got \['blocks\.7\.ffn'\]"
    ):
        dmoe.lora.load_state_dict(model, elsewhere)
    with pytest.raises(ValueError, match=r"config: expected names of modules that end in experts.* got 'head'"):
        dmoe.lora.load_state_dict(model, {"config": {"head": {}}, "tensors": {}})
    with pytest.raises(TypeError, match=r"state: expected a dict of config and tensors.*got \['blocks"):
        dmoe.lora.load_state_dict(model, state["tensors"])
    with pytest.raises(TypeError, match=r"LoRA: expected a dict of rank, alpha.*got \['what'\]"):
        dmoe.lora.load_state_dict(model, {"config": {"blocks.0.ffn.experts": {"what": 1}}, "tensors": {}})
    with pytest.raises(ValueError, match=r"name: expected one of the model's adapters \['default'\], got 'french'"):
        dmoe.lora.state_dict(model, "french")
    assert torch.equal(model(x), expected)


def test_compiled_in_one_graph_that_heeds_what_is_chosen():
    torch.manual_seed(0)
    layer, x = dmoe.MoE(**SIZES), torch.randn(9, 6)
    everywhere(layer)
    dmoe.lora.add(layer, rank=2, name="other")
    randomise(p for name, p in layer.named_parameters() if ".other." in name)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    found = []
    for names in ("default", ["default", "other"]):
        dmoe.lora.set_active(layer, names)
        found.append(layer(x))
        torch.testing.assert_close(compiled(x), found[-1])
    for seed in range(2):  # the same graph, other numbers
        with dmoe.lora.use(layer, torch.randint(-1, 2, (9,), generator=torch.Generator().manual_seed(seed))):
            found.append(layer(x))
            y = compiled(x)
            torch.testing.assert_close(y, found[-1])
    of_other = layer.experts.lora.other.down_proj.b
    grads = [torch.autograd.grad(each.square().sum(), of_other)[0] for each in (y, found[-1])]
    torch.testing.assert_close(*grads)
    with dmoe.lora.disable(layer):
        found.append(layer(x))
        torch.testing.assert_close(compiled(x), found[-1])
    torch.testing.assert_close(compiled(x), found[1])
    assert all(not torch.allclose(one, other) for n, one in enumerate(found) for other in found[:n])


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_activation_checkpointing(reentrant):
    model, x = made()
    trained = everywhere(model)
    x.requires_grad_()
    grads = []
    for recompute in (False, True):
        layer = model.blocks[0]["ffn"]
        y = checkpoint(layer, x, use_reentrant=reentrant) if recompute else layer(x)
        of_layer = [p for name, p in trained.items() if name.startswith("blocks.0")]
        y.square().sum().backward()
        grads.append([x.grad, *(p.grad for p in of_layer)])
        for each in (x, *of_layer):
            each.grad = None
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_experts_of_different_widths_merge_and_save():
    torch.manual_seed(0)
    fields = {**SIZES, "ffn_hidden_size": [3, 5, 8, 2]}
    layer, x = dmoe.MoE(**fields, dtype=torch.float64), torch.randn(7, 6, dtype=torch.float64)
    trained = dmoe.lora.add(layer, rank=2, alpha=3)
    assert [tuple(p.shape) for p in trained.values()] == [(4, 2, 6), (2, 18, 2), (2, 18), (4, 6, 2)]
    randomise(trained.values())
    expected = run_dense(dmoe.MoE(**fields, dtype=torch.float64), dense_parameters(layer, trained, 1.5), x)
    torch.testing.assert_close(layer(x), expected)
    other = copy.deepcopy(layer)
    dmoe.lora.merge(other)
    torch.testing.assert_close(other(x), expected)
    dmoe.lora.remove(layer)
    dmoe.lora.load_state_dict(layer, dmoe.lora.state_dict(other))
    torch.testing.assert_close(layer(x), expected)


def refused(**fields):
    return dmoe.MoE(**{**SIZES, **fields})


@pytest.mark.parametrize(
    ("make", "options", "error", "told"),
    [
        (refused, {"rank": 0}, ValueError, "LoRA: rank: expected an integer of at least 1, got 0"),
        (refused, {"alpha": float("nan")}, ValueError, "LoRA: alpha: expected a finite number or None, got nan"),
        (refused, {"dropout": 1.0}, ValueError, r"LoRA: dropout: expected 0 <= p < 1, got 1\.0"),
        (refused, {"share_a": 1}, TypeError, "LoRA: share_a: expected True or False, got 1"),
        (refused, {"init": "zeros"}, ValueError, "LoRA: init: expected one of default, gaussian, got 'zeros'"),
        (refused, {"targets": "experts"}, TypeError, "LoRA: targets: expected a sequence of patterns, got 'experts'"),
        (
            refused,
            {"targets": ["mlp"]},
            ValueError,
            r"dmoe\.lora\.add: targets: expected patterns of experts\.up, .* got 'mlp'",
        ),
        (
            refused,
            {"targets": ["shared_expert"]},
            ValueError,
            r"dmoe\.lora\.add: targets: expected parts that the layers \[''\]",
        ),
        (refused, {"layers": "x"}, ValueError, r"layers: expected patterns of the names of dmoe\.MoE layers \[''\]"),
        (refused, {"ranks": 3}, TypeError, "ranks"),
        (refused, {"name": "a.b"}, ValueError, r"name: expected a word without dots .* got 'a\.b'"),
        (refused, {"name": "forward"}, ValueError, "name: expected a word without dots .* got 'forward'"),
        (lambda: refused(router="cosine"), {"targets": ["router"]}, ValueError, "router: .* got CosineRouter; leave"),
        (lambda: refused(router="uniform"), {"targets": ["r*"]}, ValueError, "router: .* got UniformRouter; leave"),
        (
            lambda: refused(ffn_hidden_size=[1, 2, 3, 4]),
            {"share_b": True},
            ValueError,
            r"add: share_b: expected False beside the up projection of experts of different widths \(1, 2, 3, 4\)",
        ),
        (lambda: nn.Linear(2, 2), {}, ValueError, r"layers: expected patterns of the names of dmoe\.MoE layers \[\]"),
    ],
)
def test_what_cannot_be_added_is_said_and_changes_nothing(make, options, error, told):
    model = make()
    before = [name for name, _ in model.named_parameters()]
    with pytest.raises(error, match=told):
        dmoe.lora.add(model, **options)
    assert [name for name, _ in model.named_parameters()] == before
    assert all(p.requires_grad for p in model.parameters())


def test_a_config_or_fields_of_one_and_no_name_twice():
    model, _ = made()
    config = dmoe.lora.LoRA(rank=2)
    with pytest.raises(TypeError, match=r"expected a config or fields of one, got both, with \['rank'\]"):
        dmoe.lora.add(model, config, rank=3)
    with pytest.raises(TypeError, match=r"config: expected dmoe\.lora\.LoRA, got int"):
        dmoe.lora.add(model, 3)
    dmoe.lora.add(model, config)
    with pytest.raises(
        ValueError, match=r"name: expected one that blocks\.0\.ffn\.experts has no adapter of, got 'default'"
    ):
        dmoe.lora.add(model, config)
    layer = dmoe.MoE(**{**SIZES, "hidden_size": 16, "ffn_hidden_size": 16}, backend="block_sparse")
    dmoe.lora.add(layer, config)
    with pytest.raises(ValueError, match=r"backend: expected None, grouped or torch or reference .* 'block_sparse'"):
        layer(torch.randn(3, 16))
