"""What the compiler makes of every kernel that can be dispatched, for GPUs that need not be there."""

from __future__ import annotations

import ast
import json
import types

import front_end
import kernel_table
import machine_code
import pytest


@pytest.mark.slow
@pytest.mark.parametrize("arch", kernel_table.ARCHITECTURES)
def test_kernels_compile_without_spills_as_recorded(arch):
    """Registers may grow by 8 on another compiler's whim; what is more, or another way to memory, wants a look and
    ``python tests/support/kernel_table.py --write``."""
    triton = pytest.importorskip("triton")
    table = json.loads(kernel_table.compiling_process(kernel_table.__file__, "--arch", str(arch), "--changed"))

    spilled = {(case, row["kernel"]): row["spilled"] for case, rows in table.items() for row in rows if row["spilled"]}
    assert not spilled
    recorded = kernel_table.recorded()
    if triton.__version__ not in recorded:
        pytest.skip(f"tables are recorded for Triton {', '.join(recorded)}, this is {triton.__version__}")
    recorded = recorded[triton.__version__]
    assert {case: [r["kernel"] for r in rows] for case, rows in table.items()} == {
        case: [r["kernel"] for r in rows] for case, rows in recorded[f"sm_{arch}"].items()
    }
    for case, rows in recorded[f"sm_{arch}"].items():
        for before, now in zip(rows, table[case], strict=True):
            where = f"{case}, {now['kernel']} on sm_{arch}"
            assert now["registers"] <= before["registers"] + 8, where
            assert now["shared"] <= before["shared"], where
            assert now["uses"] == before["uses"], where
            assert now["ctas"] >= before["ctas"], where
            assert (now["steps"] or 0) <= 1.1 * (before["steps"] or 0), where


ONLY_WHAT_DIFFERS = """
import sys
from triton import compiler
import front_end, kernel_cases, kernel_table

class Asked(Exception):
    pass

def asked(src, **others):
    raise Asked(src.name)

def table_of(rows):
    with front_end.instead_of_compiling(rows):
        return kernel_table.rows_of({case: kernel_cases.CASES[case]}, 90, None)[case]

compiler.compile = asked
case = "fp8_gemm"
rows = kernel_table.recorded()[sys.argv[1]]["sm_90"][case]
if sys.argv[2] == "changed":
    rows = [row | {"source": row["source"][::-1]} if row["kernel"] == "fp8_rows_kernel" else row for row in rows]
try:
    assert table_of(rows) == rows
except Asked as name:
    print(name)
"""


def test_what_is_given_to_the_compiler_decides_whether_it_is_asked():
    """A kernel whose source is another than the recorded one's is compiled, and nothing else."""
    triton = pytest.importorskip("triton")
    if triton.__version__ not in kernel_table.recorded():
        pytest.skip(f"no table of Triton {triton.__version__}")
    for how, asked in (("as recorded", []), ("changed", ["fp8_rows_kernel"])):
        told = kernel_table.compiling_process("-c", ONLY_WHAT_DIFFERS, triton.__version__, how)
        assert told.split() == asked


def test_every_kernel_has_its_day(monkeypatch):
    monkeypatch.delenv("DMOE_KERNELS", raising=False)
    rows = [{"source": f"{number:016x}"} for number in range(100)]
    left_out = [
        row for day in range(front_end.PARTS) for row in rows if row not in front_end.unchanged({"case": rows}, day)
    ]
    assert sorted(row["source"] for row in left_out) == [row["source"] for row in rows]
    monkeypatch.setenv("DMOE_KERNELS", "all")
    assert front_end.unchanged({"case": rows}) == []


every_version = pytest.mark.parametrize("version", sorted(kernel_table.recorded()))


def test_two_versions_are_recorded():
    """The oldest that is supported, and the one that is developed with."""
    assert set(kernel_table.recorded()) == {"3.6.0", "3.9.0"}
    assert kernel_table.TABLE.read_text() == kernel_table.as_text(kernel_table.recorded())


@every_version
def test_main_path_uses_what_the_chip_has(version):
    """The committed table says that Hopper's big kernels gather asynchronously, copy by TMA and multiply by wgmma, one
    product not waiting for the one before."""
    recorded = kernel_table.recorded()[version]
    for case in ("expert_mlp: gated", "expert_mlp: short sums"):
        features = {row["kernel"]: set(row["uses"]) for row in recorded["sm_90"][case]}
        for kernel in ("up_kernel", "hidden_grad_kernel", "weight_grad_kernel"):
            assert features[kernel] == {"cp.async", "tma", "wgmma"}
        assert features["rows_kernel"] == {"tma", "wgmma"}
    blackwell = {row["kernel"]: set(row["uses"]) for row in recorded["sm_100"]["expert_mlp: gated"]}
    assert all("tcgen05" in uses for name, uses in blackwell.items() if name != "combine_kernel")
    ampere = [row for row in recorded["sm_80"]["expert_mlp: gated"] if row["kernel"] != "combine_kernel"]
    assert all(set(row["uses"]) == {"cp.async", "mma"} for row in ampere)


@every_version
def test_fp8_is_multiplied_as_fp8(version):
    """By wgmma on Hopper and tcgen05 on Blackwell, both factors by TMA; and by nothing on Ampere, which has none."""
    recorded = kernel_table.recorded()[version]

    def features(arch):
        return [set(row["uses"]) for row in recorded[arch]["fp8_gemm"] if row["kernel"] == "fp8_rows_kernel"]

    assert features("sm_90") == [{"tma", "wgmma", "one by one"}] * 2  # each step's sum goes to float32
    assert features("sm_100") == [{"tma", "tcgen05"}] * 2
    assert features("sm_80") == []


@every_version
def test_two_programs_decode_and_multiply_by_turns(version):
    """On Hopper a step of quantised weights decodes before it multiplies; another program multiplies meanwhile."""
    for case in ("int8", "fp8", "int4 of 128", "int4 of 32 with zero points", "nf4", "nf4, rank 16", "mxfp4"):
        for row in kernel_table.recorded()[version]["sm_90"][f"quantized_gemm: {case}"]:
            assert row["ctas"] == 2
            assert {"wgmma", "tma"} <= set(row["uses"])


@every_version
def test_two_programs_share_a_multiprocessor_where_the_launch_asks_for_it(version):
    short = {row["kernel"]: row for row in kernel_table.recorded()[version]["sm_90"]["expert_mlp: short sums"]}
    assert {kernel for kernel, row in short.items() if row["ctas"] >= 2} >= {"rows_kernel", "hidden_grad_kernel"}


@every_version
def test_what_serves_ampere_fits_the_cards_with_99_kilobytes(version):
    """A100's launch shapes serve consumer cards too, whose multiprocessors have less shared memory."""
    recorded = kernel_table.recorded()[version]["sm_80"]
    largest = {f"{case}, {row['kernel']}": row["shared"] for case, rows in recorded.items() for row in rows}
    assert {where: size for where, size in largest.items() if size > 99 * 1024} == {}


@every_version
def test_table_names_every_kernel_and_every_case(version):
    """What is new, or renamed, is compiled and recorded; nothing recorded spills."""
    pytest.importorskip("triton")
    import kernel_cases

    recorded = kernel_table.recorded()[version]
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
        without = {"fp8_rows_kernel"} if arch < 89 else set()
        assert {row["kernel"] for rows in table.values() for row in rows} == kernels - without
        assert not [(case, row) for case, rows in table.items() for row in rows if row["spilled"]]


@every_version
@pytest.mark.parametrize("arch", kernel_table.ARCHITECTURES)
def test_cases_launch_what_is_recorded(arch, version):
    """In the recorded order, with the recorded warps: without compiling, so that it is found out at once."""
    pytest.importorskip("triton")
    import kernel_cases

    from dmoe.kernels import _launch, offline

    recorded, launched = kernel_table.recorded()[version][f"sm_{arch}"], []

    def note(kernel, grid, *_, **options):
        if all(grid):
            launched.append((kernel.__name__, options.get("num_warps", 4)))

    with offline.instead_of_launching(note), offline.swapped(_launch.capability, lambda device: arch):
        for name, run in kernel_cases.CASES.items():
            launched.clear()
            run()
            assert launched == [(row["kernel"], row["warps"]) for row in recorded[name]], name


SASS = """
.text.kernel:
        /*0000*/                   MOV R1, R2 ;
.L_x_0:
        /*0010*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR5], R1 ;
        /*0020*/              @!P0 BRA `(.L_x_3) ;
.L_x_1:
        /*0030*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR12], R24, gsb0 ;
        /*0040*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0050*/               @P1 BRA `(.L_x_2) ;
        /*0060*/                   STG.E [R2], R4 ;
        /*0070*/                   STG.E [R2], R4 ;
.L_x_2:
        /*0080*/               @P2 BRA `(.L_x_0) ;
        /*0090*/                   EXIT ;
.L_x_3:
        /*00a0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR5], R1 ;
        /*00b0*/              @!P0 BRA `(.L_x_3) ;
        /*00c0*/                   BRA `(.L_x_1) ;
"""


def test_a_step_is_the_shortest_way_round_the_products():
    """Neither waiting nor what happens between two tiles is in it."""
    step = machine_code.main_loop(SASS)
    names = [instruction.split(".")[0].split()[0] for instruction in step]
    assert sorted(names) == ["BRA", "BRA", "BRA", "HGMMA", "SYNCS", "WARPGROUP"]
    assert not machine_code.one_by_one(step)
    assert machine_code.one_by_one(machine_code.main_loop(SASS.replace("gsb0, 0x1", "gsb0, 0x0")))
    assert machine_code.main_loop(SASS.replace("HGMMA", "FFMA")) is None
    assert machine_code.main_loop(SASS.replace("@P2 BRA `(.L_x_0)", "@P2 EXIT")) is None


@pytest.mark.parametrize(
    ("arch", "registers", "warps", "shared", "columns", "programs"),
    [
        (90, 128, 8, 98_328, 0, 2),
        (90, 129, 8, 98_328, 0, 1),  # registers
        (90, 128, 8, 116_000, 0, 1),  # shared memory: 1 KB of each program is the system's
        (90, 32, 32, 0, 0, 2),  # threads
        (90, 16, 1, 0, 0, 32),
        (80, 64, 4, 81_920, 0, 2),
        (80, 64, 4, 83_968, 0, 1),
        (100, 64, 4, 0, 256, 2),  # tensor memory
    ],
)
def test_programs_of_a_multiprocessor(arch, registers, warps, shared, columns, programs):
    assert machine_code.side_by_side(arch, registers, warps, shared, columns) == programs


def test_resources_count_what_leaves_the_registers(monkeypatch):
    told = {
        "cuobjdump": " Function up_kernel:\n  REG:168 STACK:16 SHARED:1024 LOCAL:8 CONSTANT[0]:1 TEXTURE:0\n",
        "nvdisasm": SASS,
    }
    monkeypatch.setattr(machine_code, "told_about", lambda cubin, tool, *options: told[tool])
    compiled = types.SimpleNamespace(
        asm={"cubin": b"", "ptx": "wgmma.mma_async.sync; cp.async.bulk.tensor.2d"},
        metadata=types.SimpleNamespace(shared=1024, num_warps=8),
    )
    assert kernel_table.resources(compiled, 90) == {
        "registers": 168,
        "spilled": 24,
        "shared": 1024,
        "warps": 8,
        "ctas": 1,
        "steps": 6,
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
