"""What the compiler makes of every kernel that can be dispatched, for GPUs that need not be there."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import types

import kernel_table
import pytest


@pytest.mark.slow
@pytest.mark.parametrize("arch", kernel_table.ARCHITECTURES)
def test_kernels_compile_without_spills_as_recorded(arch):
    """Registers may grow by 8 on another compiler's whim; what is more, or another way to memory, wants a look and
    ``python tests/support/kernel_table.py --write``."""
    triton = pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(kernel_table.ROOT), environment.get("PYTHONPATH")]))
    command = [sys.executable, kernel_table.__file__, "--arch", str(arch)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    table = json.loads(done.stdout)

    spilled = {(case, row["kernel"]): row["spilled"] for case, rows in table.items() for row in rows if row["spilled"]}
    assert not spilled
    recorded = json.loads(kernel_table.TABLE.read_text())
    assert {case: [r["kernel"] for r in rows] for case, rows in table.items()} == {
        case: [r["kernel"] for r in rows] for case, rows in recorded[f"sm_{arch}"].items()
    }
    if triton.__version__ != recorded["triton"]:
        pytest.skip(f"the table was recorded with Triton {recorded['triton']}, this is {triton.__version__}")
    for case, rows in recorded[f"sm_{arch}"].items():
        for before, now in zip(rows, table[case], strict=True):
            where = f"{case}, {now['kernel']} on sm_{arch}"
            assert now["registers"] <= before["registers"] + 8, where
            assert now["shared"] <= before["shared"], where
            assert now["uses"] == before["uses"], where


def test_main_path_uses_what_the_chip_has():
    """The committed table says that Hopper's big kernels gather asynchronously, copy by TMA and multiply by wgmma."""
    recorded = json.loads(kernel_table.TABLE.read_text())
    features = {row["kernel"]: set(row["uses"]) for row in recorded["sm_90"]["expert_mlp: gated"]}
    assert features["up_kernel"] == features["hidden_grad_kernel"] == {"cp.async", "tma", "wgmma"}
    assert features["rows_kernel"] == {"tma", "wgmma"}
    assert features["weight_grad_kernel"] == {"cp.async", "wgmma"}
    blackwell = {row["kernel"]: set(row["uses"]) for row in recorded["sm_100"]["expert_mlp: gated"]}
    assert all("tcgen05" in uses for name, uses in blackwell.items() if name != "combine_kernel")
    ampere = [row for row in recorded["sm_80"]["expert_mlp: gated"] if row["kernel"] != "combine_kernel"]
    assert all(set(row["uses"]) == {"cp.async", "mma"} for row in ampere)


def test_what_serves_ampere_fits_the_cards_with_99_kilobytes():
    """A100's launch shapes serve consumer cards too, whose multiprocessors have less shared memory."""
    recorded = json.loads(kernel_table.TABLE.read_text())["sm_80"]
    largest = {f"{case}, {row['kernel']}": row["shared"] for case, rows in recorded.items() for row in rows}
    assert {where: size for where, size in largest.items() if size > 99 * 1024} == {}


def test_table_names_every_kernel_and_every_case():
    """What is new, or renamed, is compiled and recorded; nothing recorded spills."""
    pytest.importorskip("triton")
    import kernel_cases

    recorded = json.loads(kernel_table.TABLE.read_text())
    sources = (kernel_table.ROOT / "dmoe" / "kernels").glob("*.py")
    sources = [path for path in sources if not path.name.startswith("gluon_")]  # these have a table of their own
    calls = [node for path in sources for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    first = [call.args[0] for call in calls if isinstance(call.func, ast.Name) and call.func.id == "launch"]
    kernels = {argument.id for argument in first if isinstance(argument, ast.Name)}
    assert len(first) > 10
    assert all(isinstance(argument, ast.Name) for argument in first)
    for arch in kernel_table.ARCHITECTURES:
        table = recorded[f"sm_{arch}"]
        assert set(table) == set(kernel_cases.CASES)
        assert {row["kernel"] for rows in table.values() for row in rows} == kernels
        assert not [(case, row) for case, rows in table.items() for row in rows if row["spilled"]]


@pytest.mark.parametrize("arch", kernel_table.ARCHITECTURES)
def test_cases_launch_what_is_recorded(arch, monkeypatch):
    """In the recorded order, with the recorded warps: without compiling, so that it is found out at once."""
    pytest.importorskip("triton")
    import kernel_cases

    from dmoe.kernels import _launch, offline

    recorded, launched = json.loads(kernel_table.TABLE.read_text())[f"sm_{arch}"], []

    def note(kernel, grid, *_, **options):
        if all(grid):
            launched.append((kernel.__name__, options.get("num_warps", 4)))

    with offline.instead_of_launching(note), offline.swapped(_launch.capability, lambda device: arch):
        for name, run in kernel_cases.CASES.items():
            launched.clear()
            run()
            assert launched == [(row["kernel"], row["warps"]) for row in recorded[name]], name


def test_resources_count_what_leaves_the_registers(monkeypatch):
    told = " Function up_kernel:\n  REG:168 STACK:16 SHARED:1024 LOCAL:8 CONSTANT[0]:1 TEXTURE:0\n"
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: types.SimpleNamespace(stdout=told))
    pytest.importorskip("triton.backends.nvidia")
    compiled = types.SimpleNamespace(
        asm={"cubin": b"", "ptx": "wgmma.mma_async.sync; cp.async.bulk.tensor.2d"},
        metadata=types.SimpleNamespace(shared=1024, num_warps=8),
    )
    assert kernel_table.resources(compiled) == {
        "registers": 168,
        "spilled": 24,
        "shared": 1024,
        "warps": 8,
        "uses": ["tma", "wgmma"],
    }


def test_an_empty_grid_is_no_launch():
    pytest.importorskip("triton")
    import dmoe.kernels._launch as module

    def some_kernel():
        raise AssertionError

    with kernel_table.counting() as names:
        module.launch(some_kernel, (3, 0))
        module.launch(some_kernel, (3, 1))
    assert names == ["some_kernel"]
    module.launch(some_kernel, (0,))
