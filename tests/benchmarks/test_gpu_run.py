"""What a GPU run leaves behind: reports of stages that are killed, of sizes beside one that breaks, a cache."""

from __future__ import annotations

import importlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from patience import PATIENCE

pytest.importorskip("matplotlib")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import layer_gpu
import parts.gpu_apart as gpu_apart
import parts.gpu_peers as gpu_peers
from parts.gpu_case import begin
from parts.gpu_predictions import TERAFLOPS, predicted_seconds, products
from parts.gpu_shapes import MODELS, Shape

ROOT = Path(__file__).resolve().parents[2]
STAGES = {  # what each must at least start, without a GPU
    "smoke": ["sanitize.py --device cpu", "precompile.py"],
    "bench": ["layer_gpu.py", "--check-only", "--dummy"],
    "tests": ["--collect-only", "test_gpu_ops.py"],
    "sanitize": ["sanitize.py"],
    "tune": ["dmoe.tune"],
    "peers": ["--peers"],
    "ncu": ["--once"],
}


def program(path, text):
    path.write_text("#!/usr/bin/env bash\n" + text)
    path.chmod(0o755)
    return path


def script(out, python, *stages):
    return ["bash", str(ROOT / "benchmarks" / "run_gpu.sh"), "--dry", str(out), *stages], os.environ | {
        "PYTHON": str(python)
    }


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_rehearses_its_programs_and_says_how_long_it_took(stage, tmp_path):
    python = program(tmp_path / "python", f'echo "$@" >>{tmp_path}/calls\n')
    command, environment = script(tmp_path / "out", python, stage)
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=PATIENCE)
    calls = (tmp_path / "calls").read_text()
    assert all(part in calls for part in STAGES[stage]), calls
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert f"{stage} took" in summary
    assert "FAILED" not in summary
    assert len(list((tmp_path / "out").iterdir())) <= 8


def test_the_tests_stage_names_every_file_that_has_a_gpu_test():
    stages = (ROOT / "benchmarks" / "parts" / "gpu_stages.sh").read_text()
    files = [path.relative_to(ROOT) for path in (ROOT / "tests").rglob("test_*.py")]
    marked = [
        path for path in files if re.search(r"^(@pytest|pytestmark =.*)\b.*mark\.gpu", (ROOT / path).read_text(), re.M)
    ]
    marked = [path for path in marked if "benchmarks" not in path.parts]
    assert len(marked) >= 6
    assert not [path for path in marked if str(path) not in stages and f"{path.parent} " not in stages]


def test_an_unknown_stage_is_refused(tmp_path):
    command, environment = script(tmp_path / "out", sys.executable, "everything")
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 2
    assert "unknown stage: everything" in done.stderr


def test_a_failed_step_does_not_stop_the_next_and_fails_the_run(tmp_path):
    python = program(tmp_path / "python", 'case "$*" in *layer_gpu*) exit 7 ;; esac\n')
    command, environment = script(tmp_path / "out", python, "bench", "sanitize")
    done = subprocess.run(command, env=environment, check=False, capture_output=True, timeout=PATIENCE)
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert done.returncode == 1
    assert "benchmark, checks: FAILED with status 7" in summary
    assert "sanitize, one group: ok" in summary


def test_a_killed_stage_leaves_what_was_known(tmp_path):
    for name in ("reached", "hold"):
        os.mkfifo(tmp_path / name)
    # Opened like this, neither waits for the other side, and neither side dies of a reader that has gone.
    reached, hold = (os.open(tmp_path / name, os.O_RDWR | os.O_NONBLOCK) for name in ("reached", "hold"))
    held = f"exec 9<>{tmp_path}/hold; echo 'half a result'; echo >{tmp_path}/reached; read -r _ <&9"
    python = program(tmp_path / "python", f'case "$*" in *"--only movement"*) {held} ;; esac\n')
    command, environment = script(tmp_path / "out", python, "tune", "sanitize")
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        assert select.select([reached], [], [], PATIENCE)[0]  # it is in the middle of that program
        os.kill(process.pid, signal.SIGKILL)
        process.wait(timeout=PATIENCE)
    finally:
        os.write(hold, b"\n")
        os.close(reached)
        os.close(hold)
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert "tune, its candidates: ok" in summary
    assert "sanitize, one group: under way" in summary
    assert "half a result" in (tmp_path / "out" / "log.txt").read_text()


FAKE = """
import json, os, signal, sys
from pathlib import Path

index, into = (sys.argv[sys.argv.index(flag) + 1] for flag in ("--case", "--into"))
report = Path(os.environ["FAKE_OUT"]) / "x.md"
Path(os.environ["FAKE_OUT"], f"seen_{index}").write_text(report.read_text() if report.exists() else "")
entry = json.loads(os.environ["FAKE_ENTRIES"])[int(index)]
entry |= {"errors": {"dmoe": {"y": 1e-3}}, "refused": {}, "not_run": {"Liger": f"not in case {index}"}}
Path(into + ".partial").write_text(json.dumps({"environment": {"peers": []}, "cases": [entry]}))
os.replace(into + ".partial", into)
if index == "1":
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def fake_children(tmp_path, monkeypatch):
    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.setattr(gpu_apart, "PROGRAM", [sys.executable, str(tmp_path / "fake.py")])
    flags = ["--check-only", "--device", "cpu", "--apart", "--shapes", "tiny", "--contestants", "dmoe"]
    flags += ["--name", "x", "--out", str(tmp_path)]
    _, cases = layer_gpu.parse(flags)
    monkeypatch.setenv("FAKE_ENTRIES", json.dumps([begin(case) for case in cases]))
    monkeypatch.setenv("FAKE_OUT", str(tmp_path))
    return flags


def test_a_size_that_breaks_its_process_takes_no_other_along(fake_children, tmp_path, capsys):
    assert layer_gpu.main(fake_children) == 0
    cases = json.loads((tmp_path / "x.json").read_text())["cases"]
    assert ["broken" in case for case in cases] == [False, True, False, False]
    assert cases[1]["broken"] == "its process ended with status -9"
    assert cases[1]["errors"] == {"dmoe": {"y": 1e-3}}  # what it knew before
    assert not any("under_way" in case for case in cases)
    assert "its process ended with status -9" in (tmp_path / "x.md").read_text()


def test_the_report_is_there_after_each_size(fake_children, tmp_path, capsys):
    layer_gpu.main(fake_children)
    for index in range(4):
        seen = (tmp_path / f"seen_{index}").read_text()
        assert [f"not in case {other}" in seen for other in range(4)] == [other < index for other in range(4)]


def test_a_resumed_run_does_what_is_left(fake_children, tmp_path, capsys):
    layer_gpu.main([*fake_children, "--first", "2"])
    for index in range(2):
        (tmp_path / f"seen_{index}").unlink()
    layer_gpu.main([*fake_children, "--resume"])
    assert sorted(path.name for path in tmp_path.glob("seen_*")) == ["seen_2", "seen_3"]
    assert len(json.loads((tmp_path / "x.json").read_text())["cases"]) == 4


def test_predictions_are_of_measured_sizes_and_kernels():
    dims = {shape.dims: shape for shape in MODELS}
    for kernel, rates in TERAFLOPS.items():
        assert set(rates) <= set(dims)
        for size, rate in rates.items():
            seconds = predicted_seconds(kernel, dims[size])
            assert products(dims[size])[kernel] / seconds / 1e12 == pytest.approx(rate)
    shape = Shape("test", 3, 5, 7, 2, 2)
    assert sum(products(shape).values()) == sum(shape.flops)
    assert predicted_seconds("up", shape) is None


def test_peers_are_wheels_archives_and_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", "")
    peers, source = tmp_path / "peers", tmp_path / "source" / "peer_in_archive"
    peers.mkdir()
    (peers / "folder" / "peer_in_folder").mkdir(parents=True)
    source.mkdir(parents=True)
    for place, name in ((source, "archive"), (peers / "folder" / "peer_in_folder", "folder")):
        (place / "__init__.py").write_text(f"where = {name!r}")
    with tarfile.open(peers / "peer.whl.tar.xz", "w:xz") as archive:
        archive.add(source, "peer_in_archive")
    with zipfile.ZipFile(peers / "peer.whl", "w") as wheel:
        wheel.writestr("peer_in_wheel.py", "where = 'wheel'")
    (peers / "notes.txt").write_text("not a package")
    assert gpu_peers.add_peers(peers) == ["folder", "peer.whl", "peer.whl.tar.xz"]
    assert [importlib.import_module(f"peer_in_{kind}").where for kind in ("archive", "folder", "wheel")] == [
        "archive",
        "folder",
        "wheel",
    ]


def test_what_was_compiled_is_found_by_the_next_process(tmp_path):
    pytest.importorskip("triton")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    counts = []
    for attempt in range(2):
        told = tmp_path / f"{attempt}.json"
        command = [sys.executable, str(ROOT / "benchmarks" / "precompile.py"), "--set", "bench", "--shapes", "tiny"]
        command += ["--jobs", "2", "--json", str(told), *(["--check"] if attempt else [])]
        subprocess.run(command, env=environment, check=True, capture_output=True, timeout=PATIENCE)
        counts.append(json.loads(told.read_text()))
    assert counts[0]["fresh"] > 8
    assert (counts[1]["fresh"], counts[1]["found"]) == (0, counts[0]["fresh"] + counts[0]["found"])
