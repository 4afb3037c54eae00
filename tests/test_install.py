"""Source archive, wheel and installs: complete, usable from elsewhere, and usable without a compiler or Triton."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("install")]  # one worker builds the wheel

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("csrc", "dmoe", "integrations", "tests", "examples", "benchmarks")
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
BUILD = ["--no-build-isolation", "--no-deps", "--no-index"]

# Trains one layer from wherever it is started; says where dmoe came from and what was warned about.
TRAIN = """
import sys, warnings
if sys.argv[2] == "no triton":
    sys.modules["triton"] = None  # an import of it fails
import torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import dmoe, dmoe.integrations, dmoe.functional
    torch.manual_seed(0)
    layer = dmoe.MoE(hidden_size=16, ffn_hidden_size=24, num_experts=4, top_k=2, bias="expert", capacity_factor=1.0)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    x, results = torch.randn(3, 11, 16), []
    for _ in range(3):
        y = layer(x)
        (y.square().mean() + dmoe.aux_loss(layer)).backward()
        results += [y.detach(), *(parameter.grad.clone() for parameter in layer.parameters())]
        optimizer.step()
        optimizer.zero_grad()
    results.append(layer.eval()(x).detach())
torch.save(results, sys.argv[1])
ours = [str(item.message) for item in caught if issubclass(item.category, RuntimeWarning)]
print(dmoe.__file__, dmoe.integrations.__file__, len(ours), *ours, sep="\\n")
"""


def _run(command: list[str], cwd: Path, **env: str) -> str:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("DMOE_", "PYTHONPATH", "PIP_"))}
    done = subprocess.run(
        command,
        cwd=cwd,
        env=clean | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


def _train(target: Path, folder: Path, triton: str) -> tuple[list[torch.Tensor], list[str]]:
    """Results and warnings of a training in another folder, with only ``target`` on the path."""
    folder.mkdir()
    output = _run([sys.executable, "-c", TRAIN, "results.pt", triton], folder, PYTHONPATH=str(target))
    package, integrations, count, *warned = output.splitlines()
    assert package == str(target / "dmoe" / "__init__.py")
    assert integrations == str(target / "dmoe" / "integrations" / "__init__.py")
    assert int(count) == len(warned)
    return torch.load(folder / "results.pt"), warned


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The unpacked source archive, with the objects of an earlier build beside it: building from it compiles little."""
    folder = tmp_path_factory.mktemp("sources")
    checkout = folder / "checkout"
    for name in SOURCES:
        if (ROOT / name).exists():
            shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, checkout)
    left = b"left by an earlier build in place"
    (checkout / "dmoe" / "_C.so").write_bytes(left)
    script = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"
    _run([sys.executable, "-c", script, str(folder)], checkout)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    unpacked = folder / archive.name.removesuffix(".tar.gz")
    assert not (unpacked / "dmoe" / "_C.so").exists()
    (unpacked / "dmoe" / "_C.so").write_bytes(left)
    objects = ROOT / "build" / "objects"
    if objects.exists():
        kept = [path for path in objects.iterdir() if "_cpp-" in path.name]
        (unpacked / "build" / "objects").mkdir(parents=True)
        for path in kept:
            shutil.copy2(path, unpacked / "build" / "objects")
    return unpacked


@pytest.fixture(scope="module")
def compiled(sources, tmp_path_factory):
    """A wheel with the compiled library, installed into a folder of its own; wheel and folder."""
    folder = tmp_path_factory.mktemp("compiled")
    _run([*PIP, "wheel", *BUILD, "-w", str(folder), "."], sources, DMOE_BUILD="required", DMOE_CUDA="off")
    (wheel,) = folder.glob("*.whl")
    _run([*PIP, "install", *BUILD, "--target", str(folder / "site"), str(wheel)], folder)
    return wheel, folder / "site"


def test_the_source_archive_is_complete(sources):
    listed = {str(path.relative_to(sources)) for path in sources.rglob("*") if path.is_file()}
    native = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").iterdir()}
    python = {str(path.relative_to(ROOT)) for name in SOURCES for path in (ROOT / name).rglob("*.py")}
    assert {path.split(".")[-1] for path in native} == {"cpp", "cu", "h", "cuh"}
    assert native | python | {"LICENSE", "README.md", "setup.py", "pyproject.toml", "dmoe/py.typed"} <= listed
    assert not [path for path in listed if path.endswith(".pyc")]


def test_the_wheel_holds_the_library_the_license_and_no_python_version(compiled):
    wheel, _ = compiled
    assert "-py3-none-" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert archive.getinfo("dmoe/_C.so").file_size > 10_000
    assert {"dmoe/py.typed", "dmoe/integrations/__init__.py", "dmoe/kernels/__init__.py"} <= set(names)
    assert [name for name in names if name.endswith("LICENSE")]
    assert not [name for name in names if name.startswith(("integrations/", "tests/", "csrc/", "examples/"))]
    python = {str(path.relative_to(ROOT)) for path in (ROOT / "dmoe").rglob("*.py")}
    assert python <= set(names)


def test_a_layer_trains_from_another_folder_and_alike_without_library_and_triton(compiled, sources, tmp_path):
    expected, warned = _train(compiled[1], tmp_path / "elsewhere", "triton as it is")
    assert not warned

    # The sources now hold the library of the first build: it must not find its way into this one.
    target = tmp_path / "site"
    _run([*PIP, "install", *BUILD, "--target", str(target), "."], sources, DMOE_BUILD="off")
    assert not list(target.rglob("*.so"))
    actual, warned = _train(target, tmp_path / "elsewhere too", "no triton")
    assert len(warned) == 1
    assert "reference operations (csrc/ was not built" in warned[0]
    assert "dmoe.info()" in warned[0]
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_without_a_compiler_it_installs_with_one_warning(sources, tmp_path):
    bare = tmp_path / "bin"
    bare.mkdir()
    (bare / "python").symlink_to(sys.executable)
    target = tmp_path / "site"
    command = [*PIP, "install", "-v", *BUILD, "--target", str(target), "."]
    output = _run(command, sources, PATH=str(bare), CXX="", DMOE_BUILD="auto", CUDA_HOME="")
    assert output.count("WARNING: dmoe: ") == 1
    assert "csrc/ was not built (no C++ compiler was found)" in output
    assert "apt-get install g++" in output
    assert (target / "dmoe" / "layer.py").exists()
    assert not list(target.rglob("*.so"))
