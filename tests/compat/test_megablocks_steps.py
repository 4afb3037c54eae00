"""The layer is a tree of modules and a row of methods: each can be hooked, wrapped, replaced or overridden."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.distributed as dist
from helpers import without_generated_products
from megablocks_cases import KINDS, arguments, layer_of, options_of
from torch import nn

from dmoe.compat import megablocks
from dmoe.compat.megablocks import ops
from dmoe.compat.megablocks.layers import dmlp_registry, glu, mlp, moe, mpu, router
from dmoe.compat.megablocks.layers import dmoe as dmoe_module

pytestmark = without_generated_products
close = functools.partial(torch.testing.assert_close, rtol=1e-9, atol=1e-11)


def tokens():
    return torch.randn(5, 4, 6, dtype=torch.float64, requires_grad=True)


def results(layer, x):
    """Output and gradients of one training step."""
    layer.zero_grad()
    megablocks.clear_load_balancing_loss()
    y = layer(x)
    y = sum(y) if isinstance(y, tuple) else y
    loss = (y * torch.arange(y.numel(), dtype=y.dtype).view(y.shape)).sum()
    loss = loss + megablocks.batched_load_balancing_loss(layer.experts.args)
    x.grad = None
    loss.backward()
    return {"y": y, "x": x.grad} | {name: p.grad for name, p in layer.named_parameters()}


def same(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        close(tensor, other[name], msg=name)


# ---- Hooks


@pytest.mark.parametrize("factor", [0, 0.6, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_hooks_on_the_experts_mlp_fire_and_change_nothing_by_themselves(kind, factor):
    torch.manual_seed(0)
    layer, _ = layer_of(kind, moe_capacity_factor=factor)
    x, calls = tokens(), []
    expected = results(layer, x)
    handles = [
        layer.experts.mlp.register_forward_pre_hook(lambda module, inputs: calls.append(("before", len(inputs)))),
        layer.experts.mlp.register_forward_hook(lambda module, inputs, output: calls.append(("after", output.dim()))),
        layer.experts.mlp.register_full_backward_hook(lambda module, inputs, outputs: calls.append(("back", 0))),
    ]
    same(results(layer, x), expected)
    dims = 3 if kind == "MoE" else 2
    assert calls == [("before", 1 if kind == "MoE" else 2), ("after", dims), ("back", 0)]
    handles[1].remove()
    layer.experts.mlp.register_forward_hook(lambda module, inputs, output: 2 * output)
    close(layer(x), 2 * expected["y"])
    handles[0].remove()


def test_a_hook_for_all_modules_sees_the_experts_mlp():
    layer, _ = layer_of("dMoE glu")
    seen = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, i, o: seen.append(type(module)))
    layer(tokens())
    handle.remove()
    assert seen == [nn.Linear, router.LearnedRouter, glu.GroupedGLU, dmoe_module.ParallelDroplessMLP, megablocks.dMoE]


# ---- Steps of the forward


STEPS = {
    "MoE": ["forward_once", "permute_and_compute", "indices_and_bins", "expert_capacity"],
    "dMoE grouped": ["forward_once", "grouped_forward_once", "grouped_permute_and_compute", "indices_and_bins"],
    "dMoE sparse": ["forward_once", "sparse_forward_once", "indices_and_padded_bins", "topology", "sparse_transpose"],
    "dMoE glu": ["forward_once", "grouped_forward_once", "grouped_permute_and_compute", "indices_and_bins"],
}
OF = {"MoE": moe.ParallelMLP} | dict.fromkeys(KINDS[1:], dmoe_module.ParallelDroplessMLP)


@pytest.mark.parametrize(("kind", "step"), [(kind, step) for kind, steps in STEPS.items() for step in steps])
@pytest.mark.parametrize("how", ["subclass", "instance", "class"])
def test_a_step_of_ones_own_is_called(kind, step, how, monkeypatch):
    torch.manual_seed(0)
    layer, args = layer_of(kind, moe_capacity_factor=0.8)
    x, calls = tokens(), []
    expected = results(layer, x)
    original = getattr(OF[kind], step)

    @functools.wraps(original)
    def own(self, *inputs):
        calls.append(step)
        return original(self, *inputs)

    if how == "class":
        monkeypatch.setattr(OF[kind], step, own)
    elif how == "instance":
        setattr(layer.experts, step, own.__get__(layer.experts))
        if step == "forward_once":
            layer.experts.forward_fn = layer.experts.forward_once  # as there: chosen when the layer is built
    else:
        experts = type("Own", (OF[kind],), {step: own})(args).double()
        experts.load_state_dict(layer.experts.state_dict())
        layer.experts = experts
    if how == "class" and step == "forward_once":
        rebuilt = type(layer)(args).double()
        rebuilt.load_state_dict(layer.state_dict())
        layer = rebuilt
    same(results(layer, x), expected)
    assert calls == [step]


def test_a_step_decides_what_is_computed():
    torch.manual_seed(0)
    layer, args = layer_of("dMoE grouped")

    class Doubled(megablocks.ParallelDroplessMLP):
        def permute_and_compute(self, *inputs):
            raise AssertionError("a dropless layer on one rank has no use for it")

        def grouped_permute_and_compute(self, x, tokens_per_expert, indices, bin_ids, weights, bins, capacity, top_k):
            rows = ops.gather(x.reshape(-1, x.shape[-1]), indices, bin_ids, bins, top_k)
            return ops.scatter(self.mlp(rows, tokens_per_expert) * 2, indices, bin_ids, weights, bins, top_k)

    experts = Doubled(args).double()
    experts.load_state_dict(layer.experts.state_dict())
    x = tokens()
    expected = layer(x) * 2
    layer.experts = experts
    close(layer(x), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_take_tokens_of_any_form_and_none_at_all(kind):
    layer, _ = layer_of(kind, moe_capacity_factor=0)
    x = torch.randn(0, 3, 6, dtype=torch.float64)
    calls = []
    inputs = [torch.randn(*leading, 6, dtype=torch.float64) for leading in ((7,), (2, 2, 3), (1, 1))]
    expected = [layer(each) for each in inputs]
    layer.experts.mlp.register_forward_hook(lambda module, i, o: calls.append(o.shape[-1]))
    assert layer(x).shape == x.shape
    for each, y in zip(inputs, expected, strict=True):
        close(layer(each), y)
    assert calls == [6] * 4


# ---- Other pieces


class Router(nn.Module):
    """A router that knows nothing of Arguments."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize("kind", KINDS)
def test_a_router_may_be_another_module(kind):
    layer, _ = layer_of(kind)
    x = tokens()
    expected = layer(x)
    layer.router = Router(layer.router)
    close(layer(x), expected)


# A group's destructor waits for its thread, which may be waiting for Python's lock, to let go of the last work: DDP's
# reducer, freed at the end of a test, must not be the last that holds it.
KEPT_GROUPS = []


def test_a_router_goes_into_ddp(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    KEPT_GROUPS.append(dist.group.WORLD)
    try:
        layer, _ = layer_of("dMoE grouped")
        x = tokens()
        expected = results(layer, x)
        layer.router = nn.parallel.DistributedDataParallel(layer.router)
        got = results(layer, x)
        same({name.replace("module.", ""): tensor for name, tensor in got.items()}, expected)
    finally:
        dist.destroy_process_group()


def test_choices_and_noise_of_a_routers_own_are_used():
    class Reversed(router.LearnedRouter):
        def _top_k(self, scores):
            weights, experts = torch.topk(scores, self.args.moe_top_k, largest=False)
            return weights * 3, experts

    for norm in (None, 2.0):
        args = arguments(moe_normalize_expert_weights=norm)
        own, x = Reversed(args), torch.randn(7, 6)
        scores, weights, experts = own(x)
        lowest, ids = torch.topk(scores, 2, largest=False)
        lowest = lowest * 3
        expected = lowest if norm is None else lowest / lowest.norm(p=2, dim=-1, keepdim=True)
        torch.testing.assert_close(weights, expected)
        assert torch.equal(experts, ids)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_experts_may_be_any_module(kind):
    """In MegaBlocks' convention: ``mlp(x, tokens_per_expert)``, or with the topology where the layer is sparse."""

    class Own(nn.Module):
        def forward(self, x, plan):
            sizes = None if hasattr(plan, "column_indices") else plan.tolist()
            seen.append((x.shape[0], None if sizes is None else sum(sizes)))
            return x * 2

    seen = []
    layer, _ = layer_of(kind)
    layer.experts.mlp = Own()
    x = tokens()
    _, weights, _ = layer.router(x)
    close(layer(x), x * 2 * weights.sum(1).view(5, 4, 1))
    rows, total = seen[0]
    assert total == (None if kind.endswith("sparse") else 40)
    assert rows % (128 if kind.endswith("sparse") else 40) == 0


def test_experts_of_a_capacity_may_be_any_module():
    layer, _ = layer_of("MoE", moe_capacity_factor=1)
    layer.experts.mlp = nn.Identity()
    x = tokens()
    bins = []
    layer.experts.mlp.register_forward_hook(lambda module, i, o: bins.append(tuple(o.shape)))
    layer(x)
    assert bins == [(4, 10, 6)]


@pytest.mark.parametrize(("kind", "cls"), [("dMoE grouped", mlp.GroupedMLP), ("dMoE glu", glu.GroupedGLU)])
def test_a_subclass_of_the_experts_is_called(kind, cls):
    class Own(cls):
        def forward(self, x, tokens_per_expert):
            return super().forward(x, tokens_per_expert) * 2

    layer, args = layer_of(kind)
    x = tokens()
    expected = layer(x) * 2
    own = Own(args).double()
    own.load_state_dict(layer.experts.mlp.state_dict())
    layer.experts.mlp = own
    close(layer(x), expected)


def test_experts_of_ones_own_are_registered_and_the_layers_forward_is_patched(monkeypatch):
    """As fms-acceleration does: one more weight made as MegaBlocks makes ``v1``, and no loss saved."""

    class WithThird(mlp.SparseMLP):
        def __init__(self, args):
            super().__init__(args)
            self.w3 = nn.Parameter(torch.empty(self._num_rows_per_rank, args.hidden_size))
            with torch.no_grad():
                self.w3.copy_(mlp.create_dmoe_expert_weights(args, 4, 128, args.hidden_size, args.init_method))
            mpu.set_expert_model_parallel_attributes(self.w3, self._should_set_parallelism_attribute)

        def forward(self, x, topo):
            return super().forward(x, topo) * self.scale_grad(self.w3).mean()

    def forward(self, x, scores, expert_weights, top_experts):
        y, _ = self.forward_fn(x, expert_weights, top_experts)
        return y.view(x.shape), None

    monkeypatch.setitem(dmlp_registry._REGISTRY["mlp"], "sparse", WithThird)
    monkeypatch.setattr(megablocks.ParallelMLP, "forward", forward)
    layer, _ = layer_of("dMoE sparse")
    y, nothing = layer(tokens())
    assert nothing is None
    assert megablocks.get_load_balancing_loss() == []
    y.sum().backward()
    assert {name for name, p in layer.experts.mlp.named_parameters() if p.grad.any()} == {"w1", "w2", "w3"}
    assert all(mpu.is_moe_param(p) for p in layer.experts.mlp.parameters())


def test_a_wrapper_that_patches_forward_is_called():
    """As accelerate's hooks do: on the instance."""
    layer, _ = layer_of("dMoE grouped")
    x, mlp_ = tokens(), layer.experts.mlp
    expected, inner = layer(x) * 2, mlp_.forward
    mlp_.forward = lambda *inputs: inner(*inputs) * 2
    close(layer(x), expected)


def test_copies_and_files_of_a_layer_run_their_own_steps(tmp_path):
    layer, _ = layer_of("dMoE grouped")
    x = tokens()
    torch.save(layer, tmp_path / "layer.pt")
    for other in (copy.deepcopy(layer), torch.load(tmp_path / "layer.pt", weights_only=False)):
        close(other(x), layer(x))
        with torch.no_grad():
            for parameter in other.experts.parameters():
                parameter.zero_()
        assert not other(x).any()
    assert layer(x).any()


def test_methods_have_megablocks_signatures():
    layer, _ = layer_of("dMoE sparse")
    experts = layer.experts
    assert (experts.sort_end_bit, experts.blocking, experts.hidden_size, experts.ffn_hidden_size) == (2, 128, 6, 128)
    assert experts.transpose_sort_end_bit == 2
    top = torch.tensor([1, 0, 3, 1])
    indices, bin_ids, bins, counts = experts.indices_and_bins(top)
    assert indices.tolist() == [1, 0, 3, 2]
    assert bin_ids.tolist() == [0, 1, 1, 3]
    assert bins.tolist() == [1, 3, 3, 4]
    assert counts.tolist() == [1, 2, 0, 1]
    *_, padded_bins, counts = experts.indices_and_padded_bins(top)
    assert padded_bins.tolist() == [128, 256, 256, 384]
    topo = experts.topology(torch.zeros(384, 6), padded_bins)
    assert tuple(topo.shape) == (384, 4 * 128)
    assert topo.data.device.type == "meta"
    assert topo.column_indices.tolist() == [0, 1, 3]
    assert topo.column_indices_t.tolist() == [0, 1, 2]
    assert topo.offsets_t.tolist() == [0, 1, 2, 2, 3]
    transposed = experts.sparse_transpose(topo.shape, topo.row_indices, topo.column_indices, topo.offsets)
    assert [each.tolist() for each in transposed] == [[0, 1, 2], [0, 1, 2, 2, 3], [0, 1, 2]]
    weights = torch.rand(4, 1, dtype=torch.float64)
    y, counts = experts.forward_once(torch.randn(4, 1, 6, dtype=torch.float64), weights.expand(4, 2), top.repeat(2))
    assert y.shape == (4, 6)
    assert counts.tolist() == [2, 4, 0, 2]
    assert options_of("MoE").mlp_impl == "grouped"


def test_a_width_that_has_no_blocks_is_refused_where_blocks_are_needed():
    layer, _ = layer_of("dMoE sparse", ffn_hidden_size=10)
    layer(tokens())
    layer.experts.mlp.register_forward_hook(lambda *given: None)
    with pytest.raises(ValueError, match=r"topology: ffn_hidden_size: expected a multiple of the block size 128"):
        layer(tokens())
