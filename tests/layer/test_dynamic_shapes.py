"""Lengths are symbols to a compiler: one graph and one exported program serve batches of any number of tokens."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import dmoe
from dmoe.ops import histogram, replicate, routing_plan, topk_indices, topology

LENGTHS = (7, 11, 16, 24, 33, 40, 51, 64, 90, 100)
SIZES = {"hidden_size": 8, "ffn_hidden_size": 4, "num_experts": 4, "top_k": 2}
VARIANTS = {
    "dropless": {},
    "capacity": {"capacity_factor": 1.25},
    "capacity, floor, a minimum": {"capacity_factor": 0.5, "capacity_formula": "floor", "min_capacity": 4},
    "capacity per choice": {"capacity_factor": 1.0, "capacity_formula": "ceil_per_choice"},
    "capacity by weight": {"capacity_factor": 1.0, "drop_order": "gate_weight"},
    "expert choice": {"router": "expert_choice", "causal": False, "capacity_factor": 1.5},
    "expert choice, a minimum": {"router": "expert_choice", "causal": False, "min_capacity": 3},
}


def build(name: str) -> dmoe.MoE:
    torch.manual_seed(0)
    return dmoe.MoE(**SIZES, **VARIANTS[name])


@pytest.mark.parametrize("name", VARIANTS)
def test_one_graph_serves_every_length(name):
    layer = build(name)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for length in LENGTHS:
        x = torch.randn(length, 8)
        y = compiled(x)
        dmoe.aux_loss(layer)
        torch.testing.assert_close(y, layer(x))
        dmoe.aux_loss(layer)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("name", VARIANTS)
def test_an_exported_program_runs_at_other_lengths(name):
    layer = build(name).eval()
    tokens = torch.export.Dim("tokens", min=4, max=4096)
    program = torch.export.export(layer, (torch.randn(12, 8),), dynamic_shapes={"x": {0: tokens}})
    for length in LENGTHS:
        x = torch.randn(length, 8)
        torch.testing.assert_close(program.module()(x), layer(x))


@pytest.mark.skipif(
    torch.__version__ < (2, 13), reason="what AOTInductor makes of these operations in PyTorch 2.11 returns None"
)
def test_ahead_of_time_inductor_runs_it(tmp_path):
    """Its runtime cannot read an empty list back, which the widths of equal experts were."""
    layer, x = build("dropless").eval(), torch.randn(12, 8)
    tokens = torch.export.Dim("tokens", min=4, max=4096)
    with torch.no_grad(), torch._inductor.config.patch({"aot_inductor.compile_wrapper_opt_level": "O0"}):
        program = torch.export.export(layer, (x,), dynamic_shapes={"x": {0: tokens}})
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "layer.pt2"))
        loaded = torch._inductor.aoti_load_package(package)
        for length in (12, 33):
            x = torch.randn(length, 8)
            torch.testing.assert_close(loaded(x), layer(x))


def test_no_call_passes_an_empty_list():
    seen: list[object] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace == "dmoe":
                seen.extend([function, *args])
            return function(*args, **(kwargs or {}))

    with Watch():
        for name in ("dropless", "expert choice"):
            build(name)(torch.randn(9, 8)).sum().backward()
    assert torch.ops.dmoe.moe_mlp_backward.default in seen
    assert [value for value in seen if isinstance(value, list) and not value] == []


def plan(x, length):
    return routing_plan(x, 4, capacity=length)[0]


BY_LENGTH = {
    "routing_plan": (plan, lambda: torch.randint(0, 4, (50, 2))),
    "histogram": (lambda x, length: histogram(x % length, length), lambda: torch.arange(50)),
    "topk_indices": (topk_indices, lambda: torch.randn(3, 200)),
    "topology": (
        lambda x, length: topology(x, 4, 2, length),
        lambda: torch.tensor([0, 8, 16], dtype=torch.int32),
    ),
    "replicate": (lambda x, length: replicate(x, torch.tensor([3, 6]), length), lambda: torch.randn(2)),
}


@pytest.mark.parametrize("name", BY_LENGTH)
def test_a_length_is_a_symbol_to_every_operation(name):
    run, build_input = BY_LENGTH[name]
    x = build_input()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=counter)
    for length in LENGTHS:
        assert torch.equal(compiled(x, length), run(x, length))
    assert counter.frame_count <= 2
