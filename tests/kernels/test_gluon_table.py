"""What the compiler makes of the Gluon kernels for Hopper, in every recorded Triton."""

from __future__ import annotations

import json

import gluon_table
import kernel_table
import pytest

SHARED = 232_448  # bytes of one program, on Hopper


@pytest.mark.slow
def test_gluon_kernels_compile_without_spills_as_recorded():
    """In this Triton; what differs wants a look and ``python tests/support/gluon_table.py --write``."""
    triton = pytest.importorskip("triton")
    pytest.importorskip("triton.experimental.gluon")
    table = json.loads(kernel_table.compiling_process(gluon_table.__file__, "--changed"))
    recorded = json.loads(gluon_table.TABLE.read_text())
    assert not [(case, row) for case, rows in table.items() for row in rows if row["spilled"] or row["shared"] > SHARED]
    if triton.__version__ not in recorded:
        pytest.skip(f"the table was recorded with Triton {', '.join(recorded)}, this is {triton.__version__}")
    # Nothing is compiled again for other numbers of tokens and experts.
    assert table["30B, other numbers of tokens and experts"] == table["30B"]
    exact = ("kernel", "registers", "shared", "warps", "uses", "setmaxnreg")
    for case, rows in recorded[triton.__version__].items():
        for before, now in zip(rows, table[case], strict=True):
            assert {key: now[key] for key in exact} == {key: before[key] for key in exact}, case
            for key in ("consumer step", "producer step", "instructions"):
                assert now[key] <= before[key] * 1.1, (case, now["kernel"], key)


def test_what_is_recorded_runs_on_hopper():
    import gluon_cases

    recorded = json.loads(gluon_table.TABLE.read_text())
    assert {version.rsplit(".", 1)[0] for version in recorded} >= {"3.6", "3.9"}
    for version, table in recorded.items():
        assert set(table) == set(gluon_cases.CASES), version
        for case, rows in table.items():
            for row in rows:
                where = f"{version}, {case}, {row['kernel']}"
                assert row["spilled"] == 0, where
                assert row["shared"] <= SHARED, where
                assert row["warps"] == 12, where
                assert row["registers"] * 32 * row["warps"] <= 65536, where
                assert "wgmma" in row["uses"], where
                assert {"tma", "cp.async"} & set(row["uses"]), where


def test_recorded_are_the_launches_of_the_cases(monkeypatch):
    pytest.importorskip("triton.experimental.gluon")
    import gluon_cases

    monkeypatch.setenv("DMOE_GLUON", "1")
    for table in json.loads(gluon_table.TABLE.read_text()).values():
        for case, run in gluon_cases.CASES.items():
            with kernel_table.counting() as names:
                run()
            assert [name for name in names if name.startswith("gluon_")] == [row["kernel"] for row in table[case]]


def test_loops_are_the_innermost():
    lines = [".L_x_1:", " /*0000*/ A ;", ".L_x_2:", " /*0010*/ HGMMA ;", " /*0020*/ @P0 BRA `(.L_x_2) ;",
             " /*0030*/ BRA `(.L_x_1) ;", " /*0040*/ HGMMA ;"]  # fmt: skip
    assert gluon_table.loops(lines) == [(2, 4), (0, 5)]
    assert gluon_table.per_step(lines, "HGMMA", "HGMMA") == 2
