"""What this installation of dmoe can do, what it lacks, and the command that adds it: ``dmoe.info()``.

``dmoe.info`` is the function; ``from dmoe.info import report`` gets the same facts as a dictionary.
"""

from __future__ import annotations

import json
import platform
import shutil
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from dmoe.ops import _library, _trust, _verdicts, products

_ROOT = Path(__file__).resolve().parent.parent
_OPTIONAL = {"triton": ("triton", "pytorch-triton"), "stk": ("stanford-stk",), "megatron-core": ("megatron-core",)}


@dataclass(frozen=True)
class Missing:
    """Something that this installation could have.

    Attributes:
        what: its name.
        effect: what its absence means.
        command: a shell command that adds it.
    """

    what: str
    effect: str
    command: str


def report() -> dict[str, Any]:
    """The facts behind :func:`info`.

    Returns:
        ``versions``: by name, dmoe, python, torch and those of triton, stk and megatron-core that are installed.
        ``library``: ``built``, and when not the ``reason``.
        ``cuda_archs``: what the CUDA half was compiled for, such as ``["sm_80", "sm_90"]``; empty without one.
        ``gpus``: ``name``, ``arch`` and ``memory_gib`` of each.
        ``operations``: by name and then ``CPU`` or ``CUDA``, who serves it: ``C++``, ``CUDA C++``, ``Triton`` or
        ``reference`` (plain PyTorch).
        ``cpu_products``: ``choices``, by dtype what its large products go through (measured now, where that was not
        before), and ``limits``, by dtype the GFLOP/s that the multiply-add units of one thread do; both empty without
        the library.
        ``kernels``: ``mode``, which is ``DMOE_CERTIFY``; ``certificates``, the file of verdicts for this machine;
        ``trusted``, how many kinds of calls it holds that are; ``refused``, by name why others are not.
        ``missing``: a list of :class:`Missing`.
    """
    archs = list(_library.cuda_archs())
    gpus = _gpus()
    own = sys.modules["dmoe"].__version__  # not the distribution's: a checkout on the path has none
    versions = {"dmoe": own, "python": platform.python_version(), "torch": torch.__version__}
    for name, distributions in _OPTIONAL.items():
        version = next(filter(None, map(_version, distributions)), None)
        if version is not None:
            versions[name] = version
    return {
        "versions": versions,
        "library": {"built": _library.compiled, "reason": _library.missing_reason},
        "cuda_archs": archs,
        "gpus": gpus,
        "operations": {name: dict(served) for name, served in sorted(_library.backends.items())},
        "cpu_products": _cpu_products(),
        "kernels": _certificates(),
        "missing": _missing(archs, gpus, versions),
    }


def info() -> None:
    """Print versions, what is built and for which GPUs, who serves which operation, and how to add what is missing."""
    facts = report()
    archs = facts["cuda_archs"]
    cpu = "C++" if facts["library"]["built"] else f"plain PyTorch ({facts['library']['reason']})"
    gpus = [f"{gpu['name']} ({gpu['arch']}, {gpu['memory_gib']:.0f} GiB)" for gpu in facts["gpus"]]
    lines = [
        ("versions", ", ".join(f"{name} {version}" for name, version in facts["versions"].items())),
        ("CPU", cpu),
        ("CUDA", f"C++ for {', '.join(archs)}" if archs else "no compiled operations"),
        ("GPU", ", ".join(gpus) or "none that torch can use"),
    ]
    for device in ("CPU", "CUDA"):
        groups: dict[str, list[str]] = {}
        for name, served in facts["operations"].items():
            groups.setdefault(served[device], []).append(name)
        lines += [(f"{device} ops: {kind}", ", ".join(names)) for kind, names in sorted(groups.items())]
    lines += _lines_of_products(facts["cpu_products"])
    kernels = facts["kernels"]
    if gpus:
        told = {"0": "all trusted unseen (DMOE_CERTIFY=0)"}
        lines.append(
            ("kernels", told.get(kernels["mode"], f"{kernels['trusted']} certified, {kernels['certificates']}"))
        )
    lines += [(f"refused: {part}", reason) for part, reason in kernels["refused"].items()]
    width = max(len(title) for title, _ in lines)
    for title, text in lines:
        print(_wrapped(title, text, width))
    for missing in facts["missing"]:
        print(f"\nmissing: {missing.what}. {missing.effect}\n  {missing.command}")
    if not facts["missing"]:
        print("\nnothing is missing")


def _cpu_products() -> dict[str, Any]:
    """How this processor multiplies."""
    limits = {dtype: products.multiply_add_limit(dtype) for dtype in ("float32", "bfloat16")}
    return {
        "choices": {dtype: choice._asdict() for dtype, choice in products.product_choices().items()},
        "limits": {dtype: limit for dtype, limit in limits.items() if limit is not None},
    }


def _lines_of_products(facts: dict[str, Any]) -> list[tuple[str, str]]:
    lines = []
    for dtype, choice in facts["choices"].items():
        ours = choice["way"] == "blocked"
        taken, other = ("dmoe's kernels", "PyTorch's library") if ours else ("PyTorch's library", "dmoe's kernels")
        speeds = [choice["blocked_gflops"], choice["library_gflops"]][:: 1 if ours else -1]
        limit = facts["limits"].get(dtype)
        most = "" if limit is None else f"; at most {limit:.0f}"
        measured = f", {speeds[0]:.0f} GFLOP/s a thread ({other}: {speeds[1]:.0f}{most})" if any(speeds) else ""
        lines.append((f"CPU products: {dtype}", taken + measured))
    return lines


def _certificates() -> dict[str, Any]:
    """What is known of the kernels' trust on this machine."""
    path = _verdicts.path_of(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    verdicts = _verdicts.read(path).values()
    refused = {verdict["part"]: verdict["refused"] for verdict in verdicts if verdict["refused"]}
    trusted = sum(not verdict["refused"] for verdict in verdicts)
    found = {"mode": _trust.mode(), "certificates": str(path), "trusted": trusted}
    return {**found, "refused": {**refused, **_trust.refused}}


def _wrapped(title: str, text: str, width: int, columns: int = 110) -> str:
    """A title, and text in a column beside it, broken between words."""
    lines, line = [], ""
    for word in text.split():
        if line and width + 2 + len(line) + 1 + len(word) > columns:
            lines.append(line)
            line = ""
        line = f"{line} {word}" if line else word
    return f"{title:{width}}  " + ("\n" + " " * (width + 2)).join([*lines, line])


def _version(distribution: str) -> str | None:
    """An installed version, without importing it."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        arch = f"sm_{properties.major}{properties.minor}"
        found.append({"name": properties.name, "arch": arch, "memory_gib": properties.total_memory / 2**30})
    return found


def _missing(archs: list[str], gpus: list[dict[str, Any]], versions: dict[str, str]) -> list[Missing]:
    found = []
    compiler = "" if _has_compiler() else "apt-get install -y g++ && "
    nvcc = "" if _has_nvcc() else "apt-get install -y nvidia-cuda-toolkit && "
    if not _library.compiled:
        effect = "Routing and experts run in plain PyTorch, several times slower on the CPU."
        found.append(Missing("the compiled operations", effect, f"{compiler}DMOE_BUILD=required {_reinstall()}"))
    if not archs:
        effect = "On a GPU the operations that have no Triton kernel run in plain PyTorch."
        command = f"{compiler}{nvcc}DMOE_CUDA=required {_reinstall()}"
        found.append(Missing("the compiled operations for CUDA", effect, command))
    for gpu in gpus if archs else []:
        if not _runs_on(archs, gpu["arch"]):
            number = gpu["arch"].removeprefix("sm_")
            effect = f"The {gpu['name']} has no kernels among {', '.join(archs)}."
            command = f"{nvcc}DMOE_CUDA=required DMOE_CUDA_ARCHS={number} {_reinstall()}"
            found.append(Missing(f"kernels for {gpu['arch']}", effect, command))
    if "triton" not in versions:
        found.append(Missing("triton", "GPU kernels that are written in it are not used.", f"{_pip()} install triton"))
    if not gpus and torch.version.cuda is None and torch.version.hip is None and Path("/dev/nvidia0").exists():
        command = f"{_pip()} install --force-reinstall torch"
        found.append(
            Missing("a CUDA build of torch", "This machine has an NVIDIA GPU, and its torch is for CPUs.", command)
        )
    return found


def _runs_on(archs: list[str], gpu: str) -> bool:
    """Code for sm_XY runs on sm_XZ with Z >= Y; the newest one's PTX, which is always built, on everything after it."""
    compute = [int(arch.removeprefix("sm_")) for arch in archs]
    wanted = int(gpu.removeprefix("sm_"))
    same_major = any(arch <= wanted and arch // 10 == wanted // 10 for arch in compute)
    return same_major or wanted >= compute[-1]


def _has_compiler() -> bool:
    return any(shutil.which(name) for name in ("g++", "clang++", "c++"))


def _has_nvcc() -> bool:
    return shutil.which("nvcc") is not None


def _pip() -> str:
    return f"{sys.executable} -m pip"


def _reinstall() -> str:
    """The command that builds ``csrc/`` of this very installation again."""
    if (_ROOT / "setup.py").exists():
        return f"{_pip()} install --no-build-isolation --no-deps -e {_ROOT}"
    source = "dmoe"
    try:
        origin = json.loads(metadata.distribution("dmoe").read_text("direct_url.json") or "{}").get("url", "")
    except metadata.PackageNotFoundError:
        origin = ""
    path = Path(origin.removeprefix("file://"))
    if origin.startswith("file://") and path.is_dir():
        source = str(path)
    elif origin and path.suffix != ".whl":
        source = f"'dmoe @ {origin}'"
    return f"{_pip()} install --no-build-isolation --no-deps --force-reinstall --no-binary dmoe {source}"
