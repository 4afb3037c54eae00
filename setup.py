"""Builds ``dmoe/_C.so`` from ``csrc/``: the CPU half with the C++ compiler, the CUDA half wherever nvcc is found.

The library is written against PyTorch's stable ABI (floor: torch 2.10), so one build serves every later torch and every
Python. torch's own ``CUDAExtension`` refuses to compile CUDA sources beside a CPU-only torch; the stable ABI does not
need the two to match, which is why the compile commands are spelled out here.

Environment:
    DMOE_BUILD=auto      (default) build what can be built; without a compiler install all the same, with one warning
    DMOE_BUILD=required  a missing compiler or a failing compile is an error
    DMOE_BUILD=off       install the Python half only
    DMOE_CUDA=auto|required|off     the same for the CUDA half (default auto: when nvcc is found)
    DMOE_CUDA_ARCHS=80;90;100       compute capabilities to compile for
    MAX_JOBS                        compiler processes at once (default: the number of cores)
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import setuptools
from setuptools import Distribution, Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
SETUPTOOLS_FLOOR = 77  # reads pyproject.toml's licence, as pip's isolated builds do
TORCH_FLOOR = "0x020a000000000000"  # the stable ABI of torch 2.10


def mode(variable: str) -> str:
    """The value of a build switch, checked."""
    value = os.environ.get(variable, "auto")
    if value not in ("auto", "required", "off"):
        raise SystemExit(f"{variable}: expected auto, required or off, got {value!r}")
    return value


def find_nvcc() -> str | None:
    """nvcc under CUDA_HOME, on PATH, or where CUDA's own installer puts it; None without one."""
    cuda_home = os.environ.get("CUDA_HOME")
    beside = shutil.which(str(Path(cuda_home) / "bin" / "nvcc")) if cuda_home else None
    return beside or shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


class BuildLibrary(build_ext):
    """Compiles every source of ``csrc/`` in parallel and links one library that no Python version is tied to."""

    def get_ext_filename(self, fullname: str) -> str:
        """``dmoe/_C.so``, without a Python version: ``torch.ops.load_library`` loads it, Python never imports it."""
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        """Build, or explain in one warning why the package will run on its reference operations."""
        wanted = mode("DMOE_BUILD")
        target = Path(self.get_ext_fullpath(ext.name))
        target.unlink(missing_ok=True)  # an earlier build's library would be packed beside sources that it does not fit
        if wanted == "off":
            return
        try:
            self._build(target)
        except (OSError, ImportError, subprocess.CalledProcessError) as error:
            if wanted == "required":
                raise SystemExit(f"dmoe: building csrc/ failed: {error}") from error
            print(
                f"WARNING: dmoe: csrc/ was not built ({error}). The package installs and runs on its reference "
                "operations, which are slower. To build: install a C++17 compiler (Debian: apt-get install g++) and "
                "run `pip install --no-build-isolation --force-reinstall --no-deps dmoe`.",
                file=sys.stderr,
            )

    def get_outputs(self) -> list[str]:
        """The library, when it was built."""
        return [path for path in super().get_outputs() if Path(path).exists()]

    def copy_extensions_to_source(self) -> None:
        """For an editable install; when nothing was built, what an earlier one left goes too."""
        library = self.get_ext_filename(self.extensions[0].name)
        if (Path(self.build_lib) / library).exists():
            super().copy_extensions_to_source()
        else:
            (ROOT / library).unlink(missing_ok=True)

    def _build(self, target: Path) -> None:
        import torch

        compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
        if compiler is None:
            raise OSError("no C++ compiler was found")
        nvcc = None if mode("DMOE_CUDA") == "off" else find_nvcc()
        if nvcc is None and mode("DMOE_CUDA") == "required":
            raise OSError("DMOE_CUDA=required, but nvcc was not found on PATH or under CUDA_HOME")
        archs = [arch for arch in os.environ.get("DMOE_CUDA_ARCHS", "80;90;100").split(";") if arch] if nvcc else []

        package = Path(torch.__file__).parent
        include = package / "include"
        common = [f"-I{include}", f"-I{CSRC.name}", f"-DTORCH_TARGET_VERSION={TORCH_FLOOR}", "-O3", "-std=c++17"]
        told = f'-DDMOE_CUDA_ARCHS="{" ".join("sm_" + arch for arch in archs)}"'
        host = [compiler, *common, "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter"]
        device = [str(nvcc), *common, "-Xcompiler", "-fPIC,-fvisibility=hidden", "--expt-relaxed-constexpr"]
        for arch in archs:
            device += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
        if archs:  # PTX of the newest one, so that a GPU newer than the list runs too
            device += ["-gencode", f"arch=compute_{archs[-1]},code=compute_{archs[-1]}"]

        # Only one source hears of the architectures: the other objects serve builds with and without CUDA.
        jobs: list[tuple[list[str], Path]] = []
        for source in sorted(CSRC.glob("*.cpp")):
            jobs.append(([*host, told] if source.stem == "build_info" else host, source))
        if nvcc:
            jobs += [(device, source) for source in sorted(CSRC.glob("*.cu"))]
        jobs.sort(key=lambda job: job[1].suffix != ".cu")  # the slow ones first
        objects = ROOT / "build" / "objects"  # not build_temp: pip throws that away, and nvcc is slow
        objects.mkdir(parents=True, exist_ok=True)
        workers = int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))
        with ThreadPoolExecutor(workers) as pool:
            built = list(pool.map(lambda job: self._compile(job[0], job[1], objects), jobs))

        target.parent.mkdir(parents=True, exist_ok=True)
        # nvcc links when it compiled: it knows where its own runtime lies, and puts it in statically.
        link = [nvcc, "-ccbin", compiler, "-cudart", "static", "-Xlinker", "-s"] if nvcc else [compiler, "-s"]
        libraries = [f"-L{package / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
        self._run([*link, "-shared", "-o", str(target.resolve()), *map(str, built), *libraries])

    def _compile(self, command: list[str], source: Path, objects: Path) -> Path:
        """One object file; kept from an earlier build when neither the command nor any text it includes changed."""
        digest = hashlib.sha256(" ".join(command).encode())
        for text in [source, *sorted(CSRC.glob("*.h")), *sorted(CSRC.glob("*.cuh"))]:
            digest.update(text.read_bytes())
        target = objects / f"{source.stem}{source.suffix.replace('.', '_')}-{digest.hexdigest()[:16]}.o"
        if not target.exists():
            partial = target.with_suffix(f".{os.getpid()}.o")
            # Relative to the root, so that objects and the paths inside them are the same wherever the sources lie.
            self._run([*command, "-c", str(source.relative_to(ROOT)), "-o", str(partial)])
            partial.replace(target)  # an interrupted compile leaves no object that looks finished
        return target

    @staticmethod
    def _run(command: list[str]) -> None:
        print(" ".join(command), flush=True)
        subprocess.run(command, check=True, cwd=ROOT)


class BuildInPlace(Distribution):
    """For a setuptools that refuses pyproject.toml: enough to compile the library beside the sources, and no more."""

    def parse_config_files(self, *_: object, **__: object) -> None:
        """Without pyproject.toml."""
        super().parse_config_files(filenames=[])


def build_in_place() -> dict[str, Any]:
    """What `setup` is told by a setuptools that is too old to make packages of this one."""
    if "build_ext" not in sys.argv:
        raise SystemExit(
            f"dmoe: installing needs setuptools >= {SETUPTOOLS_FLOOR}, got {setuptools.__version__}: run `pip install "
            "--upgrade setuptools`, or compile where the sources are: `python setup.py build_ext --inplace`"
        )
    return {"distclass": BuildInPlace, "cmdclass": {"build_ext": BuildLibrary}}


def build_packages() -> dict[str, Any]:
    """The same for all others."""
    from setuptools.command.bdist_wheel import bdist_wheel

    class PlatformWheel(bdist_wheel):
        """A wheel for any Python 3 on this platform: the library uses no Python ABI."""

        def get_tag(self) -> tuple[str, str, str]:
            """``py3-none-<platform>``."""
            return "py3", "none", super().get_tag()[2]

    return {"cmdclass": {"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel}}


old = int(setuptools.__version__.split(".")[0]) < SETUPTOOLS_FLOOR
setup(ext_modules=[Extension("dmoe._C", sources=[])], **(build_in_place() if old else build_packages()))
