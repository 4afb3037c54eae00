"""What ranks have to agree on: one that differs, and every rank is told at once, none waits; then the group goes on."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import rank_jobs_agreement as jobs
import torch.distributed as dist
from parallel_layer_cases import BASE

from dmoe.parallel import agreement
from dmoe.parallel.meeting import Verdict, meet

GLOBAL = {**BASE, "load_balancing_coefficient": 0.1, "load_balancing_over": "global"}


@pytest.mark.parametrize("odd", [0, 1, 2, 3])
def test_a_rank_that_alone_lacks_the_tensor_parallel_group(ranks, odd):
    """Its row knows by itself; the rest of its column talks with it over that group alone, and is told by its row."""
    for said in ranks.run(jobs.told, BASE, 2, "expert_tp_group", [odd], True):
        assert "ranks of expert_tp_group: " in said
        assert "1 on rank" in said


def test_questions_outside_a_grid_do_not_count_in_it(ranks):
    """Rank 0 asks over itself alone, and then meets rank 1 in a grid whose expert-parallel groups are one rank each."""
    fields = {**BASE, "load_balancing_coefficient": 0.0}
    ranks.run(jobs.told, fields, 1, "nothing", [], ranks=1)
    assert ranks.run(jobs.in_a_grid, fields, [0]) == [True] * 4


def test_questions_of_groups_that_are_gone_do_not_count():
    """PyTorch gives the names of a world that was left to the groups of the next one."""
    names, numbers = [], []
    for store in (dist.HashStore(), dist.HashStore()):
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            group = dist.new_group([0])
            names.append(group.group_name)
            numbers.append([agreement._number(group), agreement._number(group)])
        finally:
            del group
            dist.destroy_process_group()
    assert names[0] == names[1]
    assert numbers == [[1, 2]] * 2


def test_a_column_that_is_of_another_seed(ranks):
    """Rows find it by themselves, and no rank leaves before it has told its column."""
    for said in ranks.run(jobs.told, BASE, 2, "seed", [2, 3], True):
        assert "seed: " in said


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("options", [{}, {"overlap_degree": 2, "num_experts": 8}], ids=str)
def test_ranks_in_different_modes_under_a_global_loss(ranks, world, first, options):
    for said in ranks.run(jobs.told, {**GLOBAL, **options}, 1, "mode", [world - 1], first, ranks=world):
        assert ("training: True on" if first else "mode: training on") in said
        assert f"on rank {world - 1}" in said


def test_ranks_in_different_modes_in_a_grid(ranks):
    for said in ranks.run(jobs.told, GLOBAL, 2, "mode", [2]):
        assert "mode: training on ranks" in said


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    ("what", "at_first", "later"),
    [
        ("autograd", "autograd: False on rank 0, True on", "requires_grad: "),
        ("autocast", "autocast: torch.bfloat16 on rank 0, None on", "dtype: torch.bfloat16 on rank 0, torch.float32"),
    ],
)
def test_brothers(ranks, world, first, what, at_first, later):
    for said in ranks.run(jobs.told, GLOBAL, 1, what, [0], first, ranks=world):
        assert (at_first if first else later) in said


@pytest.mark.parametrize("world", [2, 4])
def test_a_mask_on_one_rank_where_all_tokens_are_assigned_together(ranks, world):
    from dmoe.routing import Base

    fields = {**BASE, "router": Base(over="group"), "top_k": 1, "causal": False}
    for said in ranks.run(jobs.told, fields, 1, "mask", [1], ranks=world):
        assert said.startswith("MoE: token_mask: expected None in training with router='base'")


def test_the_static_mode_is_told_in_its_first_forward(ranks):
    for said in ranks.run(jobs.static_modes, {**GLOBAL, "max_rows_received": 64}):
        assert "training: True on ranks 0, 2, 3, False on rank 1" in said


def test_a_rank_that_was_not_asked_does_not_meet_those_that_wait_for_it(monkeypatch):
    """It is here for the next question before the other has heard of the last: they meet in the next."""
    store = dist.HashStore()
    held = [(_Rank(store), _Rank(dist.HashStore())) for _ in range(2)]
    monkeypatch.setattr(dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(dist, "get_rank", lambda group: next(n for n, pair in enumerate(held) if group in pair))
    verdicts = [Verdict(other, "this") for _, other in held]
    with ThreadPoolExecutor(2) as threads:
        waits = threads.submit(meet, held[0][0], verdicts[0], 7)
        while not store.check(["dmoe/met"]):
            pass
        ahead = threads.submit(meet, held[1][0], Verdict(held[1][1], "next"), 8)
        while store.get("dmoe/met") != b"of 0:7 1:8":
            pass
        assert not waits.done()
        assert not ahead.done()
        verdicts[0].leave("the other was not asked")
        assert waits.result() == "the other was not asked"
        assert meet(held[0][0], Verdict(held[0][1], "next"), 8) is None
        assert ahead.result() is None


class _Rank:
    """A rank of a group that is nothing but its store."""

    def __init__(self, store):
        self._store = store

    def get_group_store(self):
        return self._store


@pytest.mark.parametrize("kind", ["file", "tcp", "memory"])
@pytest.mark.parametrize("told", [False, True])
def test_who_meets_and_who_withdraws_agree(monkeypatch, tmp_path, kind, told):
    """Hundreds of meetings of four threads, of which the first hears a verdict meanwhile: all go on, or nobody does."""
    from datetime import timedelta

    from patience import PATIENCE

    limit, size = timedelta(seconds=PATIENCE), 4
    server = (
        dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False, timeout=limit) if kind == "tcp" else None
    )
    memory = dist.HashStore()

    def store():
        if kind == "file":
            return dist.FileStore(str(tmp_path / "store"), -1)
        return memory if server is None else dist.TCPStore("localhost", server.port, is_master=False, timeout=limit)

    held = [(_Rank(store()), _Rank(store())) for _ in range(size)]
    monkeypatch.setattr(dist, "get_world_size", lambda group: size)
    monkeypatch.setattr(dist, "get_rank", lambda group: next(n for n, pair in enumerate(held) if group in pair))
    with ThreadPoolExecutor(size + 1) as threads:
        for round_ in range(30 if kind == "file" else 100):
            verdicts = [Verdict(other, f"{round_}") for _, other in held]
            come = range(size - 1) if told and round_ % 3 == 0 else range(size)  # one never does
            met = [threads.submit(meet, held[n][0], verdicts[n], round_) for n in come]
            if told:
                threads.submit(verdicts[0].leave, "no")
            results = [each.result() for each in met]
            assert len(set(results)) == 1
            if len(results) < size:
                assert results[0] == "no"
            elif not told:
                assert results[0] is None
