"""Rows by other transports against rows by the all-to-all: the same results and gradients, bit for bit.

The packages are stand-ins over gloo with the real ones' signatures and checks: see ``tests/support/fake_deep_ep.py``.
"""

from __future__ import annotations

import inspect

import fake_deep_ep
import pytest
import rank_jobs_transports as jobs
import torch
from dispatch_cases import routings
from hypothesis import given, settings
from hypothesis import strategies as st

from dmoe import MoEConfig

H, F = 16, 4
BASE = {"hidden_size": H, "ffn_hidden_size": F, "num_experts": 8, "top_k": 2, "load_balancing_coefficient": 0.0}


def equal(results, expected):
    """Every value of two transports' results, and that there is any."""
    assert results.keys() == expected.keys()
    for name, value in results.items():
        other = expected[name]
        assert (value is None) == (other is None), name
        assert value is None or torch.equal(value, other), name


# ----------------------------------------------------------------------------------------------------------- signatures

# What DeepEP's sources say: deep_ep/buffer.py at the tag v1.2.1 (commit 9af0e0d), deep_ep/buffers/legacy.py and
# deep_ep/utils/event.py of 2.1.0 (commit dd758ca), and Config in csrc, which pybind binds with positional arguments.
_LAYOUT = "self, topk_idx, num_experts, previous_event=None, async_finish=False, allocate_on_comm_stream=False"
_DISPATCH = (
    "self, x, handle=None, num_tokens_per_rank=None, num_tokens_per_rdma_rank=None, is_token_in_rank=None, "
    "num_tokens_per_expert=None, topk_idx=None, topk_weights=None, expert_alignment=1, num_worst_tokens=0, "
    "config=None, previous_event=None, async_finish=False, allocate_on_comm_stream=False"
)
_COMBINE = (
    "self, x, handle, topk_weights=None, bias=None, config=None, previous_event=None, async_finish=False, "
    "allocate_on_comm_stream=False"
)
_INIT = (
    "self, group, num_nvl_bytes=0, num_rdma_bytes=0, low_latency_mode=False, num_qps_per_rank=24, "
    "allow_nvlink_for_low_latency_mode=True, allow_mnnvl=False, explicitly_destroy=False, {}comm=None"
)
_COMMON = {
    "Buffer.get_dispatch_layout": _LAYOUT,
    "Buffer.dispatch": _DISPATCH,
    "Buffer.combine": _COMBINE,
    "Buffer.get_dispatch_config": "num_ranks",
    "Buffer.get_combine_config": "num_ranks",
    "Config.get_nvl_buffer_size_hint": "self, hidden_bytes, num_ranks",
    "Config.get_rdma_buffer_size_hint": "self, hidden_bytes, num_ranks",
}
SIGNATURES = {
    "1.2.1": {
        **_COMMON,
        "Buffer.__init__": _INIT.format(""),
        "EventOverlap.current_stream_wait": "self",
    },
    "2.1.0": {
        **_COMMON,
        "Buffer.__init__": _INIT.format("enable_shrink=False, "),
        "EventOverlap.current_stream_wait": "self, release_handle=False",
    },
}


def signature_of(arguments):
    found = {}
    exec(f"def recorded({arguments}): pass", found)
    return inspect.signature(found["recorded"])


def test_the_stand_in_has_deep_ep_s_signatures():
    for name, arguments in SIGNATURES["1.2.1"].items():
        owner, method = name.split(".")
        assert inspect.signature(getattr(getattr(fake_deep_ep, owner), method)) == signature_of(arguments), name


@pytest.mark.parametrize("version", SIGNATURES)
def test_every_call_fits_deep_ep_s_signatures(ranks, version):
    for calls in ranks.run(jobs.order_and_arguments, BASE):
        seen = {name for name, _, _ in calls}
        assert seen >= SIGNATURES[version].keys()
        for name, positional, named in calls:
            if name in SIGNATURES[version]:
                signature_of(SIGNATURES[version][name]).bind(*range(positional), **dict.fromkeys(named))


def test_work_lies_between_the_halves_both_ways(ranks):
    told = {"Buffer.dispatch": "dispatch", "Buffer.combine": "combine", "EventOverlap.current_stream_wait": "wait"}
    told |= {"work": "work", "work's gradient": "work's gradient"}
    there, back = ["dispatch", "work", "wait"], ["combine", "wait"]
    gradients = ["dispatch", "wait", "combine", "work's gradient", "wait"]
    for calls in ranks.run(jobs.order_and_arguments, BASE):
        order = [told[name] for name, _, _ in calls if name in told]
        assert order[:5] == there + back
        assert sorted(order[5:]) == sorted(gradients)
        assert order.index("work's gradient") < len(order) - 1, "the last wait is behind the work"


# -------------------------------------------------------------------------------------------------------------- results


def shares_of(routing, dtype):
    """Tokens of the ranks, their choices, weights and results' gradients; all experts' weights."""
    _, experts, ids, generator = routing
    rows = [[torch.randn(len(each), H, generator=generator).to(dtype) for _ in range(2)] for each in ids]
    shares = [
        (x, each, torch.rand(each.shape, generator=generator), grad_y)
        for each, (x, grad_y) in zip(ids, rows, strict=True)
    ]
    return shares, [torch.randn(experts, *shape, generator=generator).to(dtype) for shape in ((F, H), (H, F))]


OTHERS = ("deep_ep", "symmetric_memory")


@pytest.mark.parametrize("other", OTHERS)
@settings(max_examples=20)
@given(
    routing=routings().filter(lambda drawn: drawn[0] > 1),
    needs=st.sampled_from(["both", "both", "x", "gates"]),
    levels=st.sampled_from([None, None, 1, 2]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_rows_and_gradients_equal_those_of_the_all_to_all_bit_for_bit(ranks, other, routing, needs, levels, dtype):
    shares, weights = shares_of(routing, torch.bfloat16 if other == "deep_ep" else dtype)
    results = ranks.run(jobs.experts, shares, weights, levels, needs, other, ranks=len(shares))
    for (expected, moved, rows), (result, moved_too, rows_too) in results:
        equal(result, expected)
        assert (moved, rows) == (moved_too, rows_too)
        assert (result["x"] is None) == (needs == "gates")
        assert (result["gates"] is None) == (needs == "x")


@pytest.mark.parametrize("other", OTHERS)
def test_rows_need_not_lie_in_one_piece(ranks, other):
    generator = torch.Generator().manual_seed(1)
    shares = []
    for tokens in (5, 3, 0, 7):
        x, grad_y = (torch.randn(tokens, H, generator=generator).bfloat16() for _ in range(2))
        ids = torch.randint(0, 4, (tokens, 1), generator=generator)  # one choice: each row's weights are its own
        shares.append((x, ids, torch.rand(tokens, 1, generator=generator), grad_y))
    for expected, result in ranks.run(jobs.strided, shares, other):
        equal(result, expected)


def test_ranks_without_rows_take_part_in_backward(ranks):
    for rank, (rows, grad) in enumerate(ranks.run(jobs.results_of_nothing)):
        assert rows == (0 if rank else 12)
        assert grad is not None
        assert torch.equal(grad, torch.full((3, 16), 2.0, dtype=torch.bfloat16))


LAYERS = {
    "plain": {},
    "shared expert": {"shared_ffn_hidden_size": 3},
    "one expert a rank": {"num_experts": 4, "gated": False, "bias": "expert"},
    "capacity": {"capacity": 2},
    "replicate": {"balance_ranks": "replicate", "balance_slack": 0.0, "min_rows_per_copy": 1},
    "recomputed pre-activation": {"recompute_pre_activation": True},
    "chunks": {"overlap_degree": 2, "shared_ffn_hidden_size": 3},
    "experts choose": {"router": "expert_choice", "causal": False},
}
OF_THE_EXCHANGE = {
    "half an expert a rank": {"num_experts": 2},
    "static": {"max_rows_received": 64},
    "narrow": {"wire_dtype": "fp8", "wire_backward": True},
    "joined": {"join_choices": True},
}


def shares_of_layer(tokens, masked=True):
    generator = torch.Generator().manual_seed(3)
    shares = [
        (torch.randn(n, H, generator=generator), torch.randn(n, H, generator=generator).bfloat16()) for n in tokens
    ]
    return [(*share, torch.rand(len(share[0]), generator=generator) < 0.8 if masked else None) for share in shares]


@pytest.mark.parametrize(
    ("other", "name"),
    [*((other, name) for other in OTHERS for name in LAYERS), *((OTHERS[1], name) for name in OF_THE_EXCHANGE)],
)
@pytest.mark.parametrize("how", ["plain", "checkpoint"])
def test_layers_equal_those_by_the_all_to_all(ranks, other, name, how):
    fields, copies = {**BASE, **(LAYERS | OF_THE_EXCHANGE)[name]}, 0
    for tokens in ([9, 4, 0, 12], [7, 10]):
        shares = shares_of_layer(tokens, masked=name != "experts choose")
        results = ranks.run(jobs.layers, fields, shares, other, how, ranks=len(tokens))
        for (expected, counted, hosted), (result, counted_too, hosted_too) in results:
            equal(result, expected)
            assert all(torch.equal(a, b) for a, b in zip(counted, counted_too, strict=True))
            assert hosted == hosted_too
            copies += hosted
    assert (copies > 0) == (name == "replicate")


def test_symmetric_memory_beside_tensor_parallelism(ranks):
    shares = shares_of_layer([9, 4, 0, 12])
    for (expected, *_), (result, *_) in ranks.run(jobs.layers, BASE, shares, OTHERS[1], "plain", ("tp", 2)):
        equal(result, expected)


def test_autocast_sends_bfloat16_by_deep_ep(ranks):
    torch.manual_seed(5)
    shares = [(torch.randn(n, H), torch.randn(n, H), None) for n in (3, 8, 1, 6)]
    for (expected, *_), (result, *_) in ranks.run(jobs.layers, BASE, shares, "deep_ep", "autocast"):
        equal(result, expected)


# ------------------------------------------------------------------------------------------------- buffers and refusals


def test_layers_share_buffers_that_grow_with_the_widest_row_and_go_with_the_last_layer(ranks):
    assert ranks.run(jobs.buffers, BASE) == [[1, 1, 2, 2, 3]] * 4


def test_rows_are_freed_with_the_last_name_of_them(ranks):
    assert ranks.run(jobs.freed) == [[[True, True], [True, True]]] * 4


REFUSED = {
    "absent": (4, "ImportError: MoE: transport: expected 'all_to_all' without the package deep_ep"),
    "one rank": (1, "ValueError: MoE: transport: expected 'all_to_all' with 1 ranks in ep_group, got 'deep_ep'"),
    "few experts": (4, "num_experts: expected a multiple of the 4 ranks with transport='deep_ep', got 2"),
    "tp": (4, "MoE: expert_tp_group: expected None with transport='deep_ep', got ProcessGroup"),
    "levels": (4, "MoE: ep_levels: expected None with transport='deep_ep', got TwoLevel"),
    "static": (4, "MoE: max_rows_received: expected None with transport='deep_ep', got 3"),
    "wire": (4, "MoE: wire_dtype: expected None with transport='deep_ep', got fp8"),
    "joined": (4, "MoE: join_choices: expected None with transport='deep_ep', got False"),
    "dtype": (4, "TypeError: dispatch: x: expected torch.bfloat16 with transport='deep_ep'"),
    "width": (4, "ValueError: dispatch: x: expected a multiple of 16 columns with transport='deep_ep', got 8"),
    "choices": (4, "dispatch: expert_indices: expected at most 32 choices of each token"),
    "kinds": (4, "disagree: needs a gradient: True on rank 0, False on ranks 1, 2, 3"),
    "foreign": (4, "ValueError: combine: expected what a DeepEPDispatcher dispatched, got what another one did"),
    "results": (4, "ValueError: combine: expected y of shape (8, 16) and torch.bfloat16"),
    "differ": (4, "disagree: transport: 'all_to_all' on rank 0, 'deep_ep' on ranks 1, 2, 3"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_go_by_deep_ep_is_said_in_a_sentence(ranks, kind):
    world, said = REFUSED[kind]
    told = ranks.run(jobs.refused, kind, ranks=world)
    if kind == "results":
        told = told[:1]  # the rank that all rows came to
    for each in told:
        assert said in each


@pytest.mark.parametrize(
    ("field", "value"), [("max_rows_received", 8), ("wire_dtype", "int8"), ("join_choices", True), ("hidden_size", 24)]
)
def test_a_config_refuses_what_cannot_go_by_deep_ep(field, value):
    expected = "a multiple of 16" if field == "hidden_size" else "None"
    with pytest.raises(ValueError, match=f"MoEConfig: {field}: expected {expected} with transport='deep_ep', got"):
        MoEConfig(**{**BASE, field: value}, transport="deep_ep")
    MoEConfig(**{**BASE, field: value})


def test_without_ranks_the_transport_is_not_looked_for():
    config = MoEConfig(**BASE, transport="deep_ep")
    from dmoe import MoE

    assert MoE(config, dtype=torch.bfloat16)(torch.zeros(2, H, dtype=torch.bfloat16)).shape == (2, H)


NO_SYMMETRIC_MEMORY = {
    "absent": "RuntimeError: MoE: transport: expected 'all_to_all' without NVSHMEM, which 'symmetric_memory' needs",
    "levels": "ValueError: MoE: ep_levels: expected None with transport='symmetric_memory', got TwoLevel",
}


@pytest.mark.parametrize("kind", NO_SYMMETRIC_MEMORY)
def test_where_symmetric_memory_cannot_be_used_it_is_said(ranks, kind):
    for told in ranks.run(jobs.no_symmetric_memory, kind):
        assert NO_SYMMETRIC_MEMORY[kind] in told


def test_symmetric_buffers_have_room_for_the_rank_with_most_rows_and_a_quarter(ranks):
    """Choices are 8 bytes a row, tokens 12; three buffers, the same on ranks that send nothing."""
    made = [[100, 100, 100, 150, 150, 150], [], [], [225, 225, 225]]
    assert ranks.run(jobs.symmetric_sizes, [10, 4, 12, 15]) == [made] * 4


def test_the_operation_has_the_schema_that_is_called():
    told = str(torch.ops.symm_mem.all_to_all_vdev_2d.default._schema)
    assert told == (
        "symm_mem::all_to_all_vdev_2d(Tensor input, Tensor(a!) out, Tensor in_splits, Tensor(a!) out_splits_offsets, "
        "str group_name, int? major_align=None) -> ()"
    )
