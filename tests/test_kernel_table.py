"""What the compiler makes of every kernel that can be dispatched, for GPUs that need not be there."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import kernel_table
import pytest


@pytest.mark.slow
@pytest.mark.parametrize("arch", kernel_table.ARCHITECTURES)
def test_kernels_compile_without_spills_as_recorded(arch):
    """Registers may grow by 8 on another compiler's whim; what is more, or another way to memory, wants a look and
    ``python tests/kernel_table.py --write``."""
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
