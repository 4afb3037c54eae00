"""``exact_step``: static steps that are done again where rows had no room, bit by bit as in the dynamic mode."""

from __future__ import annotations

import warnings

import pytest
import rank_jobs_exact as jobs
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parallel_layer_cases import BASE
from rank_pool import RankError

from dmoe import MoE, MoEConfig
from dmoe.parallel.step_state import StepState

H, WORLD = 8, 4
# Rows between two ranks in the tight layer: three tokens always fit, and 4 x 4 + 1 go somewhere where they do not.
TIGHT, MANY, FEW = 4, 17, 3
FIELDS = {
    **BASE,
    "hidden_size": H,
    "ffn_hidden_size": 8,
    "num_experts": 8,
    "load_balancing_coefficient": 0.1,
    "router_z_loss_coefficient": 0.01,
    "selection_bias": True,
    "selection_bias_update_rate": 0.05,
    "input_jitter": 0.1,
    "activation_dropout": 0.1,
    "max_rows_received": 4000,
    "on_overflow": "rerun",
}


def two_layers(bound=TIGHT, ranks=WORLD, **options):
    """One layer with room for all, and one without."""
    return [{**FIELDS, **options}, {**FIELDS, **options, "max_rows_received": bound * ranks}]


def batches_with(overflows, micro=1):
    """Steps, by rank; where ``overflows`` says so, rank 2 has too many tokens in its last micro-batch."""
    torch.manual_seed(1)
    return [
        [
            [torch.randn(MANY if over and rank == 2 and n == micro - 1 else FEW, H) for n in range(micro)]
            for rank in range(WORLD)
        ]
        for over in overflows
    ]


def assert_same_bits(exact, dynamic):
    for (losses, state, drawn, *_), (losses_there, state_there, drawn_there, *_) in zip(exact, dynamic, strict=True):
        assert torch.equal(losses, losses_there)
        assert torch.equal(drawn[0], drawn_there[0])
        assert drawn[1] == drawn_there[1]
        for name, value in state.items():
            assert torch.equal(value, state_there[name]), name


CASES = {
    "plain": (1, (), {}, (False, True, False)),
    "the first step too": (1, (), {}, (True, True, False)),
    "micro-batches": (1, (), {}, (False, True, False)),
    "gradients that are there": (1, ("zeros",), {}, (False, True, True)),
    "replicas": (2, ("checkpoint",), {"bias": "expert"}, (False, True, False)),
    "chunks": (1, (), {"overlap_degree": 2, "shared_ffn_hidden_size": 4}, (False, True, False)),
    "a narrow wire": (1, (), {"wire_dtype": "int8", "wire_backward": True}, (False, True, False)),
    "two hops": ("nodes", (), {"expert_dropout": 0.1}, (False, True, False)),
    "slices of F": (("tp", 2), (), {"activation_dropout": 0.0}, (False, True, False)),
    "shared experts": (1, (), {"num_experts": 2, "top_k": 1}, (False, True, False)),
    "FSDP": ("fsdp", (), {}, (False, True, False)),
    "float16": (1, ("float16",), {}, (False, True, False)),
    "an autocast around": (1, ("bfloat16", "outside", "checkpoint"), {}, (False, True, False)),
    "a global loss": (1, (), {"load_balancing_over": "global", "aux_loss": "attached"}, (False, True, False)),
}


@pytest.mark.parametrize("case", CASES)
def test_overflow_in_one_layer_of_one_rank(ranks, case):
    arrangement, how, options, overflows = CASES[case]
    ep_ranks = 2 if arrangement in (2, "fsdp", ("tp", 2)) else WORLD
    bound = 8 if ep_ranks == 2 else TIGHT
    layers = two_layers(bound, ep_ranks, **options)
    batches = batches_with(overflows, 3 if case == "micro-batches" else 1)
    exact, dynamic = (ranks.run(jobs.train, layers, arrangement, how, batches, exact) for exact in (True, False))
    assert_same_bits(exact, dynamic)
    ddp = arrangement != "fsdp"  # whose first step is not static
    for _, _, _, reruns, rows, dropped in exact:
        assert reruns == [over and not (ddp and n == 0) for n, over in enumerate(overflows)]
        assert [count > 0 for count in rows] == reruns
        assert rows == exact[0][4]
        assert [None if count is None else int(count) for count in dropped] == [None if reruns[-1] else 0] * 2


def test_copies_of_experts_are_exact_but_for_the_order_of_sums(ranks):
    """The static mode lends other experts than the dynamic one; what the copies' gradients are summed from differs."""
    level = {"balance_ranks": "replicate", "balance_slack": 0.0, "min_rows_per_copy": 1}
    layers = two_layers(activation_dropout=0.0, input_jitter=0.0, **level)
    batches = batches_with((False, True, False))
    exact, dynamic = (ranks.run(jobs.train, layers, 1, (), batches, exact) for exact in (True, False))
    for (losses, state, _, reruns, *_), (losses_there, state_there, *_) in zip(exact, dynamic, strict=True):
        torch.testing.assert_close(losses, losses_there)
        assert reruns == [False, True, False]
        for name, value in state.items():
            torch.testing.assert_close(value, state_there[name], rtol=1e-4, atol=1e-5)


@st.composite
def routings(draw):
    """Bounds of two layers, and by rank and micro-batch the choices of each layer, as many tokens as there are."""
    bounds = draw(st.tuples(st.integers(0, 5), st.integers(0, 5)))
    experts, top_k = draw(st.sampled_from([(4, 1), (4, 2), (8, 3), (2, 2)]))
    micro = draw(st.integers(1, 2))
    row = st.lists(st.integers(0, experts - 1), min_size=top_k, max_size=top_k, unique=True)
    tokens = st.integers(0, 5).flatmap(lambda n: st.tuples(*[st.lists(row, min_size=n, max_size=n)] * 2))
    choices = draw(st.lists(st.lists(tokens, min_size=micro, max_size=micro), min_size=WORLD, max_size=WORLD))
    return bounds, experts, top_k, choices


def rows_without_room(bounds, experts, choices):
    """Counted token by token: rows between two ranks beyond what a layer lets pass."""
    each, shards = max(1, experts // WORLD), max(1, WORLD // experts)
    lost = 0
    for by_micro in choices:
        for by_layer in by_micro:
            for bound, given_choices in zip(bounds, by_layer, strict=True):
                owners = [{e // each * shards + s for e in row for s in range(shards)} for row in given_choices]
                for rank in range(WORLD):
                    lost += max(0, sum(rank in owner for owner in owners) - bound)
    return lost


@settings(max_examples=25)
@given(case=routings(), options=st.sampled_from([{}, {"overlap_degree": 2}, {"selection_bias": False}]))
def test_any_routing_has_the_bits_of_the_dynamic_mode(ranks, case, options):
    bounds, experts, top_k, choices = case
    chunks = options.get("overlap_degree", 1)
    if experts < 8:
        options, chunks = {}, 1
    layers = [
        {**FIELDS, "num_experts": experts, "top_k": top_k, **options, "max_rows_received": bound * WORLD}
        for bound in bounds
    ]
    given_choices = [
        [[torch.tensor(c, dtype=torch.int64).reshape(-1, top_k) for c in micro] for micro in of_rank]
        for of_rank in choices
    ]
    torch.manual_seed(5)
    tokens = [[torch.randn(len(micro[0]), H, dtype=torch.float64) for micro in of_rank] for of_rank in choices]
    lost = rows_without_room(bounds, experts, choices)
    for (told, grads, drawn, done), (expected, grads_there, drawn_there, _) in ranks.run(
        jobs.replayed, layers, tokens, given_choices
    ):
        assert torch.equal(told, expected)
        assert torch.equal(drawn, drawn_there)
        for name, grad in grads.items():
            assert torch.equal(grad, grads_there[name]), name
        if chunks == 1:  # where a token travels once for each chunk
            assert done.rows_dropped == lost
            assert done.reran == (lost > 0)


def test_a_step_that_fits_waits_for_one_number_behind_it(ranks):
    for _, told in ranks.run(jobs.waits, two_layers(bound=4000)):
        (calls, waited, _), (calls_of_drop, waited_of_drop, _) = told["exact"], told["drop"]
        calls_inside, waited_inside = told["exact"][2]
        assert calls_inside == calls_of_drop == calls[:-1]
        assert waited_inside == waited_of_drop == waited[:-1]
        assert (calls[-1], waited[-1]) == (("all_reduce", True), "all_reduce")
        assert not [name for name, later in calls if not later]
        assert len(told["dynamic"][1]) == len(waited_of_drop) + 2  # the counts of two layers


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("optimizer", "RuntimeError: exact_step: step: expected forward and backward alone, which could be done again"),
        ("nested", "RuntimeError: exact_step: expected no call inside another"),
        ("static again", "RuntimeError: exact_step: step: expected a second run in the dynamic mode, got one that was"),
        ("drop", "ValueError: exact_step: model: expected layers with on_overflow='rerun', got one with max_rows"),
    ],
)
def test_what_could_not_be_done_again_is_refused_on_every_rank(ranks, what, message):
    layers = two_layers(**({"on_overflow": "drop"} if what == "drop" else {}))
    with pytest.raises(RankError) as caught:
        ranks.run(jobs.refused, layers, what)
    assert set(caught.value.by_rank) == set(range(WORLD))
    for kind, text in caught.value.by_rank.values():
        assert f"{kind}: {text}".startswith(message)


def test_outside_of_a_step_nothing_is_dropped_and_inside_it_is_found(ranks):
    for (outside, inside, dynamic), reran, rows, still in ranks.run(jobs.evaluated, two_layers()):
        assert torch.equal(outside, dynamic)
        assert torch.equal(inside, dynamic)
        assert reran
        assert rows > 0
        assert not still


def test_options_of_the_config():
    with pytest.raises(ValueError, match="on_overflow: expected 'drop' without max_rows_received, got 'rerun'"):
        MoEConfig(**BASE, on_overflow="rerun")
    with pytest.raises(ValueError, match="on_overflow: expected one of 'drop', 'rerun', got 'raise'"):
        MoEConfig(**BASE, max_rows_received=3, on_overflow="raise")


@pytest.mark.parametrize("zeros", [False, True])
def test_what_else_a_step_changes_is_put_back(zeros):
    """Generators of one's own, ``main_grad``, a buffer that begins as None, and a loss that nobody has read."""
    torch.manual_seed(0)
    layer = MoE(**BASE | {"load_balancing_coefficient": 0.1}, selection_bias=True)
    layer.register_buffer("seen", None)
    generator = torch.Generator().manual_seed(1)
    main_grads = {}
    for name, parameter in layer.named_parameters():
        parameter.main_grad = torch.zeros_like(parameter) if zeros else torch.randn_like(parameter)
        main_grads[name] = parameter.main_grad.clone()

    def step():
        x = torch.randn(5, BASE["hidden_size"], generator=generator)
        layer(x).sum().backward()
        layer.seen = torch.ones(1)
        for parameter in layer.parameters():
            parameter.main_grad += 1 if parameter.grad is None else parameter.grad + 1
        return x, layer.router.load_since_update.clone(), layer.last_metrics

    before = StepState(layer, [generator], gradients_are_zero=zeros)
    first = step()
    assert not before.parameters_changed
    before.restore()
    assert layer.seen is layer.last_metrics is layer.auxiliary._kept is None
    assert not layer.router.load_since_update.any()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is None
        assert torch.equal(parameter.main_grad, main_grads[name])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a loss that was lost would be told of
        again = step()
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    with torch.no_grad():
        layer.router.weight.add_(1)
    assert before.parameters_changed


def test_gradients_that_fsdp_holds_back_and_whole_parameters(ranks):
    for told, same in ranks.run(jobs.under_fsdp, two_layers(8, 2)):
        assert "expected all micro-batches of an optimizer step inside one step" in told
        assert same
