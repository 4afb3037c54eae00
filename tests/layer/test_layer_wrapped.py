"""Layers inside what others put around them: adapters, offloading, `torch.func`, odd tensors, in-place arithmetic."""

from __future__ import annotations

import copy
import sys
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrize
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

import dmoe
from dmoe import MoE, aux_loss

SIZES = {"hidden_size": 6, "ffn_hidden_size": 8, "num_experts": 4, "top_k": 2}


class LowRank(nn.Module):
    """LoRA on a stack of matrices ``(E, ..., out, in)``; see README."""

    def __init__(self, weight, rank):
        super().__init__()
        rows, columns = weight[0].numel() // weight.shape[-1], weight.shape[-1]
        self.down = nn.Parameter(torch.randn(len(weight), rank, columns) * columns**-0.5)
        self.up = nn.Parameter(torch.zeros(len(weight), rows, rank))

    def forward(self, weight):
        return weight + (self.up @ self.down).view_as(weight)


def test_adapters_by_parametrization_train_alone_and_merge():
    torch.manual_seed(0)
    layer, x = MoE(**SIZES), torch.randn(9, 6)
    before = layer(x)
    layer.requires_grad_(False)
    for name in ("gate_up_proj", "down_proj"):
        parametrize.register_parametrization(layer.experts, name, LowRank(getattr(layer.experts, name), rank=2))
    assert torch.equal(layer(x), before)
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    assert len(trained) == 4
    optimizer = torch.optim.SGD(trained, lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        optimizer.step()
    assert all(parameter.grad.abs().max() > 0 for parameter in trained)
    after = layer(x)
    assert not torch.allclose(after, before)
    for name in ("gate_up_proj", "down_proj"):
        parametrize.remove_parametrizations(layer.experts, name)
    torch.testing.assert_close(layer(x), after)


class Wrapper(nn.Module):
    """What PEFT's ``target_parameters`` puts in a module's place: no attribute of that module is here."""

    def __init__(self, base_layer, *names):
        super().__init__()
        self.base_layer, self.names = base_layer, names
        self.adapters = nn.ModuleList(LowRank(getattr(base_layer, name), 2) for name in names)

    def forward(self, *args, **kwargs):
        for name, adapter in zip(self.names, self.adapters, strict=True):
            parametrize.register_parametrization(self.base_layer, name, adapter)
        try:
            return self.base_layer(*args, **kwargs)
        finally:
            for name in self.names:
                parametrize.remove_parametrizations(self.base_layer, name, leave_parametrized=False)


@pytest.mark.parametrize("part", ["experts", "router", "shared_expert"])
def test_a_part_in_a_wrapper_without_its_attributes(part):
    torch.manual_seed(0)
    layer, x = MoE(**SIZES, shared_ffn_hidden_size=5, selection_bias=True), torch.randn(9, 6)
    expected = layer(x)
    inner = getattr(layer, part)
    names = {"experts": ("gate_up_proj", "down_proj"), "router": ("weight",), "shared_expert": ()}[part]
    setattr(layer, part, Wrapper(inner, *names))
    y = layer(x)
    assert torch.equal(y, expected)
    (y.sum() + aux_loss(layer)).backward()
    assert all(adapter.up.grad.abs().max() > 0 for adapter in getattr(layer, part).adapters)
    dmoe.update_selection_bias(layer)
    assert layer.get_submodule("router.base_layer" if part == "router" else "router").selection_bias.abs().max() > 0


def offload(module):
    """What accelerate's ``cpu_offload`` does: parameters are on meta, but during their module's own forward."""
    kept = {name: parameter.detach().clone() for name, parameter in module.named_parameters(recurse=False)}

    def put(to_meta):
        for name, value in kept.items():
            module._parameters[name] = nn.Parameter(value.to("meta") if to_meta else value)

    inner = module.forward

    def forward(*args, **kwargs):
        put(False)
        try:
            return inner(*args, **kwargs)
        finally:
            put(True)

    put(True)
    module.forward = forward


@pytest.mark.parametrize("mode", ["explicit", "attached"])
def test_parameters_that_come_with_their_modules_forward(mode):
    torch.manual_seed(0)
    layer, x = MoE(**SIZES, shared_ffn_hidden_size=5, aux_loss=mode), torch.randn(9, 6)
    expected = layer(x).detach()
    for module in layer.modules():
        if list(module.parameters(recurse=False)):
            offload(module)
    assert all(parameter.is_meta for parameter in layer.parameters())
    with torch.no_grad():
        assert torch.equal(layer(x), expected)
        assert torch.equal(layer.eval()(x), expected)
        assert aux_loss(layer) >= 0
    assert aux_loss(layer) + 1 == 1  # no tensor on meta


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"aux_loss": "attached"},
        {"bias": "output"},
        {"shared_ffn_hidden_size": 5},
        {"backend": "reference"},
        {"load_balancing_coefficient": 0.0},
    ],
    ids=str,
)
def test_the_output_may_be_changed_in_place(fields):
    torch.manual_seed(0)
    layer = MoE(**SIZES, **fields)
    x = torch.randn(2, 5, 6, requires_grad=True)
    grads = []
    for in_place in (False, True):
        y = layer(x)
        if in_place:
            y += 1
            y[0].mul_(2)
        else:
            y = torch.cat([(y[:1] + 1) * 2, y[1:] + 1])
        loss = y.square().sum() + aux_loss(layer)
        grads.append(torch.autograd.grad(loss, [x, *layer.parameters()]))
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want)


@pytest.fixture
def one_rank():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("fields", "train"),
    [({}, True), ({}, False), ({"aux_loss": "attached"}, True), ({"bias": "output"}, True)],
    ids=str,
)
def test_fsdp_gathers_parameters_though_the_output_was_changed_in_place(fields, train, one_rank):
    """Its hook is on the output: were that a view, an operation in place would take the hook out of the graph."""
    torch.manual_seed(0)
    x, layer = torch.randn(2, 5, 6), MoE(**SIZES, **fields).train(train)
    want = copy.deepcopy(layer)
    mesh = init_device_mesh("cpu", (1,))
    model = fully_shard(nn.Sequential(fully_shard(layer, mesh=mesh)), mesh=mesh)
    for of_layer, forward in ((want, want), (layer, model)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            y = forward(x)
        y += 1
        (y.square().sum() + aux_loss(of_layer)).backward()
    for (name, parameter), plain in zip(layer.named_parameters(), want.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad.full_tensor(), plain.grad, msg=name)


def test_losses_are_older_than_the_output():
    """FSDP2 gathers parameters when backward reaches a unit's output: before anything that belongs to the unit."""
    layer = MoE(**SIZES)
    order = []
    y = layer(torch.randn(5, 6))
    loss = layer.take_aux_loss()
    y.grad_fn.register_prehook(lambda _: order.append("output"))
    nodes, seen = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        node.register_prehook(lambda _: order.append("loss"))
        nodes += [following for following, _ in node.next_functions]
    (y.sum() + loss).backward()
    assert order[0] == "output"
    assert len(order) > 5


def test_an_evaluation_does_not_lose_the_loss_of_training():
    torch.manual_seed(0)
    layer, x = MoE(**SIZES), torch.randn(5, 6)
    layer(x)
    expected = aux_loss(layer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = layer(x)
        with torch.no_grad():
            layer.eval()(torch.randn(3, 6))
        layer.train()
        loss = aux_loss(layer)
    assert torch.equal(loss, expected)
    assert loss.requires_grad
    (y.sum() + loss).backward()
    layer.eval()(x)
    assert aux_loss(layer) == 0


@pytest.mark.parametrize(
    ("fields", "what"),
    [({}, "auxiliary loss"), ({"aux_loss": "attached", "selection_bias": True}, "loads for the selection bias")],
)
def test_data_parallel_copies_are_refused_in_training(monkeypatch, fields, what):
    """``nn.DataParallel`` runs copies on threads, and throws them away; a CPU stands in for both devices."""
    copies = sys.modules["torch.nn.parallel.replicate"]
    monkeypatch.setattr(copies, "_get_device_index", lambda device, optional: 0)
    monkeypatch.setattr(
        copies, "_broadcast_coalesced_reshape", lambda tensors, devices, detach=False: [tensors for _ in devices]
    )
    model = nn.Sequential(MoE(**SIZES, **fields))
    with pytest.raises(RuntimeError, match=rf"nn\.DataParallel.*{what}.*DistributedDataParallel"):
        copies.replicate(model, [0, 0])
    x = torch.randn(3, 6)
    for replica in copies.replicate(model.eval(), [0, 0]):
        assert torch.equal(replica(x), model(x))
    copies.replicate(nn.Sequential(MoE(**SIZES, aux_loss="attached")), [0, 0])  # whose gradient joins by itself


def test_a_layer_built_without_memory_has_shapes():
    with FakeTensorMode():
        layer = MoE(**SIZES, shared_ffn_hidden_size=5, selection_bias=True, bias="output")
        y = layer(torch.randn(2, 5, 6))
        (y.sum() + aux_loss(layer)).backward()
        assert y.shape == (2, 5, 6)
        assert layer.experts.down_proj.grad.shape == (4, 6, 8)
        assert layer.experts.seed is None


def jagged():
    return torch.nested.nested_tensor([torch.randn(3, 6), torch.randn(2, 6)], layout=torch.jagged)


@pytest.mark.parametrize("make", [jagged, lambda: torch.nested.nested_tensor([torch.randn(3, 6), torch.randn(2, 6)])])
def test_nested_input_is_told_how_to_go(make):
    with pytest.raises(TypeError, match=r"MoE: x: expected a dense tensor, got a nested one.*x\.values\(\)"):
        MoE(**SIZES)(make())
    layer, x = MoE(**SIZES).eval(), jagged()
    y = torch.nested.nested_tensor_from_jagged(layer(x.values()), x.offsets())
    for got, each in zip(y.unbind(), x.unbind(), strict=True):
        torch.testing.assert_close(got, layer(each))


@pytest.mark.parametrize(
    "transform",
    [
        lambda layer, x: torch.vmap(layer)(x),
        lambda layer, x: torch.func.grad(lambda x: layer(x).sum())(x),
        lambda layer, x: torch.func.grad(lambda p: torch.func.functional_call(layer, p, (x,)).sum())(
            dict(layer.named_parameters())
        ),
        lambda layer, x: torch.func.jvp(layer, (x,), (x,)),
    ],
    ids=["vmap", "grad", "grad of parameters", "jvp"],
)
def test_function_transforms_are_refused(transform):
    with pytest.raises(RuntimeError, match=r"MoE: torch\.func's transforms .* forward-mode differentiation"):
        transform(MoE(**SIZES), torch.randn(2, 5, 6))


@pytest.mark.parametrize("name", ["experts.gate_up_proj", "experts.down_proj", "router.weight"])
def test_weights_of_another_kind_are_named(name):
    """torchao's quantised weights are tensors that hold others; ``TwoTensor`` is PyTorch's example of such a kind."""
    layer = MoE(**SIZES)
    module, _, leaf = name.rpartition(".")
    weight = layer.get_parameter(name).detach()
    setattr(layer.get_submodule(module), leaf, nn.Parameter(TwoTensor(weight, weight.clone())))
    with pytest.raises(TypeError, match=rf"{leaf.replace('gate_', '')}: expected a plain tensor, got TwoTensor"):
        layer(torch.randn(3, 6))


def test_a_checkpointed_layer_still_reads_its_loss_once():
    layer, x = MoE(**SIZES), torch.randn(5, 6, requires_grad=True)
    twin = copy.deepcopy(layer)
    (checkpoint(layer, x, use_reentrant=False).sum() + aux_loss(layer)).backward()
    (twin(x).sum() + aux_loss(twin)).backward()
    torch.testing.assert_close(layer.router.weight.grad, twin.router.weight.grad)
    assert aux_loss(layer) == 0


def test_weights_are_not_asked_for_ahead_where_a_forward_brings_them():
    """Under expert parallelism a layer takes its weights while tokens travel, unless they may not be here yet."""
    experts = MoE(**SIZES).experts
    assert experts.weights_ahead() is not None
    hook = experts.register_forward_pre_hook(lambda module, args: None)
    assert experts.weights_ahead() is None
    hook.remove()
    offload(experts)
    assert experts.weights_ahead() is None
