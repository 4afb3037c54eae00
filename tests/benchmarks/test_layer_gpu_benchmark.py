"""The GPU benchmark without a GPU: its floors, its truth, its check, and that its report is written whole."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("matplotlib")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import layer_gpu
import parts.gpu_case as gpu_case
import parts.gpu_contestants as contestants
import parts.gpu_kernels as gpu_kernels
from parts.gpu_problem import Truth, make_problem
from parts.gpu_shapes import H200, MODELS, TINY, Shape, backward_kernels, floor, forward_kernels
from parts.gpu_timing import Eager

# Milliseconds of forward and backward at 790 TFLOP/s and 4.3 TB/s, worked out apart from this code.
PUBLISHED_FLOORS = {
    (40960, 768, 256, 128, 8): (0.63, 1.17),
    (40960, 768, 1024, 32, 2): (0.53, 1.08),
    (24576, 1536, 256, 128, 8): (0.75, 1.33),
    (24576, 1536, 1024, 32, 2): (0.64, 1.23),
    (32768, 4096, 256, 256, 16): (5.24, 9.41),
    (32768, 4096, 1024, 64, 4): (4.49, 8.66),
    (32768, 4096, 512, 256, 16): (9.41, 17.8),
    (32768, 4096, 2048, 64, 4): (8.66, 17.0),
    (32768, 2048, 768, 128, 8): (3.41, 6.54),
    (32768, 2048, 1024, 64, 8): (4.46, 8.63),
    (32768, 4096, 14336, 8, 2): (29.4, 58.6),
}


def test_the_floors_are_the_published_ones():
    assert {shape.dims for shape in MODELS} == set(PUBLISHED_FLOORS)
    for shape in MODELS:
        for seconds, published in zip(floor(shape, H200), PUBLISHED_FLOORS[shape.dims], strict=True):
            digits = 3 if published > 1 else 2
            assert float(f"{seconds * 1e3:.{digits}g}") == published, shape.label


def test_each_kernels_bytes_are_those_of_its_operands():
    """Most of the published sizes are bound by arithmetic and say nothing of bytes: T=3, H=5, F=7, E=2, K=2 by hand."""
    shape = Shape("test", 3, 5, 7, 2, 2)
    assert [kernel.bytes for kernel in forward_kernels(shape)] == [562, 284, 90]
    assert [kernel.bytes for kernel in backward_kernels(shape)] == [590, 254, 508, 478, 90]
    assert sum(kernel.flops for kernel in forward_kernels(shape)) == shape.flops[0] == 6 * 6 * 5 * 7
    assert sum(kernel.flops for kernel in backward_kernels(shape)) == shape.flops[1] == 12 * 6 * 5 * 7


def test_one_lost_token_of_many_is_seen():
    problem = make_problem(Shape("test", 4000, 4, 3, 2, 1), "uniform", torch.device("cpu"))
    truth = Truth(problem)
    y = truth.y.clone()
    y[1234] = 0
    errors = truth.errors({"y": y})
    assert errors["y"] < 0.1  # the norm over all hardly shows it
    assert errors["worst y"] > gpu_case.WORST


@pytest.mark.parametrize("routing", ["uniform", "zipf"])
def test_the_truth_equals_autograd_over_single_rows(routing):
    problem = make_problem(Shape("test", 13, 6, 5, 7, 3), routing, torch.device("cpu"))
    assert all(len(set(row)) == 3 for row in problem.indices.tolist())
    names = ("x", "gates", "gate_up", "down")
    x, gates, up, down = leaves = [getattr(problem, name).double().requires_grad_() for name in names]
    y = torch.stack(
        [
            sum(
                gates[t, k] * (down[e] @ (torch.nn.functional.silu(up[e, :5] @ x[t]) * (up[e, 5:] @ x[t])))
                for k, e in enumerate(row)
            )
            for t, row in enumerate(problem.indices.tolist())
        ]
    )
    grads = torch.autograd.grad(y, leaves, problem.grad.double())
    found = Truth(problem).errors({"y": y, **dict(zip(names, grads, strict=True))})
    assert max(found.values()) < 1e-7  # those of the weights are kept in float32


def test_zipf_is_skewed_and_uniform_is_not():
    shape = Shape("test", 2048, 1, 1, 64, 4)
    skewed, even = (make_problem(shape, routing, torch.device("cpu")).load()["most"] for routing in ("zipf", "uniform"))
    assert skewed > 5
    assert even < 1.5


@pytest.mark.parametrize(
    "damage",
    [
        lambda got, problem: got["y"][3].zero_(),  # a lost token
        lambda got, problem: got["down"][problem.indices[0, 0]].mul_(0.8),
        lambda got, problem: got["gate_up"].copy_(got["gate_up"].flip(1)),  # halves changed about
        lambda got, problem: got["gates"].copy_(got["gates"].roll(1, 1)),
        lambda got, problem: got["x"][0, 0].fill_(float("nan")),
    ],
)
def test_a_wrong_contestant_is_refused_and_not_timed(damage, monkeypatch, tmp_path):
    class Wrong(contestants.GroupedMM):
        def results(self):
            got = super().results()
            damage(got, self.problem)
            return got

    monkeypatch.setitem(contestants.CONTESTANTS, "wrong", Wrong)
    args, _ = layer_gpu.parse(["--check-only", "--device", "cpu", "--shapes", "tiny", "--contestants", "wrong,dmoe"])
    entry = {}
    field = gpu_case.check(entry, make_problem(TINY[0], "uniform", torch.device("cpu")), args)
    assert set(field) == {"dmoe", contestants.CEILING}
    assert "differs from float64" in entry["refused"]["wrong"]


@pytest.fixture
def _without_groups_afterwards():
    """Megatron's contestant makes process groups that last as long as a benchmark's process."""
    yield
    if dist.is_initialized():
        sys.modules["megatron.core.parallel_state"].destroy_model_parallel()
        dist.destroy_process_group()


@pytest.mark.usefixtures("_without_groups_afterwards")
def test_every_contestant_that_runs_on_the_cpu_agrees(tmp_path, capsys):
    flags = "--check-only --device cpu --shapes tiny --name tiny --out"
    with torch.compiler.set_stance("force_eager"):  # what they compute, not what inductor makes of it: 15 s of 20
        assert layer_gpu.main([*flags.split(), str(tmp_path)]) == 0
    cases = json.loads((tmp_path / "tiny.json").read_text())["cases"]
    assert len(cases) == 4
    for case in cases:
        assert {"dmoe", "dmoe layer", "grouped_mm"} <= set(case["errors"])
        assert case["not_run"]["Liger"]
        assert not case["refused"]


def test_dmoe_failing_its_check_fails_the_run(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(contestants.Dmoe, "forward", lambda self: (self.gates.sum() + self.x) * self.down.sum())
    flags = "--check-only --device cpu --shapes tiny --contestants dmoe --out"
    assert layer_gpu.main([*flags.split(), str(tmp_path)]) == 1
    assert "dmoe FAILED its check" in capsys.readouterr().err


def test_the_dummy_run_writes_all_three_files_and_marks_them(tmp_path, capsys):
    assert layer_gpu.main(["--dummy", "--out", str(tmp_path)]) == 0
    found = {path.suffix: path for path in tmp_path.iterdir()}
    assert set(found) == {".json", ".md", ".png"}
    assert all(path.name.startswith("DUMMY_layer_gpu") for path in found.values())
    document = json.loads(found[".json"].read_text())
    assert document["environment"]["dummy"] is True
    assert len(document["cases"]) == len(layer_gpu.all_cases())
    text = found[".md"].read_text()
    assert "DUMMY: every figure on this page is invented" in text
    for heading in ("## dmoe", "## Milliseconds", "## Memory", "## Decode", "## Not run"):
        assert heading in text
    assert "- everything: out of time" in text
    assert found[".png"].read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--shapes nothing --dummy", "no such size"),
        ("--contestants nobody --dummy", "expected some of"),
        ("--device cpu", "only with --check-only or --dummy"),
        ("--rounds 0 --dummy", "expected at least 1"),
    ],
)
def test_a_wrong_command_line_is_refused(flags, message, capsys):
    with pytest.raises(SystemExit):
        layer_gpu.main(flags.split())
    assert message in capsys.readouterr().err


@pytest.fixture
def stand_in(monkeypatch):
    """As much of ``torch.cuda`` as the timing asks for, on the CPU: whether it runs through, not what it measures."""
    import time
    from types import SimpleNamespace

    class Event:
        def __init__(self, enable_timing):
            self.at = None

        def record(self):
            self.at = time.perf_counter()

        def synchronize(self):
            assert self.at is not None

        def elapsed_time(self, end):
            return 1e3 * (end.at - self.at)

    properties = SimpleNamespace(
        L2_cache_size=1024, name="stand-in", major=9, minor=0, total_memory=2**30, multi_processor_count=1
    )
    for name, value in {
        "Event": Event,
        "get_device_properties": lambda device: properties,
        "synchronize": lambda device=None: None,
        "reset_peak_memory_stats": lambda device: None,
        "memory_allocated": lambda device: 0,
        "max_memory_allocated": lambda device: 7,
        "is_available": lambda: True,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(layer_gpu, "ceilings", lambda device: H200)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda clocks: None)
    monkeypatch.setattr(gpu_case, "launches", lambda run, device: len(run()))
    monkeypatch.setattr(gpu_case, "replay_seconds", lambda run, device, flush=None: 1.0)
    monkeypatch.setattr(gpu_case, "Graphed", Eager)  # captured or not: the same numbers
    events = [("up_kernel", 1e-3), ("void dmoe::plan_kernel<long>(...)", 1e-5), ("fill", 1e-6)]
    monkeypatch.setattr(gpu_kernels, "device_events", lambda run, device: run() or events)
    parse = layer_gpu.parse

    def with_stand_in(arguments):
        args, cases = parse(arguments)
        args.device, args.apart = "cpu", False
        return args, cases

    monkeypatch.setattr(layer_gpu, "parse", with_stand_in)


def test_the_timing_runs_through_and_its_report_is_written(stand_in, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(layer_gpu, "DECODE", (Shape("small decode", 3, 64, 32, 8, 2),))
    flags = ["--shapes", "tiny,decode", "--rounds", "3", "--name", "timed", "--contestants"]
    assert layer_gpu.main([*flags, "dmoe,dmoe layer,grouped_mm,SonicMoE", "--out", str(tmp_path)]) == 0
    cases = json.loads((tmp_path / "timed.json").read_text())["cases"]
    assert [case["kind"] for case in cases] == ["decode", *["training"] * 4]
    for case in cases[1:]:
        assert set(case["timings"]) == {"dmoe", "dmoe layer", "grouped_mm", contestants.CEILING}
        for timing in case["timings"].values():
            assert timing["step"]["rounds"] == 6
            assert 0 < timing["forward"]["median"] < timing["step"]["median"]
        assert case["memory"]["dmoe"]["peak"] == 7
        assert set(case["graphs"]) == set(case["timings"])
        assert set(case["launches"]) == set(case["kernels"]) == {"dmoe", "dmoe layer"}
        assert [kernel["role"] for kernel in case["kernels"]["dmoe"]["forward"]] == ["up", "plan", ""]
    assert cases[0]["decode"]["dmoe"]["eager"] > 0
    assert "SonicMoE" in cases[0]["not_run"]
    text = (tmp_path / "timed.md").read_text()
    assert "tiny (96, 64, 32, 8, 2, zipf)" in text
    assert "## Kernels of the layer beside what was predicted" in text
    assert "| plan | 10 | - | 15 | 1.50 |" in text
    assert "DUMMY" not in text


def test_when_time_is_up_what_is_left_is_named(stand_in, tmp_path, capsys):
    assert layer_gpu.main(["--shapes", "tiny", "--budget", "0", "--name", "late", "--out", str(tmp_path)]) == 0
    cases = json.loads((tmp_path / "late.json").read_text())["cases"]
    assert [case["left_out"] for case in cases] == ["out of time"] * 4
    assert "out of time" in (tmp_path / "late.md").read_text()
