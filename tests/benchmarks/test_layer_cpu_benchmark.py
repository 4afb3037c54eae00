"""The layer's benchmarks on the CPU: contestants in both passes, what counts as a missed aim, reports written whole."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("matplotlib")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import decode_layer_cpu
import layer_cpu
from parts import layer_run, processor
from parts.harness import CheckError, Timing, describe, environment, stem
from parts.layer_bench import CONTESTANTS, IN_TRAINING, RIVALS, Bench
from parts.layer_case import Case, reference
from parts.layer_report import report

SMALL = (12, 16, 8, 4, 2)  # T, H, F, E, K
PASSES = ("training", "inference")
HERE = [n for n in CONTESTANTS if not n.startswith("HF") or importlib.util.find_spec("transformers")]


def truth_at(path: Path, case: Case) -> str:
    torch.save(reference(case, 0), path)
    return str(path)


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_contestant_is_compared_in_both_passes(passes, dtype, tmp_path):
    case = Case(*SMALL, dtype, passes)
    path = truth_at(tmp_path / "truth.pt", case)
    for name in HERE:
        if name in IN_TRAINING and not case.training:
            continue
        bench = Bench(name, "cpu")
        assert bench.build(case, 2**30) == ""
        errors = bench.errors(0, path)
        if name != "dense FFN":  # another function
            assert "y" in errors
            assert ("gate_up" in errors) == case.training
        assert all(error < layer_run.TOLERANCE[dtype] for error in errors.values()), (name, errors)
        assert bench._built().results()["y"].is_inference() != case.training or name == "floor"
        seconds, faults = bench.time([0], [1, 2, 3])
        assert seconds > 0 <= faults


def test_another_layers_output_is_refused(tmp_path):
    case = Case(*SMALL, "fp32", "inference")
    bench = Bench("dmoe", "wall")
    bench.build(case, 2**30)
    with torch.no_grad():
        next(iter(bench._built().parameters())).mul_(1.01)
    worker = SimpleNamespace(call=lambda method, *arguments: getattr(bench, method)(*arguments))
    with pytest.raises(CheckError, match="y by"):
        layer_run.worst_errors("here", {"dmoe": worker}, lambda seed: reference(case, seed), 1e-5)


def test_an_operation_counts_with_those_that_it_calls():
    bench = Bench("sort + grouped_mm", "wall")
    bench.build(Case(*SMALL, "fp32", "inference"), 2**30)
    outer, every = bench.operations()
    assert 15 < outer < every


def entry_of(passes: str, tokens: int, dmoe: float, rival: float, floor: float) -> dict:
    timings = {
        name: Timing.of([seconds]) for name, seconds in (("dmoe", dmoe), ("expert loop", rival), ("floor", floor))
    }
    case = Case(tokens, *SMALL[1:], "bf16", passes)
    return {
        "case": {**vars(case), "label": case.label, "expert_flops": case.flops},
        "timings": {"changing": timings, "fixed": timings},
        "not_run": {"HF eager": "no reason"},
        "saved_bytes": {"dmoe": 2**20} if case.training else {},
    }


def test_aims_and_shares():
    limit = Case(512, *SMALL[1:], "bf16", "inference").flops / 2.0  # FLOP/s at which the layer takes two seconds
    env = environment(2) | {"limits": {"bf16": limit}, "instructions": ["amx_bf16"]}
    both = [entry_of("training", 16, 2.0, 1.0, 1.0), entry_of("inference", 512, 4.0, 5.0, 3.0)]
    told = report(both, env, "name")
    training, inference = told.split("## Inference, bf16, every step")[:2]
    assert "16, 16, 8, 4, 2: behind expert loop, which takes 0.50 of its time" in training
    assert "times the floor; the aim" not in training  # of few tokens nothing is asked
    assert "512, 16, 8, 4, 2: 1.33 times the floor; the aim is 1.15" in inference
    assert "behind" not in inference
    assert "| 1.33 | 0.50 | 0.67 |" in inference
    assert "too low a limit for a processor with AMX" in told
    assert "too low" not in report(both, env | {"instructions": []}, "name")
    met = report([entry_of("inference", 512, 1.1, 1.2, 1.0)], env | {"limits": {}}, "name")
    assert met.count("Every aim is met.") == 2
    assert "has no operation `dmoe::multiply_add_limit`" in met
    assert "Saved" not in met


def test_the_limit_is_the_best_of_a_thread_times_threads(monkeypatch):
    found = {"float32": iter([1.0, 3.0, 2.0]), "bfloat16": iter([5.0, 4.0, 4.0])}
    monkeypatch.setattr(torch.ops, "dmoe", SimpleNamespace(multiply_add_limit=lambda name: next(found[name])))
    assert processor.multiply_add_limits(4) == {"fp32": 12e9, "bf16": 20e9}
    monkeypatch.setattr(torch.ops, "dmoe", SimpleNamespace())
    assert processor.multiply_add_limits(4) == {}


def test_a_restricted_processor_is_told_and_named(monkeypatch):
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS"):
        monkeypatch.delenv(name, raising=False)
    plain = environment(1)
    assert "Under" not in describe(plain)
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")
    env = environment(1, "cpu")
    assert describe(env).endswith("Under ONEDNN_MAX_CPU_ISA=AVX512_CORE ATEN_CPU_CAPABILITY=avx2.")
    assert "1 threads by the processor's clock;" in describe(env)
    assert stem("layer", env) == stem("layer", plain).replace("layer_", "layer_one_thread_avx512_core_avx2_")


class Here:
    """A contestant in this process: starting one for each takes seconds."""

    def __init__(self, factory, *arguments, threads):
        self.served = factory(*arguments)

    def call(self, method, *arguments):
        return getattr(self.served, method)(*arguments)

    def close(self):
        pass


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs a script's ``main`` with these options; what it wrote, as JSON and text."""
    monkeypatch.setattr(layer_run, "Worker", Here)
    monkeypatch.setattr(layer_cpu, "QUICK_SHAPES", (SMALL,))
    monkeypatch.setattr(decode_layer_cpu, "SHAPES", (SMALL[1:],))

    def now(script, *options):
        monkeypatch.setattr(sys, "argv", [script.__name__, "--quick", "--out", str(tmp_path), *options])
        script.main()
        (found,) = tmp_path.glob("*.json")
        assert found.with_suffix(".png").stat().st_size > 10_000
        return json.loads(found.read_text()), found.with_suffix(".md").read_text()

    return now


@pytest.mark.parametrize("passes", ["training,inference", "inference"])
def test_layer_cpu_writes_a_table_for_each_pass_and_regime(run, passes):
    rivals = "expert loop,dmoe + balance loss,floor"
    written, told = run(layer_cpu, "--contestants", rivals, "--passes", passes, "--dtypes", "bf16", "--warmup", "1")
    chosen = passes.split(",")
    assert [case["case"]["passes"] for case in written["cases"]] == chosen
    assert told.count("| T, H, F, E, K |") == 2 * len(chosen)
    assert told.count("dmoe + balance loss") == 3 * ("training" in chosen)  # the two regimes, and bytes saved


def test_decode_layer_cpu_writes_both_tables(run):
    written, told = run(decode_layer_cpu, "--contestants", "expert loop")
    assert [case["case"]["tokens"] for case in written["cases"]] == [1, 1]
    assert [round(case["chosen_bytes"]) for case in written["cases"]] == [2 * 3 * 16 * 8 * size for size in (4, 2)]
    assert written["environment"]["of_a_tiny_layer"]["operations"].keys() == {"dmoe", "expert loop"}
    assert told.count("\n| expert loop |") == 1
    assert set(decode_layer_cpu.CONTESTANTS) == {"dmoe", *RIVALS}


@pytest.mark.parametrize(
    ("script", "options", "said"),
    [
        (layer_cpu, ["--passes", "training,sleeping"], "--passes: expected some of training, inference, got"),
        (layer_cpu, ["--contestants", "nobody"], "--contestants: expected some of"),
        (layer_cpu, ["--dtypes", "fp8"], "no such case; labels are like"),
        (decode_layer_cpu, ["--contestants", "floor"], "--contestants: expected some of"),
        (decode_layer_cpu, ["--clock", "cpu", "--threads", "2"], "--clock cpu: expected --threads 1"),
    ],
    ids=["passes", "contestants", "dtypes", "decode-contestants", "clock"],
)
def test_bad_options_end_with_a_sentence(run, capsys, script, options, said):
    with pytest.raises(SystemExit):
        run(script, *options)
    assert said in capsys.readouterr().err
