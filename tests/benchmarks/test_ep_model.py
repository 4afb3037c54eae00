"""The model of expert parallelism: its bytes are those of real ranks, its counts those of a loop over tokens."""

from __future__ import annotations

import itertools
import json
import math
import sys
from pathlib import Path

import pytest
import rank_jobs_ep_model as jobs
import rank_jobs_levelling as jobs_levelling
import torch
from patience import GRACE, PATIENCE

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import dispatch
import ep_model
import parts.ep_bytes as rows_and_bytes
import parts.ep_copies as ep_copies
import parts.ep_links as links
from parts.ep_movement import Case
from parts.ep_ranks import RankFailedError, Ranks
from parts.harness import CheckError

from dmoe.parallel.levelling import Levelling

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}
H, K = 6, 3


def routing(kind, world, experts):
    """Choices of every rank; each kind has ranks with different numbers of tokens."""
    tokens = [7 + 3 * rank for rank in range(world)]
    generator = torch.Generator().manual_seed(len(kind) + world)

    def draw(rank, zipf=0.0):
        return rows_and_bytes.draw_choices(tokens[rank], experts, K, zipf=zipf, seed=rank)

    if kind == "one rank":  # everybody's tokens go to the last rank's experts, some twice to the same
        each = experts // world
        return [torch.randint(experts - each, experts, (t, K), generator=generator) for t in tokens]
    if kind == "idle":
        return [draw(rank) if rank % 2 else torch.empty(0, K, dtype=torch.int64) for rank in range(world)]
    if kind == "nobody":
        return [torch.empty(0, K, dtype=torch.int32)] * world
    if kind == "masked":
        drawn = [draw(rank) for rank in range(world)]
        return [ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.4, experts) for ids in drawn]
    return [draw(rank, zipf=1.5 if kind == "zipf" else 0.0) for rank in range(world)]


KINDS = ["uniform", "zipf", "one rank", "idle", "nobody", "masked"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", [2, 4])
def test_predicted_bytes_are_those_on_the_wire(ranks, world, kind, dtype):
    experts = 3 * world
    choices = routing(kind, world, experts)
    rows = rows_and_bytes.counted_rows(choices, experts)
    naive_rows = rows_and_bytes.counted_rows(choices, experts, naive=True)
    wire = rows_and_bytes.Wire.deduplicated(H, K, dtype)
    naive = rows_and_bytes.Wire.naive(H, experts // world, dtype)
    found = ranks.run(jobs.moved, choices, experts, H, DTYPES[dtype], {}, ranks=world)
    expected = {
        "forward": wire.forward(rows),
        "backward": wire.backward(rows),
        "metrics": wire.forward(rows),
        "naive_metrics": naive.forward(naive_rows) - (world - 1) * naive.counts,
        "naive_forward": naive.forward(naive_rows),
        "naive_backward": naive.backward(naive_rows),
    }
    for name, by_rank in expected.items():
        assert [of_rank[name] for of_rank in found] == by_rank.tolist(), name
    if dtype == "bf16":  # and what the program reports from a recorded routing
        setting = ep_model.Setting(world, 0, H, 4, experts, K, 1, "recorded")
        result = ep_model.evaluate(setting, ep_model.Routing("recorded", tuple(choices)), links.load_machine())
        assert result["rows"] == "counted"
        assert result["bytes_sent"]["dedup bf16"]["busiest"] == max(of_rank["forward"] for of_rank in found)
        assert result["bytes_sent"]["naive bf16"]["busiest"] == max(of_rank["naive_forward"] for of_rank in found)


@pytest.mark.parametrize("wire_dtype", ["fp8", "int8"])
@pytest.mark.parametrize("world", [2, 4])
def test_predicted_bytes_of_a_narrow_wire(ranks, world, wire_dtype):
    experts = 3 * world
    choices = routing("idle", world, experts)
    rows = rows_and_bytes.counted_rows(choices, experts)
    wire = rows_and_bytes.Wire.deduplicated(H, K, "bf16", narrow=True)
    found = ranks.run(jobs.moved, choices, experts, H, torch.bfloat16, {"wire_dtype": wire_dtype}, ranks=world)
    for name, by_rank in (("forward", wire.forward(rows)), ("backward", wire.backward(rows))):
        assert [of_rank[name] for of_rank in found] == by_rank.tolist(), name
    assert [of_rank["metrics"] for of_rank in found] == wire.forward(rows).tolist()


def test_predicted_bytes_with_more_ranks_than_experts(ranks):
    choices = [ids[:, :2] % 2 for ids in routing("idle", 4, 4)]
    rows = rows_and_bytes.counted_rows(choices, 2)
    naive_rows = rows_and_bytes.counted_rows(choices, 2, naive=True)
    wire = rows_and_bytes.Wire.deduplicated(H, 2, "fp32")
    found = ranks.run(jobs.moved, choices, 2, H, torch.float32, {}, ranks=4)
    assert [of_rank["forward"] for of_rank in found] == wire.forward(rows).tolist()
    assert [of_rank["backward"] for of_rank in found] == wire.backward(rows).tolist()
    naive = rows_and_bytes.Wire(4 * H, 0, 4 * H, 0)
    assert [of_rank["naive_metrics"] for of_rank in found] == naive.forward(naive_rows).tolist()


@pytest.mark.parametrize("kind", ["zipf", "one rank", "idle", "masked"])
@pytest.mark.parametrize("world", [2, 4])
def test_predicted_bytes_with_copies_of_experts(ranks, world, kind):
    """Rows, loads, the copies' weights and their gradients, forward and backward, of a layer in float64."""
    experts, ffn = 3 * world, 4
    choices = routing(kind, world, experts)
    plan = ep_copies.levelled(choices, experts, world, 0, Levelling(0.0, 2, 1))
    fields = {"hidden_size": H, "ffn_hidden_size": ffn, "num_experts": experts, "top_k": K}
    fields |= {"balance_ranks": "replicate", "balance_slack": 0.0, "min_rows_per_copy": 1}
    shares = [(torch.randn(len(ids), H).double(), torch.randn(len(ids), H).double(), ids) for ids in choices]
    found = ranks.run(
        jobs_levelling.layer, {**fields, "load_balancing_coefficient": 0.0}, 1, torch.float64, shares, ranks=world
    )
    wire = rows_and_bytes.Wire.deduplicated(H, K, "fp64")
    loads, weight = (world - 1) * experts * ep_copies.LOAD_BYTES, 3 * H * ffn * 8
    forward, backward = wire.forward(plan.rows) + loads + plan.lent * weight, wire.backward(plan.rows)
    for rank, of_rank in enumerate(found):
        assert of_rank["sent"] == (forward[rank], forward[rank])
        assert of_rank["sent_back"] == backward[rank] + plan.hosts[rank] * weight
        assert of_rank["hosted"] == plan.hosts[rank]
        assert torch.equal(of_rank["rank_rows"][1], plan.own + plan.hosted)
    if kind == "one rank":
        assert plan.lent.sum() > 0


def test_a_step_with_copies_by_hand():
    """Two GPUs, one of which has all rows; half of them move."""
    link = links.Link("a", 100.0, 0.5, "")
    machine = links.Machine("m", 2, link, link, 1000.0, "")
    setting = ep_model.Setting(2, 8, 4, 2, 2, 1, 0, "recorded")
    choices = [torch.zeros(8, 1, dtype=torch.int64)] * 2
    wire = rows_and_bytes.Wire.deduplicated(4, 1, "bf16")
    plain = rows_and_bytes.counted_rows(choices, 2).double()
    found = ep_copies.compare(setting, choices, machine, wire, plain, Levelling(0.0, 1, 1))
    assert (found["rows_over_mean"], found["copies"], found["weight_bytes"]) == ([2.0, 1.0], 1, 3 * 4 * 2 * 2)
    product, rows = 6 * 4 * 2 / 1000, 8 * (4 * 2) / 100
    # Rows to rank 0 and back, twice each; all 16 rows' products there, three times.
    assert found["step_seconds"][0] == pytest.approx(4 * (0.5 + rows) + 3 * 16 * product)
    # Each rank's tokens stay: no rows, but messages; a copy's way is longer than the 8 rows' products of its owner.
    weights, loads = 0.5 + 48 / 100, 0.5 + 2 * ep_copies.LOAD_BYTES / 100
    forward, backward = max(8 * product, weights), max(16 * product, weights)
    assert weights > 8 * product
    host = weights + 8 * product, weights + 16 * product  # which has no rows of its own, and waits
    assert found["step_seconds"][1] == pytest.approx(loads + 4 * 0.5 + max(forward, host[0]) + max(backward, host[1]))


@pytest.mark.parametrize("kind", ["uniform", "one rank", "idle"])
def test_predicted_bytes_of_two_levels(ranks, kind):
    choices = routing(kind, 4, 8)
    phases = links.two_level(rows_and_bytes.counted_rows(choices, 8), 2)
    wire = rows_and_bytes.Wire.deduplicated(H, K, "fp32")
    found = ranks.run(jobs.moved_in_two_levels, choices, 8, H, 2)
    for rank, (sent, traffic) in enumerate(found):
        for name, phase, hop in zip(("inside", "between"), phases, traffic.hops, strict=True):
            there, back = (int(getattr(phase, f"{name}_{way}")[rank]) for way in ("sent", "received"))
            assert (hop.rows_there, hop.rows_back) == (there, back)
            assert sent[name] == there * (wire.row + wire.choices) + back * wire.result
            assert hop.others == phase.inside_messages + phase.between_messages
        assert traffic.bytes_sent - traffic.count_bytes == sent["inside"] + sent["between"]


# ------------------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize(
    ("ranks_", "experts", "top_k"),
    [(1, 4, 2), (2, 4, 1), (2, 4, 3), (4, 8, 3), (3, 6, 4), (4, 4, 2), (5, 5, 5), (4, 2, 1), (6, 3, 2), (4, 1, 1)],
)
def test_closed_form_is_the_mean_over_all_choices(ranks_, experts, top_k):
    def owners(expert):
        per = experts / ranks_
        return {rank for rank in range(ranks_) if rank * per < expert + 1 and (rank + 1) * per > expert}

    drawn = list(itertools.combinations(range(experts), top_k))
    mean = sum(len(set().union(*map(owners, choice))) for choice in drawn) / len(drawn)
    assert rows_and_bytes.copies_closed_form(ranks_, experts, top_k) == pytest.approx(mean, rel=1e-12)


def test_closed_form_of_the_design():
    # K = 8 of 64 experts on 8 ranks: 68% of the copies that a row for each choice costs.
    assert round(100 * rows_and_bytes.copies_closed_form(8, 64, 8) / 8) == 68


@pytest.mark.parametrize(("ranks_", "experts", "top_k"), [(2, 64, 8), (4, 64, 2), (8, 64, 8), (8, 4, 2)])
def test_sampled_copies_match_the_closed_form(ranks_, experts, top_k):
    tokens = 20000
    ids = rows_and_bytes.draw_choices(tokens, experts, top_k, zipf=0.0, seed=3)
    copies = float(rows_and_bytes.rows_to_ranks(ids, experts, ranks_).sum()) / tokens
    # A token's copies lie between 1 and min(W, K * W / E): a spread of half that range is the widest there is.
    widest = (min(ranks_, top_k * max(ranks_ // experts, 1)) - 1) / 2
    expected = rows_and_bytes.copies_closed_form(ranks_, experts, top_k)
    assert abs(copies - expected) <= 4 * widest / math.sqrt(tokens)


@pytest.mark.parametrize(("ranks_", "experts"), [(1, 3), (2, 6), (3, 6), (6, 6), (6, 3), (4, 1)])
def test_rows_are_those_of_a_loop_over_tokens(ranks_, experts):
    ids = torch.randint(0, experts + 1, (40, K), generator=torch.Generator().manual_seed(experts))
    once, every = [0] * ranks_, [0] * ranks_
    for token in ids.tolist():
        owners = [
            rank
            for expert in token
            if expert < experts
            for rank in range(ranks_)
            if (rank * experts // ranks_ if ranks_ >= experts else expert // (experts // ranks_))
            == (expert if ranks_ >= experts else rank)
        ]
        for rank in owners:
            every[rank] += 1
        for rank in set(owners):
            once[rank] += 1
    assert rows_and_bytes.rows_to_ranks(ids, experts, ranks_).tolist() == once
    assert rows_and_bytes.naive_rows_to_ranks(ids, experts, ranks_).tolist() == every


def test_drawn_choices_are_distinct_and_as_popular_as_asked():
    ids = rows_and_bytes.draw_choices(30000, 8, 3, zipf=1.0, seed=1)
    assert ids.shape == (30000, 3)
    assert all(len(set(token)) == 3 for token in ids[:200].tolist())
    first = rows_and_bytes.draw_choices(30000, 8, 1, zipf=1.0, seed=2, popularity_seed=5)
    shares = torch.bincount(first.flatten(), minlength=8).sort(descending=True).values / 30000
    expected = torch.arange(1, 9).double() ** -1
    torch.testing.assert_close(shares.double(), expected / expected.sum(), atol=0.012, rtol=0)
    assert torch.equal(first, rows_and_bytes.draw_choices(30000, 8, 1, zipf=1.0, seed=2, popularity_seed=5))
    assert not torch.equal(first, rows_and_bytes.draw_choices(30000, 8, 1, zipf=1.0, seed=2, popularity_seed=6))
    assert rows_and_bytes.draw_choices(0, 8, 3, zipf=1.0, seed=1).shape == (0, 3)


def test_rows_of_a_routing_from_other_ranks_are_shares_of_its_tokens():
    ids = tuple(routing("uniform", 4, 8))
    setting = ep_model.Setting(2, 1000, H, 4, 8, K, 0, "recorded")
    tokens = [set(token) for choices in ids for token in choices.tolist()]
    rows = ep_model.Routing("recorded", ids).rows(setting, naive=False)
    for rank in range(2):
        share = sum(bool(token & set(range(4 * rank, 4 * rank + 4))) for token in tokens) / len(tokens)
        assert rows[:, rank].tolist() == pytest.approx([1000 * share] * 2)


def test_chunks_of_experts_are_counted_one_by_one():
    ids = tuple(routing("uniform", 4, 8))
    setting = ep_model.Setting(4, 0, H, 4, 8, K, 0, "recorded")
    rows = ep_model.Routing("recorded", ids).rows(setting, naive=False, chunks=2)
    for source, choices in enumerate(ids):
        for rank in range(4):
            chunks = [{2 * rank}, {2 * rank + 1}]
            assert rows[source, rank] == sum(bool(chunk & set(token)) for token in choices.tolist() for chunk in chunks)


# ------------------------------------------------------------------------------------------------------ links


@pytest.mark.parametrize(("nodes", "size"), [(1, 4), (3, 2), (2, 3), (4, 1)])
def test_phases_are_those_of_rows_moved_one_by_one(nodes, size):
    world = nodes * size
    rows = torch.randint(0, 9, (world, world), generator=torch.Generator().manual_seed(world + size))
    expected = {name: [] for name in ("flat", "two-level")}
    for way, steps in expected.items():
        hops = []  # of every row, where it is after each step
        for i, j in itertools.product(range(world), repeat=2):
            middle = i // size * size + j % size
            hops += [[i, j] if way == "flat" else [i, middle, j]] * int(rows[i, j])
        for step in range(1 if way == "flat" else 2):
            moved = {key: [0] * world for key in ("inside_sent", "inside_received", "between_sent", "between_received")}
            for places in hops:
                here, there = places[step : step + 2]
                if here != there:
                    kind = "inside" if here // size == there // size else "between"
                    moved[f"{kind}_sent"][here] += 1
                    moved[f"{kind}_received"][there] += 1
            steps.append(moved)
    for way, steps in expected.items():
        phases = ep_model.WAYS[way](rows, size)
        assert len(phases) == len(steps)
        for phase, moved in zip(phases, steps, strict=True):
            assert {key: getattr(phase, key).tolist() for key in moved} == moved
            back = phase.back()
            assert back.inside_sent.tolist() == moved["inside_received"]
            assert back.between_received.tolist() == moved["between_sent"]
    counts = [sum(p.inside_messages + p.between_messages for p in ep_model.WAYS[w](rows, size)) for w in expected]
    assert counts == [world - 1, size - 1 + nodes - 1]


def machine(**changes):
    return json.loads(links.DEFAULT_LINKS.read_text()) | changes


def test_seconds_by_hand():
    inside, between = links.Link("a", 100.0, 0.5, ""), links.Link("b", 10.0, 2.0, "")
    two_nodes = links.Machine("m", 2, inside, between, 1.0, "")
    rows = torch.full((4, 4), 10.0)
    # 5 bytes a row. Flat: inside 1 message and 10 rows; between 2 messages and 20 rows, the slower.
    assert links.seconds(links.flat(rows, 2), 5, two_nodes) == pytest.approx(2 * 2.0 + 20 * 5 / 10)
    # Two steps: 20 rows inside in 1 message; then 20 rows between in 1 message.
    by_hand = (0.5 + 20 * 5 / 100) + (2.0 + 20 * 5 / 10)
    assert links.seconds(links.two_level(rows, 2), 5, two_nodes) == pytest.approx(by_hand)
    rows[:, 1] = 40  # everybody sends rank 1 more: what it receives counts, 80 rows from the other node
    assert links.seconds(links.flat(rows, 2), 5, two_nodes) == pytest.approx(2 * 2.0 + 80 * 5 / 10)


@pytest.mark.parametrize("kind", ["uniform", "one rank", "idle"])
def test_predicted_bytes_once_per_node(ranks, kind):
    choices = routing(kind, 4, 8)
    to_nodes = torch.stack([rows_and_bytes.rows_to_ranks(ids, 8, 2) for ids in choices])
    phases = links.by_node(rows_and_bytes.counted_rows(choices, 8), to_nodes, 2)
    wire = rows_and_bytes.Wire.deduplicated(H, K, "fp32")
    found = ranks.run(jobs.moved_in_two_levels, choices, 8, H, 2, True)
    for rank, (sent, traffic) in enumerate(found):
        for name, phase, hop in zip(("between", "inside"), phases, traffic.hops, strict=True):
            there, back = (int(getattr(phase, f"{name}_{way}")[rank]) for way in ("sent", "received"))
            assert (hop.rows_there, hop.rows_back) == (there, back)
            assert sent[name] == there * (wire.row + wire.choices) + back * wire.result
            assert hop.others == phase.inside_messages + phase.between_messages
        assert traffic.bytes_sent - traffic.count_bytes == sent["inside"] + sent["between"]


def test_seconds_once_per_node_by_hand():
    """Two nodes of two: 10 rows to each node, 8 of them to each of its ranks; 3 bytes a row, 2 of choices, 4 back."""
    inside, between = links.Link("a", 100.0, 0.5, ""), links.Link("b", 10.0, 2.0, "")
    machine, wire = links.Machine("m", 2, inside, between, 1.0, ""), rows_and_bytes.Wire(3, 2, 4, 1)
    phases = links.by_node(torch.full((4, 4), 8.0), torch.full((4, 2), 10.0), 2)
    across = (2.0 + 1 / 10) + (2.0 + 10 * 3 / 10) + (2.0 + 10 * 2 / 10)
    handed = (0.5 + 1 / 100) + (0.5 + 16 * 3 / 100) + (0.5 + 16 * 2 / 100)
    back = (0.5 + 16 * 4 / 100) + (2.0 + 10 * 4 / 10)
    assert ep_model.by_node_seconds(phases, wire, machine) == pytest.approx(across + handed + back)


def test_choices_travel_with_rows_where_messages_are_many():
    """64 ranks each a node of their own: 63 messages in each of three exchanges; with one rank fewer in four."""
    link = links.Link("a", 100.0, 0.5, "")
    machine = links.Machine("m", 1, link, link, 1.0, "")
    wire = rows_and_bytes.Wire(row=3, choices=2, result=4, counts=1)
    for ranks_, exchanges in ((63, 2), (64, 1)):
        rows = torch.ones(ranks_, ranks_)
        counts, there, back = ep_model.parts_seconds(rows, wire, "flat", machine)
        others = ranks_ - 1
        assert there == pytest.approx(exchanges * others * 0.5 + others * 5 / 100)
        assert (counts, back) == pytest.approx((others * 0.51, others * 0.54))


def test_overlap_by_hand():
    assert links.overlapped(1, [4], [6], [4], 0) == 15
    assert links.overlapped(1, [4], [6], [4], 7) == 17  # the shared expert ends after the dispatch
    # Link: 1 to 3 to 5. Experts 3 to 6 and 6 to 9. Back 6 to 8 and 9 to 11.
    assert links.overlapped(1, [2, 2], [3, 3], [2, 2], 1) == 11
    assert links.overlapped(0, [5, 5], [1, 1], [5, 5], 0) == 20  # the link is busy throughout


def test_expected_rows_of_a_uniform_routing():
    setting = ep_model.Setting(8, 1000, 16, 8, 64, 8, 0, "uniform")
    result = ep_model.evaluate(setting, ep_model.Routing("uniform"), links.load_machine())
    share = 1 - math.comb(56, 8) / math.comb(64, 8)
    assert result["copies"]["dedup bf16"] == pytest.approx(8 * share)
    assert result["copies"]["naive bf16"] == pytest.approx(8)
    per_rank = 7 * 1000 * share  # rows to others, and as many from them
    expected = per_rank * (16 * 2 + 2 * 8 * 4) + per_rank * 16 * 2 + 7 * 48
    assert result["bytes_sent"]["dedup bf16"]["mean"] == pytest.approx(expected)
    assert result["bytes_sent"]["dedup fp8"]["mean"] == pytest.approx(expected - per_rank * (16 - 4))
    naive = 7 * 1000 * 2 * 16 * 2 + 7 * 8 * 8
    assert result["bytes_sent"]["naive bf16"]["mean"] == pytest.approx(naive)
    assert result["rows"] == "expected"


# ------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": 3}, "name: expected text, got 3"),
        ({"gpus_per_node": 2.5}, "gpus_per_node: expected an integer >= 1, got 2.5"),
        ({"gpus_per_node": 0}, "gpus_per_node: expected an integer >= 1, got 0"),
        ({"teraflops": True}, "teraflops: expected a positive number, got True"),
        ({"share_of_teraflops": 1.5}, "share_of_teraflops: expected at most 1, got 1.5"),
        ({"inside": None}, "inside.name: expected text, got None"),
        ({"between": {"name": "x", "gigabytes_per_second": -1}}, "between.gigabytes_per_second: expected a positive"),
    ],
)
def test_a_bad_link_table_is_named(tmp_path, changes, message):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(machine(**changes)))
    with pytest.raises(ValueError, match=r"mine\.json: ") as caught:
        links.load_machine(path)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ({"ids": 1}, TypeError, "expected a tensor of expert_indices"),
        ([], TypeError, "expected a tensor of expert_indices"),
        ([torch.zeros(2, 2)], TypeError, "rank 0: expert_indices: expected integers"),
        ([torch.zeros(2, 2).long(), torch.full((1, 2), 5)], ValueError, "rank 1: expert_indices: expected numbers in"),
        (torch.zeros(3).long(), ValueError, "expected shape"),
        ([torch.zeros(2, 2).long(), torch.zeros(2, 3).long()], ValueError, "expected one K"),
    ],
)
def test_a_bad_recorded_routing_is_named(tmp_path, content, error, message):
    torch.save(content, tmp_path / "ids.pt")
    with pytest.raises(error, match=r"ids\.pt") as caught:
        rows_and_bytes.load_choices(tmp_path / "ids.pt", 4)
    assert message in str(caught.value)


def test_other_bad_input_is_named():
    with pytest.raises(ValueError, match="E = 6 experts for W = 4 ranks"):
        rows_and_bytes.copies_closed_form(4, 6, 2)
    with pytest.raises(ValueError, match="top_k: expected 1 to E = 4, got 5"):
        rows_and_bytes.copies_closed_form(4, 4, 5)
    with pytest.raises(ValueError, match="expected numbers in"):
        rows_and_bytes.rows_to_ranks(torch.tensor([[-1]]), 4, 2)
    with pytest.raises(ValueError, match="nodes of 4"):
        links.flat(torch.zeros(6, 6), 4)
    setting = ep_model.Setting(8, 1, 1, 1, 8, 1, 0, "")
    for name in ("normal", "zipf:", "zipf:-1", "zipf:nan"):
        with pytest.raises(ValueError, match=f"got '{name}'"):
            ep_model.make_routing(name, setting)
    for text in ("", "8,x", "0"):
        with pytest.raises(ValueError, match="--top-k: expected integers"):
            ep_model.integers("top_k", text)


# ------------------------------------------------------------------------------------------------- programs


def test_the_program_writes_what_it_prints(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    torch.save(routing("uniform", 4, 8), tmp_path / "ids.pt")
    arguments = ["--recorded", str(tmp_path / "ids.pt"), "--experts", "8", "--gpus", "4,8", "--tokens", "16,32"]
    monkeypatch.setattr(sys, "argv", ["ep_model.py", *arguments, "--hidden", "32", "--out", str(tmp_path)])
    ep_model.main()
    printed = capsys.readouterr().out
    (table,) = tmp_path.glob("ep_model_h100-ndr_*.md")
    assert table.read_text() in printed
    assert table.with_suffix(".png").stat().st_size > 10_000
    text = table.with_suffix(".json").read_text()
    assert str(tmp_path) not in text
    results = json.loads(text)["results"]
    # Four ranks recorded: counted once, whatever --tokens says; eight: expected, for both.
    assert [(r["setting"]["gpus"], r["rows"]) for r in results] == [(4, "counted"), (8, "expected"), (8, "expected")]
    assert {r["setting"]["top_k"] for r in results} == {K}


def test_the_benchmark_refuses_bytes_that_differ():
    case = Case(2, 8, H, 0, 4, 2, 0.0)
    choices = [ids[:, :2] for ids in routing("uniform", 2, 4)]
    rows = rows_and_bytes.counted_rows(choices, 4)
    wire = rows_and_bytes.Wire.deduplicated(H, 2, "fp32")
    naive = rows_and_bytes.Wire(4 * H, 0, 4 * H, 0).forward(rows_and_bytes.counted_rows(choices, 4, naive=True))
    traffic = [
        {"forward": int(f), "backward": int(b), "metrics": int(f), "metrics_naive": int(n)}
        for f, b, n in zip(wire.forward(rows), wire.backward(rows), naive, strict=True)
    ]
    dispatch.check_bytes(case, {"dmoe": traffic}, choices)
    for name in ("forward", "backward", "metrics", "metrics_naive"):
        wrong = [dict(found) for found in traffic]
        wrong[1][name] += 1
        with pytest.raises(CheckError, match=rf"rank 1: bytes of dmoe: {name} \d+, expected \d+"):
            dispatch.check_bytes(case, {"dmoe": wrong}, choices)


def test_a_rank_that_fails_is_named():
    with Ranks(jobs.Fragile, 2, threads=1, limit=PATIENCE, grace=GRACE) as both:
        assert both.call("fine") == [(0, 2), (1, 2)]
        for method, message in (("raises_on", "rank 1 of 2: .*no such tokens"), ("ends_on", "rank 1 of 2: .*code 3")):
            with pytest.raises(RankFailedError, match=rf"(?s){method} failed:\n{message}"):
                both.call(method, 1)
