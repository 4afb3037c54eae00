"""Large products (csrc/blocked_gemm.cpp): as exact as float32 sums rounded once, on each level of instructions.

And which way a processor takes (csrc/product_choice.cpp): measured once, kept, and told.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import blocked_cases
import pytest
import torch
from few_rows_cases import DTYPES, LEVELS, offsets_of, random
from patience import PATIENCE

import dmoe
from dmoe.info import report
from dmoe.ops import products
from dmoe.ops._library import compiled
from dmoe.ops.grouped_gemm import grouped_gemm

pytestmark = pytest.mark.skipif(not compiled, reason="csrc/ is not built")
SAY = "import json; from dmoe.ops import products; print(json.dumps(products.product_choices()))"


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join([str(Path(blocked_cases.__file__).parent), os.environ.get("PYTHONPATH", "")])
    plain = {name: value for name, value in os.environ.items() if name != "DMOE_CPU_PRODUCTS"}
    return plain | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | more


def started(**more: str) -> subprocess.Popen[str]:
    """A process that says its choices."""
    return subprocess.Popen(
        [sys.executable, "-c", SAY], env=environment(**more), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def choices(**more: str) -> dict[str, list]:
    out, error = (process := started(**more)).communicate(timeout=PATIENCE)
    assert process.returncode == 0, error
    return json.loads(out)


@pytest.mark.parametrize("level", LEVELS if platform.machine() == "x86_64" else ["as it comes"])
def test_every_level_sums_in_float32_and_rounds_once(level):
    told = LEVELS[level] | {"DMOE_CPU_PRODUCTS": "blocked"}
    run = subprocess.run(
        [sys.executable, blocked_cases.__file__],
        env=environment(**told),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == []


def test_the_library_serves_where_it_is_told_to():
    run = subprocess.run(
        [sys.executable, blocked_cases.__file__],
        env=environment(DMOE_CPU_PRODUCTS="library"),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert run.returncode == 0, run.stderr
    # Where half precision is emulated PyTorch's sums are what they are; float32 is held to the bound.
    assert [fault for fault in json.loads(run.stdout) if "float32" in fault] == []


@pytest.mark.skipif(
    compiled and any(choice.way != "blocked" for choice in products.product_choices().values()),
    reason="the library is faster on this processor",
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("trans_b", [True, False])
def test_a_row_has_the_same_bits_among_any_others(trans_b, dtype):
    a, b = random(150, 300, dtype=dtype, seed=0), random(1, 300, 130, dtype=dtype, seed=1)
    b = b.mT.contiguous() if trans_b else b
    whole = grouped_gemm(a, b, offsets_of([150]), trans_b=trans_b)
    for first, rows in ((0, 40), (7, 101), (50, 100)):
        part = grouped_gemm(a[first : first + rows], b, offsets_of([rows]), trans_b=trans_b)
        assert torch.equal(part, whole[first : first + rows])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("trans_b", [True, False])
def test_nan_and_infinity_stay_in_their_row_and_their_column(trans_b, dtype):
    a, b = random(70, 90, dtype=dtype, seed=1), random(1, 50, 90, dtype=dtype, seed=2)
    a[69, 89], b[0, 49, 3], a[5, 7] = torch.nan, torch.nan, torch.inf
    got = grouped_gemm(a, b if trans_b else b.mT.contiguous(), offsets_of([70]), trans_b=trans_b)
    strange = torch.zeros(70, 50, dtype=torch.bool)
    strange[69], strange[:, 49] = True, True
    assert torch.equal(got.isnan(), strange)
    assert torch.equal(got[5, :49].isinf(), torch.ones(49, dtype=torch.bool))
    assert got[:69, :49].isinf().sum() == 49


def test_a_choice_is_measured_once_and_kept(tmp_path):
    folder = tmp_path / "not there yet"
    together = [started(DMOE_CACHE_DIR=str(folder)) for _ in range(3)]
    said = [process.communicate(timeout=PATIENCE)[0] for process in together]
    assert said[0] == said[1] == said[2]
    (file,) = folder.iterdir()
    lines = [line.split() for line in file.read_text().splitlines()]
    assert [line[0] for line in lines] == list(products.DTYPES)  # one each, though three began at once
    for name, way, ours, library in lines:
        assert json.loads(said[0])[name] == [way, float(ours), float(library)]
        assert way == ("blocked" if float(ours) * 1.25 >= float(library) else "library")

    file.write_text("float32 library 1.5 2.5\n\x00garbage\nbfloat16 sideways 1 2\nfloat16 blocked x y\n")
    read = choices(DMOE_CACHE_DIR=str(folder))
    assert read["float32"] == ["library", 1.5, 2.5]  # what stands there, not a new measurement
    assert read["bfloat16"][1] > 0
    assert read["float16"][1] > 0
    assert file.read_text().startswith("float32 library 1.5 2.5\n")

    other = choices(DMOE_CACHE_DIR=str(folder), ATEN_CPU_CAPABILITY="default")
    assert other["float32"] != ["library", 1.5, 2.5]
    assert len(list(folder.iterdir())) == 2  # of another processor, for all that anybody can tell


def test_without_a_place_to_keep_it_every_process_measures(tmp_path):
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    assert choices(DMOE_CACHE_DIR=str(in_the_way))["float32"][1] > 0
    assert in_the_way.read_text() == ""


def test_being_told_needs_no_measurement(tmp_path):
    for way in ("blocked", "library"):
        assert choices(DMOE_CPU_PRODUCTS=way, DMOE_CACHE_DIR=str(tmp_path)) == {
            key: [way, 0, 0] for key in products.DTYPES
        }
    assert not list(tmp_path.iterdir())
    _, error = started(DMOE_CPU_PRODUCTS="fast").communicate(timeout=PATIENCE)
    assert "DMOE_CPU_PRODUCTS: expected blocked or library, got fast" in error


def test_info_tells_the_way_and_the_limit(capsys):
    dmoe.info()
    assert "CPU products" in capsys.readouterr().out
    facts = report()["cpu_products"]
    assert set(facts["choices"]) == set(products.DTYPES)
    assert facts["limits"]["bfloat16"] > 0.5 * facts["limits"]["float32"] > 0


def test_the_limit_refuses_what_it_does_not_measure():
    with pytest.raises(RuntimeError, match="multiply_add_limit: dtype: expected float32 or bfloat16, got int8"):
        products.multiply_add_limit("int8")
    with pytest.raises(RuntimeError, match="product_choice: dtype: expected float32, bfloat16 or float16, got int8"):
        torch.ops.dmoe.product_choice("int8")
