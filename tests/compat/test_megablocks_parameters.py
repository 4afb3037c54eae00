"""``w1``, ``w2`` and ``v1`` are the parameters: everything that one does to a parameter reaches the experts."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from helpers import without_generated_products
from megablocks_cases import KINDS, arguments, expert, layer_of, names_of
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import dmoe
from dmoe.compat import megablocks
from dmoe.compat.megablocks.layers.mlp import GroupedMLP

pytestmark = without_generated_products


def shape_of(kind, name, args):
    e, f, h = args.moe_num_experts, args.ffn_hidden_size, args.hidden_size
    if kind == "MoE":
        return (e, h, f) if name == "w1" else (e, f, h)
    return (e * f, h)


def by_loops(layer, x):
    """The layer's result, token by token; no capacity binds here."""
    _, weights, top = layer.router(x)
    mlp = layer.experts.mlp
    rows = [
        sum(w * expert(mlp, e, token) for w, e in zip(ws, es.tolist(), strict=True))
        for token, ws, es in zip(x.flatten(0, -2), weights, top, strict=True)
    ]
    return torch.stack(rows).view(x.shape)


@pytest.mark.parametrize("kind", KINDS)
def test_names_and_shapes_are_those_of_parameters(kind):
    layer, args = layer_of(kind)
    expected = {f"experts.mlp.{name}": shape_of(kind, name, args) for name in names_of(kind)}
    expected["router.layer.weight"] = (4, 6)
    for held in (dict(layer.named_parameters()), layer.state_dict()):
        assert {name: tuple(tensor.shape) for name, tensor in held.items()} == expected
        assert all(tensor.is_contiguous() for tensor in held.values())
    for name in names_of(kind):
        assert isinstance(getattr(layer.experts.mlp, name), nn.Parameter)
        assert layer.state_dict()[f"experts.mlp.{name}"].data_ptr() == getattr(layer.experts.mlp, name).data_ptr()


@pytest.mark.parametrize("kind", KINDS)
def test_data_given_to_a_name_is_what_computes(kind):
    layer, args = layer_of(kind, moe_capacity_factor=0)
    x = torch.randn(3, 4, 6, dtype=torch.float64)
    for name in names_of(kind):
        before = layer(x)
        getattr(layer.experts.mlp, name).data = torch.randn(shape_of(kind, name, args), dtype=torch.float64)
        assert not torch.allclose(before, layer(x)), name
    torch.testing.assert_close(layer(x), by_loops(layer, x))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_freezing_and_optimizer_groups_go_by_name(kind):
    layer, _ = layer_of(kind, moe_capacity_factor=0, moe_loss_weight=0)
    mlp, x = layer.experts.mlp, torch.randn(3, 4, 6, dtype=torch.float64)
    layer(x).square().sum().backward()
    got = {name: getattr(mlp, name).grad for name in names_of(kind)}
    layer.zero_grad()
    by_loops(layer, x).square().sum().backward()
    for name, grad in got.items():
        assert grad.is_contiguous()
        torch.testing.assert_close(grad, getattr(mlp, name).grad)

    layer.zero_grad()
    mlp.w1.requires_grad_(False)
    layer(x).square().sum().backward()
    assert mlp.w1.grad is None
    assert mlp.w2.grad.any()
    w2 = [parameter for name, parameter in layer.named_parameters() if name.endswith("mlp.w2")]
    kept, optimizer = mlp.w1.clone(), torch.optim.SGD([{"params": w2, "lr": 0.5}])
    expected = mlp.w2 - 0.5 * mlp.w2.grad
    optimizer.step()
    assert torch.equal(mlp.w2, expected)
    assert torch.equal(mlp.w1, kept)


def test_an_initialisation_goes_expert_by_expert_over_rows():
    """LLM-foundry finds the experts' number as ``w1.shape[0] // ffn_hidden_size``, and fills one after the other."""
    layer, args = layer_of("dMoE glu")
    width = args.ffn_hidden_size
    for name in ("w1", "v1", "w2"):
        weight = getattr(layer.experts.mlp, name)
        count = weight.shape[0] // width
        assert count == 4
        with torch.no_grad():
            for e in range(count):
                nn.init.constant_(weight[e * width : (e + 1) * width], e + 1)
    x = torch.rand(2, 3, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(x), by_loops(layer, x))
    assert layer.experts.mlp.w1[::width, 0].tolist() == [1, 2, 3, 4]


def test_active_parameters_are_counted_by_rows():
    """As OLMoE does: the first K experts' rows of what lies under ``experts.mlp``."""
    args = arguments(hidden_size=32, ffn_hidden_size=128, moe_num_experts=4, moe_top_k=2, mlp_type="glu", bias=False)
    layer = megablocks.dMoE(args)
    rows = args.moe_top_k * args.ffn_hidden_size
    active = sum((p[:rows] if "experts.mlp" in name else p).numel() for name, p in layer.named_parameters())
    assert active == 24_704  # 4 * 32 of the router, 2 experts of 3 * 128 * 32


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_marked_wherever_they_come_from(kind):
    layer, _ = layer_of(kind)
    meta = copy.deepcopy(layer).to("meta")
    meta.load_state_dict(layer.state_dict(), assign=True)
    empty = copy.deepcopy(layer).to("meta").to_empty(device="cpu")
    for each in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), meta, empty):
        for name, parameter in each.named_parameters():
            assert dmoe.is_expert_param(parameter) == ("mlp" in name), name
            assert hasattr(parameter, "expert_model_parallel") == ("mlp" in name), name
    x = torch.randn(3, 4, 6, dtype=torch.float64)
    assert torch.equal(meta(x), layer(x))


def test_weights_of_other_sizes_are_refused():
    """A part of the experts, as expert-parallel ranks hold it, must not pass for narrower ones."""
    layer, _ = layer_of("dMoE grouped")
    layer.experts.mlp.w2.data = layer.experts.mlp.w2.data[:20].clone()
    with pytest.raises(ValueError, match=r"^GroupedMLP: w2: expected shape \(40, 6\).*got \(20, 6\)"):
        layer(torch.randn(3, 4, 6, dtype=torch.float64))


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("wrapped", ["experts.mlp", "experts", "router"])
@pytest.mark.parametrize("kind", ["MoE", "dMoE glu"])
def test_fully_shard_takes_any_part(kind, wrapped, one_rank):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    layer, _ = layer_of(kind)
    twin, x = copy.deepcopy(layer), torch.randn(3, 4, 6, dtype=torch.float64)
    fully_shard(layer.get_submodule(wrapped))
    fully_shard(layer)
    names = [name for name, _ in layer.named_parameters()]
    assert names == [name for name, _ in twin.named_parameters()]
    for each in (layer, twin):
        each(x).square().sum().backward()
        torch.optim.SGD(each.parameters(), lr=0.1).step()
    for name, parameter in layer.named_parameters():
        assert isinstance(parameter, DTensor), name
        torch.testing.assert_close(parameter.full_tensor(), twin.get_parameter(name))


@pytest.mark.parametrize("kind", ["MoE", "dMoE glu"])
def test_parameters_may_be_dtensors(kind, one_rank):
    """As LLM-foundry makes them, over a mesh."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    layer, _ = layer_of(kind)
    twin, x, mesh = copy.deepcopy(layer), torch.randn(3, 4, 6, dtype=torch.float64), init_device_mesh("cpu", (1,))
    for name in names_of(kind):
        local = getattr(layer.experts.mlp, name).data
        setattr(layer.experts.mlp, name, nn.Parameter(DTensor.from_local(local, mesh, [Shard(0)], run_check=False)))
    for each in (layer, twin):
        each(x).square().sum().backward()
    for name in names_of(kind):
        grad = getattr(layer.experts.mlp, name).grad
        assert isinstance(grad, DTensor)
        torch.testing.assert_close(grad.to_local(), getattr(twin.experts.mlp, name).grad)


class Large(TorchDispatchMode):
    """Operations whose results are new memory of the size of all experts' ``w1``."""

    def __init__(self, layer):
        super().__init__()
        self.size = layer.experts.mlp.w1.untyped_storage().nbytes()
        self.known = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for tensor in results if isinstance(results, tuple | list) else (results,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes() >= self.size:
                if tensor.untyped_storage().data_ptr() not in self.known:
                    self.found.append(str(func))
                self.known.add(tensor.untyped_storage().data_ptr())
        return results


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["fused", "by steps", "another activation"])
def test_a_call_makes_nothing_as_large_as_all_experts_but_their_gradients(kind, how):
    options = {"activation_fn": lambda x: torch.sin(x) + x} if how == "another activation" else {}
    layer, _ = layer_of(kind, moe_num_experts=64, hidden_size=16, moe_capacity_factor=0, moe_loss_weight=0, **options)
    if how == "by steps":
        layer.experts.mlp.register_forward_hook(lambda *given: None)
    x = torch.randn(3, 16, dtype=torch.float64)
    with Large(layer) as large:
        y = layer(x).sum()
        assert large.found == []
        y.backward()
    assert len(large.found) == len(names_of(kind)), large.found
    grads = {getattr(layer.experts.mlp, name).grad.data_ptr() for name in names_of(kind)}
    assert grads <= large.known


def test_experts_alone_have_the_names_too():
    mlp = GroupedMLP(arguments()).double()
    rows = torch.randn(9, 6, dtype=torch.float64)
    mlp.w1.data = torch.randn(40, 6, dtype=torch.float64)
    expected = torch.stack([expert(mlp, 0 if r < 4 else 2, rows[r]) for r in range(9)])
    torch.testing.assert_close(mlp(rows, torch.tensor([4, 0, 5, 0])), expected)
