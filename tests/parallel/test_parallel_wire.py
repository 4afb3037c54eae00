"""One byte per number on the wire: what a row loses is what a table of the bytes' values says, on any placement."""

from __future__ import annotations

import pytest
import rank_jobs_wire
import torch
from dispatch_cases import H, assert_equal_to, case_of, exactly, exchanges, in_one_process, pieces, routings
from hypothesis import given, settings
from hypothesis import strategies as st
from rank_pool import RankError

from dmoe.parallel import AllToAllDispatcher
from dmoe.parallel.wire import pack_rows, unpack_rows

KINDS = ["fp8", "int8"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
TINY = 2.0**-126

# The numbers of a byte, from their definition, smallest first: a sign, then 4 bits of exponent with bias 7 and 3 of
# fraction, whose last code is NaN; and 8 bits with -128 left out. An even place in a list is an even last bit.
_POSITIVE = [m / 8 * 2**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7) for e in range(16) for m in range(8)][:-1]
VALUES = {
    "fp8": torch.tensor([-v for v in _POSITIVE[:0:-1]] + _POSITIVE, dtype=torch.float64),
    "int8": torch.arange(-127, 128, dtype=torch.float64),
}


def rounded(x, kind):
    """The rows of x as they should arrive."""
    values, wide = VALUES[kind], torch.float64 if x.dtype == torch.float64 else torch.float32
    result = torch.empty_like(x)
    for out, numbers in zip(result, x.to(wide), strict=True):
        if not numbers.isfinite().all():
            out.fill_(float("nan"))
            continue
        scale = max((numbers.abs().max() / values[-1].item()).float(), torch.tensor(TINY))
        distance = ((numbers / scale).double().unsqueeze(1) - values).abs()
        nearest = distance == distance.min(1, keepdim=True).values
        even = (torch.arange(len(values)) - len(values) // 2) % 2 == 0
        place = torch.where(nearest.sum(1) > 1, (nearest & even).int().argmax(1), nearest.int().argmax(1))
        out.copy_(values[place].to(wide) * scale)
    return result


@st.composite
def matrices(draw):
    dtype = draw(st.sampled_from(DTYPES))
    width = draw(st.integers(1, 9))
    small = st.integers(-130, 130).map(float)  # ties and multiples of the scale, when 127 or 448 is in the row
    exact = st.sampled_from([0.0, 127.0, 448.0, -448.0, 0.5, 1.5, 17.0, 19.0, 2.0**-10, 3 * 2.0**-10])
    top = 6e4 if dtype == torch.float16 else 1e38
    number = draw(st.sampled_from([small, exact, small | exact, st.floats(-top, top), st.floats(-1e-36, 1e-36)]))
    rows = draw(st.lists(st.lists(number, min_size=width, max_size=width), max_size=4))
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, width).to(dtype)


@settings(max_examples=300)
@given(x=matrices(), kind=st.sampled_from(KINDS))
def test_every_number_is_the_nearest_that_its_byte_can_hold(x, kind):
    packed = pack_rows(x, kind)
    assert packed.dtype == torch.uint8
    assert packed.shape == (len(x), x.shape[1] + 4)
    assert packed.is_contiguous()
    arrived = unpack_rows(packed, kind, x.dtype)
    assert arrived.dtype == x.dtype
    assert torch.equal(arrived, rounded(x, kind))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_row_with_nan_or_an_infinity_arrives_as_nan_and_the_others_as_they_are(dtype, kind, bad):
    x = torch.randn(5, 3).to(dtype)
    x[1, 2], x[4, 0] = bad, bad
    arrived = unpack_rows(pack_rows(x, kind), kind, dtype)
    assert arrived[[1, 4]].isnan().all()
    assert torch.equal(arrived[[0, 2, 3]], rounded(x[[0, 2, 3]], kind))


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_odd_strides_and_numbers_that_float32_cannot_hold(kind):
    assert torch.equal(unpack_rows(pack_rows(torch.zeros(2, 3), kind), kind, torch.float32), torch.zeros(2, 3))
    assert torch.equal(
        unpack_rows(torch.zeros(2, 7, dtype=torch.uint8), kind, torch.bfloat16), torch.zeros(2, 3).bfloat16()
    )
    assert unpack_rows(pack_rows(torch.zeros(0, 3), kind), kind, torch.float32).shape == (0, 3)
    x = torch.randn(6, 8)
    for view in (x.t(), x[::2, 1::3]):
        packed = pack_rows(view, kind)
        assert torch.equal(packed, pack_rows(view.clone(memory_format=torch.contiguous_format), kind))
        wider = torch.cat([packed, packed], 1)[:, : packed.shape[1]]
        assert torch.equal(unpack_rows(wider, kind, torch.float32), rounded(view, kind))
    huge = torch.tensor([[1e300, 1.0], [1.0, 1.0]], dtype=torch.float64)
    arrived = unpack_rows(pack_rows(huge, kind), kind, torch.float64)
    assert arrived[0].isnan().all()
    torch.testing.assert_close(arrived[1], huge[1], rtol=1e-6, atol=0)


def test_what_is_no_row_or_no_wire_is_refused():
    with pytest.raises(ValueError, match="wire_dtype: expected None or one of 'fp8', 'int8', got 'fp4'"):
        pack_rows(torch.zeros(2, 3), "fp4")
    for x in (torch.zeros(3), torch.zeros(2, 0), torch.zeros(2, 3, dtype=torch.int32)):
        with pytest.raises(ValueError, match=r"pack_rows: x: expected floating point of shape \(R, H\) with H >= 1"):
            pack_rows(x, "int8")
    for packed in (torch.zeros(2, 4, dtype=torch.uint8), torch.zeros(2, 5), torch.zeros(5, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"unpack_rows: packed: expected uint8 of shape \(R, H \+ 4\)"):
            unpack_rows(packed, "int8", torch.float32)


@settings(max_examples=25)
@given(case=exchanges(), seed=st.integers(0, 99), kind=st.sampled_from(KINDS), back=st.booleans())
def test_rows_arrive_rounded_and_gradients_pass_straight_through(ranks, case, seed, kind, back):
    world, counts, extra, width = case
    torch.manual_seed(seed)
    rows = [torch.randn(sum(c) + e, width, dtype=torch.float64) for c, e in zip(counts, extra, strict=True)]
    arriving = [sum(sent[target] for sent in counts) for target in range(world)]
    factors = [torch.randn(n, width, dtype=torch.float64) for n in arriving]
    results = ranks.run(rank_jobs_wire.narrow, rows, counts, factors, kind, back, ranks=world)
    there = [rounded(share, kind) for share in rows]
    for rank, (arrived, once, again, twice) in enumerate(results):
        expected = torch.cat([pieces(there, counts, source, rank) for source in range(world)])
        assert torch.equal(arrived, expected)
        factor = torch.zeros_like(rows[rank])
        for target in range(world):
            first, begin = sum(counts[rank][:target]), sum(counts[s][target] for s in range(rank))
            n = counts[rank][target]
            factor[first : first + n] = factors[target][begin : begin + n]
        gradient = factor * (3 * there[rank] ** 2)
        gradient, second = rounded(gradient, kind) if back else gradient, 6 * factor * there[rank]
        torch.testing.assert_close(once, gradient, rtol=1e-13, atol=0)
        assert torch.equal(again, once)
        if not back:
            torch.testing.assert_close(twice, second)


def narrow_case(case, kind):
    """The case whose tokens are those that arrive."""
    shares, *rest = case
    return [(rounded(x, kind), *others) for x, *others in shares], *rest


def narrow_gradients(shares, weights, options, world, kind):
    """Gradients of the tokens, each rank's part rounded before the parts are added."""
    experts = weights[1].shape[0]
    total = [torch.zeros_like(x) for x, *_ in shares]
    for rank in range(world):
        here = [[rank == e // (experts // world) and e < experts for e in token] for s in shares for token in s[1]]
        parts = in_one_process(shares, weights, options, kept=here)["x"]
        total = [t + rounded(part, kind) for t, part in zip(total, parts, strict=True)]
    return total


@settings(max_examples=25)
@given(routing=routings(), kind=st.sampled_from(KINDS), back=st.booleans(), joined=st.booleans())
def test_results_equal_one_process_on_rounded_tokens(ranks, routing, kind, back, joined):
    world, _, ids, _ = routing
    case = case_of(routing)
    chosen = {"wire_dtype": kind, "wire_backward": back, "join_choices": joined}
    results = ranks.run(rank_jobs_wire.experts, *case, chosen, ranks=world)
    shares, weights, options = narrow_case(case, kind)
    expected = in_one_process(shares, weights, options)
    if back:
        expected["x"] = narrow_gradients(shares, weights, options, world, kind)
    assert_equal_to(expected, results, exactly)
    top_k = ids[0].shape[1]
    for result in results:
        traffic = result["traffic"]
        there, back_again = traffic.rows_sent * (H + 4 + 2 * top_k * 8), traffic.rows_received * H * 8
        assert result["bytes_sent"] == there + back_again + (world - 1) * 6 * 8 == result["wire_bytes"]
        assert traffic.naive_bytes_sent == (traffic.naive_rows_sent + traffic.naive_rows_received) * H * 8
        of_gates = (1 if joined else 2) * top_k * 8  # ids have no gradient, and apart they take theirs along
        home = traffic.rows_received * ((H + 4 if back else H * 8) + of_gates)
        assert result["wire_bytes_back"] == home + traffic.rows_sent * H * 8


@settings(max_examples=20)
@given(routing=routings(), static=st.booleans(), needs=st.sampled_from(["x", "gates", "both"]))
def test_choices_that_travel_with_their_tokens(ranks, routing, static, needs):
    """The same bits as apart, in one exchange less each way; in backward only what has a gradient travels."""
    world, _, ids, _ = routing
    case, results = case_of(routing), []
    bound = {"max_rows_received": world * max(len(i) for i in ids)} if static else {}
    for joined in (False, True):
        options = {**bound, "join_choices": joined}
        results.append(ranks.run(rank_jobs_wire.experts, *case, options, None, needs, ranks=world))
    for apart, joined in zip(*results, strict=True):
        for name in ("y", "x", "gates", "arrived"):
            assert (apart[name] is None) == (joined[name] is None)
            assert apart[name] is None or torch.equal(apart[name], joined[name]), name
        for mine, theirs in zip(joined["weights"], apart["weights"], strict=True):
            assert mine is None or torch.equal(mine, theirs)
        assert joined["bytes_sent"] == apart["bytes_sent"] == joined["wire_bytes"]
        assert joined["calls"] == apart["calls"] - 1 == (2 if static else 3)
        assert joined["traffic"].messages == (2 if static else 3) * (world - 1)
        assert apart["traffic"].messages == (3 if static else 4) * (world - 1)
        assert joined["calls_back"] == apart["calls_back"] - (needs == "both")


@pytest.mark.parametrize(("choices", "world", "expected"), [(None, 2, False), (True, 2, True), (False, 2, False)])
def test_choices_join_where_they_are_told_to_or_ranks_are_many(ranks, choices, world, expected):
    assert ranks.run(rank_jobs_wire.joins, choices, ranks=world) == [(expected, choices is not False)] * world


@settings(max_examples=8)
@given(routing=routings(), kind=st.sampled_from(KINDS), joined=st.booleans())
def test_static_mode_with_a_narrow_wire(ranks, routing, kind, joined):
    world, _, ids, _ = routing
    case = case_of(routing)
    chosen = {"wire_dtype": kind, "max_rows_received": world * max(len(i) for i in ids), "join_choices": joined}
    results = ranks.run(rank_jobs_wire.experts, *case, chosen, ranks=world)
    assert_equal_to(in_one_process(*narrow_case(case, kind)), results, exactly)
    assert all(result["bytes_sent"] == result["wire_bytes"] for result in results)


# Errors of the outputs and of the tokens' gradients (narrow, too), relative to the root mean square of what the wide
# wire gives, as measured with these seeds. The bound is a tenth of it either way.
MEASURED = {
    ("fp8", torch.float32): (0.0377, 0.0390),
    ("fp8", torch.bfloat16): (0.0385, 0.0393),
    ("int8", torch.float32): (0.0106, 0.0110),
    ("int8", torch.bfloat16): (0.0123, 0.0124),
}


@pytest.mark.parametrize(("kind", "dtype"), MEASURED)
def test_error_of_the_output_with_normal_data(ranks, kind, dtype):
    tokens, hidden, ffn, experts, top_k = 64, 512, 64, 4, 2
    torch.manual_seed(0)
    weights = [torch.randn(experts, 2, ffn, hidden) / hidden**0.5, torch.randn(experts, hidden, ffn) / ffn**0.5]
    weights = [*(w.to(dtype) for w in weights), None, None]
    shares = [
        (
            torch.randn(tokens, hidden).to(dtype),
            torch.rand(tokens, experts).topk(top_k).indices,
            torch.full((tokens, top_k), 0.5),
            torch.randn(tokens, hidden).to(dtype),
        )
        for _ in range(2)
    ]

    def outputs(**wire):
        results = ranks.run(rank_jobs_wire.experts, shares, weights, {"gated": True, "run": {}}, wire, ranks=2)
        return [torch.cat([result[name] for result in results]).double() for name in ("y", "x")]

    def error(narrow, exact):
        return ((narrow - exact).square().mean() / exact.square().mean()).sqrt().item()

    errors = [error(*pair) for pair in zip(outputs(wire_dtype=kind, wire_backward=True), outputs(), strict=True)]
    assert errors == pytest.approx(list(MEASURED[kind, dtype]), rel=0.1)


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        (("int8", False), "('fp8', False) on ranks 0, 1, 3, ('int8', False) on rank 2"),
        (("fp8", True), "('fp8', False) on ranks 0, 1, 3, ('fp8', True) on rank 2"),
        ((None, False), "('fp8', False) on ranks 0, 1, 3, None on rank 2"),
    ],
)
def test_ranks_with_another_wire_are_told_on_every_rank(ranks, odd, message):
    with pytest.raises(RankError) as caught:
        ranks.run(rank_jobs_wire.differing_wires, [("fp8", False)] * 2 + [odd, ("fp8", False)])
    assert set(caught.value.by_rank) == {0, 1, 2, 3}
    for kind, text in caught.value.by_rank.values():
        assert kind == "ValueError"
        assert f"wire_dtype, wire_backward: {message}" in text


def test_options_of_the_wire_are_checked_first():
    for options, message in (
        ({"wire_dtype": "fp4"}, "wire_dtype: expected None or one of 'fp8', 'int8', got 'fp4'"),
        ({"wire_backward": True}, "wire_backward: expected False without a wire_dtype, got True"),
    ):
        with pytest.raises(ValueError, match=message):
            AllToAllDispatcher(None, 4, **options)
