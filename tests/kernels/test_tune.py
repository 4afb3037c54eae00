"""The search for launch shapes, on times made up for it; on a GPU the real thing is one command."""

from __future__ import annotations

import json
import math
import os

import pytest
import torch

pytest.importorskip("triton")

from dmoe import tune
from dmoe.kernels import configs
from dmoe.ops import _trust

SHAPE = (4096, 1024, 512, 16, 4)


@pytest.mark.parametrize(
    ("gated", "activation"),
    [(True, "silu"), (False, "silu"), (True, "clamped_swiglu(7.0,1.702,1.0)"), (True, "sigmoid"), (False, "sigmoid")],
)
@pytest.mark.parametrize("tokens", [4096, 256, 16])
def test_entries_are_what_the_layer_looks_up(monkeypatch, tokens, gated, activation):
    from kernel_cases import expert_mlp
    from kernel_table import counting

    import dmoe.kernels.operands as operands

    asked = set()
    monkeypatch.setattr(operands, "choose", lambda *key: asked.add(configs.key(*key)) or configs.choose(*key))
    with counting():
        expert_mlp(tokens=tokens, hidden=1024, ffn=512, experts=16, top_k=4, gated=gated, activation=activation)
    entries = tune.kernels_of((tokens, *SHAPE[1:]), 90, gated=gated, activation=activation)
    assert asked == set(entries)
    for name, (kernel, built_in) in entries.items():
        assert name.startswith(kernel + "/")
        tried = tune.candidates(built_in, kernel)
        assert tried[0] == built_in
        assert len(set(tried)) == len(tried)
        assert 5 <= len(tried) <= 7
        assert {c.programs for c in tried} == ({1} if kernel == "weight_grad" else {1, 2})
        assert all(c.parts in (1, 2, 4, 8) and c.block_n // c.parts >= 16 for c in tried)
        for c in tried:  # what is allowed to a thread is there for as many programs as are started, and holds the sums
            rows = c.block_m if kernel == "weight_grad" else min(int(name.split("/")[3]), 128)
            sums = rows * c.block_n * (1 + (kernel == "up_gated")) // (32 * c.num_warps)
            limit = min(c.maxnreg or 255, 65536 // (32 * c.num_warps * c.programs))
            assert sums + 40 <= limit, (kernel, c)
            assert c.maxnreg is None or c.maxnreg * 32 * c.num_warps * c.programs <= 65536


def test_search_finds_the_fastest_and_keeps_the_earlier_ones():
    entries = tune.kernels_of(SHAPE, 90, gated=True)
    names = list(entries)
    wanted = {names[0]: 16, names[2]: 4}  # nothing else matters: the first of equals stays

    def measure(table):
        if any(c.num_stages == 5 for c in table.values()):
            return math.inf  # as what does not fit
        return 10.0 - sum(table[name].group == group for name, group in wanted.items() if name in table)

    best = tune.search(entries, measure, math.inf)
    for name, (kernel, built_in) in entries.items():
        if name in wanted:
            assert built_in.group != wanted[name]
            assert best[name].group == wanted[name]
        elif name not in wanted:
            assert name not in best, kernel


class FakeLayer:
    """Refused, wrong, broken or fine, by the block that the table asks for."""

    def run(self):
        (config,) = configs.measured().values() or [configs.Config(64, 32, 4, 3)]
        if config.block_n == 16:
            _trust.refused["moe_mlp"] = "the worst row is off by 2.0e+00 of its norm"
        if config.block_n == 32:
            raise RuntimeError("out of resource: shared memory")
        return [torch.full((3,), 2.0 if config.block_n == 128 else 1.0)]

    def milliseconds(self):
        return 5.0


@pytest.mark.parametrize(("block_n", "told"), [(16, "worst row"), (32, "out of resource"), (128, ""), (64, None)])
def test_what_is_refused_broken_or_wrong_never_wins(block_n, told, capsys, monkeypatch):
    monkeypatch.setenv("DMOE_CERTIFY", "0")
    measure = tune.Measure(FakeLayer())
    assert os.environ["DMOE_CERTIFY"] == "1"  # who trusts everything does not tune
    try:
        taken = measure({"down/hopper/2/128/64/32": configs.Config(block_n, 32, 4, 3)})
        assert taken == (5.0 if told is None else math.inf)
        assert (told or "") in capsys.readouterr().out
        assert not _trust.refused
    finally:
        configs.replace_measured({})


def test_built_in_launch_shapes_that_are_refused_end_the_search(monkeypatch):
    monkeypatch.setitem(_trust.refused, "moe_mlp", "it did not end within 180 s")
    with pytest.raises(RuntimeError, match=r"dmoe.tune: the built-in launch shapes are refused here: .*did not end"):
        tune.Measure(FakeLayer())


def test_every_candidate_is_tried_beside_the_best_so_far():
    entries = tune.kernels_of(SHAPE, 90, gated=True)
    (first, (kernel, built_in)), (second, _) = list(entries.items())[:2]
    tried, tables = tune.candidates(built_in, kernel), []
    times = {tried[2]: 5.0, tried[4]: 7.0}  # the later one beats the built-in, and not the earlier one

    def measure(table):
        tables.append(dict(table))
        return times.get(table.get(first), 10.0)

    assert tune.search(entries, measure, math.inf) == {first: tried[2]}
    seen = [table[first] for table in tables if set(table) == {first}]
    assert set(seen) == set(tried[1:])
    assert all(table[first] == tried[2] for table in tables if second in table)


def test_noise_moves_nothing_and_the_deadline_holds():
    entries = tune.kernels_of(SHAPE, 90, gated=False)
    times = iter(range(10**6))
    assert tune.search(entries, lambda table: 10.0 - (next(times) % 2) * 0.05, math.inf) == {}
    once = iter([10.0, 5.0])  # one lucky measurement, not confirmed
    assert tune.search(entries, lambda table: next(once, 10.0), math.inf) == {}
    late = iter([10.0, 10.0, 5.0])  # nor one that was not asked to be confirmed
    assert tune.search(entries, lambda table: next(late, 10.0), math.inf) == {}
    calls = []
    tune.search(entries, lambda table: calls.append(table) or 1.0, -math.inf)
    assert len(calls) == 1


def test_a_written_table_is_loaded_as_it_was(tmp_path):
    entries = tune.kernels_of(SHAPE, 90, gated=True)
    table = {name: tune.candidates(config, kernel)[3] for name, (kernel, config) in entries.items()}
    tune.write(table, tmp_path / "tuned.json")
    try:
        configs.load(tmp_path / "tuned.json")
        assert configs._measured == table
        tune.write({}, tmp_path / "tuned.json")
        configs.load(tmp_path / "tuned.json")
        assert configs._measured == table
        configs.load(tmp_path / "tuned.json", replace_all=True)
        assert configs._measured == {}
    finally:
        configs._measured.clear()
        configs.choose.cache_clear()
    assert json.loads((tmp_path / "tuned.json").read_text()) == {}
    assert list(tmp_path.iterdir()) == [tmp_path / "tuned.json"]


def test_command_line(capsys, monkeypatch):
    tune.main(["--shape", "4096,1024,512,16,4", "--list"])
    told = capsys.readouterr().out
    assert all(name in told for name in tune.kernels_of(SHAPE, 90, gated=True))
    tune.main(["--shape", "4096,1024,512,16,4", "--plain", "--list"])
    plain = capsys.readouterr().out
    assert all(name in plain for name in tune.kernels_of(SHAPE, 90, gated=False))
    assert "up_gated" not in plain
    tune.main(["--shape", "4096, 1024, 512, 16, 4", "--list"])
    assert capsys.readouterr().out == told
    for text in ("1,2,3", "1,2,3,4,x", "0,1,1,1,1", "1,2,3,4,1,x", "1,2,x,3,4,1", "1,2,3,4,-1", "1e3,1,1,1,1", ""):
        with pytest.raises(SystemExit):
            tune.main(["--shape", text])
        assert f"--shape: expected five numbers T,H,F,E,K of at least 1, got {text}" in capsys.readouterr().err
    for arguments, message in (
        (["--shape", "8,8,8,2,3"], "--shape: expected K of at most E, got 8,8,8,2,3"),
        (["--shape", "8,8,8,2,2", "--budget", "0"], "--budget: expected more than 0 seconds, got 0.0"),
        (["--shape", "8,8,8,2,2", "--out", "/nowhere/t.json"], "--out: expected a file in a folder that exists, got"),
    ):
        with pytest.raises(SystemExit):
            tune.main(arguments)
        assert message in capsys.readouterr().err
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        tune.main(["--shape", "1,1,1,1,1"])
    assert "expected a CUDA device, and this machine has none" in capsys.readouterr().err
