"""tile_table: reference, operation and kernel against tiles cut one expert after the other."""

from __future__ import annotations

import pytest
import torch
from helpers import where_kernels_run
from hypothesis import given
from hypothesis import strategies as st
from plan_cases import expected_tiles

from dmoe.config import MoEConfig
from dmoe.ops.tile_table import preferred_tile_rows, tile_bound, tile_table, tile_table_cuda, tile_table_ref
from dmoe.plan import RoutingPlan, device_tile_rows, plan_expert_choice, plan_token_choice

kernel = where_kernels_run(tile_table_cuda)
implementations = pytest.mark.parametrize("table", [tile_table, tile_table_ref, kernel], ids=["op", "ref", "kernel"])


def offsets_of(loads):
    return torch.tensor([0, *loads]).cumsum(0).int()


def assert_table(table, loads, spare, tile_rows):
    offsets = offsets_of(loads)
    tiles, by_load = table(offsets, sum(loads) + spare, tile_rows)
    expected, order = expected_tiles(offsets.tolist(), sum(loads) + spare, tile_rows)
    assert tiles.dtype == by_load.dtype == torch.int32
    assert tiles.shape == (len(expected), 2)
    assert tiles.tolist() == expected
    assert by_load.tolist() == order


@implementations
@given(
    loads=st.lists(st.integers(0, 40) | st.sampled_from([0, 7, 16]), min_size=1, max_size=12),
    spare=st.integers(0, 50),
    tile_rows=st.sampled_from([1, 2, 7, 16, 64]),
)
def test_equals_cutting_one_expert_after_the_other(table, loads, spare, tile_rows):
    assert_table(table, loads, spare, tile_rows)


@implementations
def test_tiles_of_one_expert_fill_several_blocks(table):
    assert_table(table, [3, 700, 0], 300, 2)  # the kernel writes 128 tiles at a time


@pytest.mark.parametrize("num_experts", [17, 40])
def test_experts_beyond_one_chunk(num_experts, monkeypatch):
    """The kernel reads some experts at a time; the last one ranks first."""
    from dmoe.kernels import tile_table as kernels

    monkeypatch.setattr(kernels, "_CHUNK", 16)
    loads = [*torch.randint(0, 3, (num_experts - 1,), generator=torch.Generator().manual_seed(0)).tolist(), 5]
    assert_table(tile_table_ref, loads, 0, 1)
    assert_table(kernel, loads, 0, 1)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=9), st.integers(1, 9))
def test_the_bound_holds_for_every_split(loads, tile_rows):
    needed = sum(-(-load // tile_rows) for load in loads)
    assert needed <= tile_bound(sum(loads), len(loads), tile_rows)


@pytest.mark.parametrize(
    ("num_rows", "num_experts", "rows"),
    [(96, 1, 128), (95, 1, 64), (40, 1, 64), (39, 1, 32), (20, 1, 32), (19, 1, 16), (0, 8, 16), (8 * 96, 8, 128)],
)
def test_tiles_fit_an_average_expert(num_rows, num_experts, rows):
    assert preferred_tile_rows(num_rows, num_experts) == rows
    assert device_tile_rows(torch.device("cuda"), num_rows, num_experts) == rows
    assert device_tile_rows(torch.device("cpu"), num_rows, num_experts) == 0


def plans(tile_rows):
    indices = torch.tensor([[0, 2], [2, 3], [2, 1], [3, 3]])
    chosen = torch.tensor([[0, 2, 1], [3, -1, 0]])
    yield plan_token_choice(indices, 3, tile_rows=tile_rows)
    yield plan_token_choice(indices, 3, block_size=4, tile_rows=tile_rows)
    yield plan_token_choice(indices, 3, capacity=2, binned=True, tile_rows=tile_rows)
    yield plan_token_choice(
        indices, 3, capacity=1, drop_order="gate_weight", priority=torch.rand(4, 2), tile_rows=tile_rows
    )
    yield plan_expert_choice(chosen, 4, tile_rows=tile_rows)
    yield plan_expert_choice(chosen[:, :0], 4, tile_rows=tile_rows)


def test_plans_carry_tiles_of_all_their_rows_when_asked():
    for plan in plans(2):
        tiles, by_load = expected_tiles(plan.expert_offsets.tolist(), plan.num_rows, 2)
        assert plan.tile_rows == 2
        assert plan.tiles.tolist() == tiles
        assert plan.experts_by_load.tolist() == by_load
    for plan in plans(0):
        assert (plan.tiles, plan.experts_by_load, plan.tile_rows) == (None, None, 0)


@pytest.mark.parametrize("router", ["top_k", "expert_choice", "uniform"])
def test_layers_ask_for_tiles_where_they_are_read(router, monkeypatch):
    """On CUDA tensors the rule gives 16 here; the CPU asks for none."""
    from dmoe.layer import MoE
    from dmoe.routing import expert_choice, planning

    asked = []

    def as_on_cuda(device, num_rows, num_experts):
        asked.append((num_rows, num_experts))
        return device_tile_rows(torch.device("cuda"), num_rows, num_experts)

    config = MoEConfig(8, 8, 4, router=router, causal=False, capacity_factor=1.0 if router != "top_k" else None)
    layer, x = MoE(config), torch.randn(6, 8)
    assert layer.router(x).plan.tiles is None
    for module in (expert_choice, planning):
        monkeypatch.setattr(module, "device_tile_rows", as_on_cuda)
    plan: RoutingPlan = layer.router(x).plan
    assert asked == [(8 if router == "expert_choice" else 12, 4)]
    assert plan.tile_rows == 16
    assert plan.tiles.tolist() == expected_tiles(plan.expert_offsets.tolist(), plan.num_rows, 16)[0]


def test_the_function_asks_too(monkeypatch):
    from dmoe import functional

    seen = []
    monkeypatch.setattr(functional, "device_tile_rows", lambda *_: 32)
    monkeypatch.setattr(functional, "_compute", lambda x, plan, *_, **__: seen.append(plan) or x)
    weights = functional.ExpertWeights(torch.randn(3, 2, 5, 4), torch.randn(3, 4, 5))
    functional.moe_mlp(torch.randn(6, 4), torch.zeros(6, 1, dtype=torch.int64), torch.ones(6, 1), weights)
    assert seen[0].tile_rows == 32


def test_registration():
    torch.library.opcheck(torch.ops.dmoe.tile_table.default, (offsets_of([3, 0, 9]), 15, 4))


def test_one_trace_serves_every_number_of_rows():
    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def traced(offsets, rows):
        return tile_table(offsets, rows.shape[0], 4)[0] + 1

    with torch._dynamo.config.patch(error_on_recompile=True):
        for loads in ([3, 5], [9, 0], [31, 40]):
            offsets, rows = offsets_of(loads), torch.empty(sum(loads), 2)
            assert torch.equal(traced(offsets, rows), tile_table(offsets, rows.shape[0], 4)[0] + 1)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(3), 5, 4), TypeError, "tile_table: expert_offsets: expected int32, got torch.float32"),
        ((torch.zeros(3, 1).int(), 5, 4), ValueError, r"tile_table: expert_offsets: expected one dimension"),
        ((torch.zeros(1).int(), 5, 4), ValueError, r"tile_table: expert_offsets: expected E \+ 1 >= 2 offsets, got 1"),
        ((torch.zeros(3).int(), 5, 0), ValueError, "tile_table: expected tile_rows of at least 1 .* got 0 and 5"),
        ((torch.zeros(3).int(), -1, 4), ValueError, "tile_table: .*num_rows of at least 0, got 4 and -1"),
    ],
)
def test_errors_name_argument_and_values(arguments, error, message):
    with pytest.raises(error, match=message):
        tile_table(*arguments)
