"""sort against Python's own stable sort."""

from __future__ import annotations

import pytest
import torch
from helpers import on_threads
from hypothesis import given, settings
from hypothesis import strategies as st

from dmoe.ops.sort import sort, sort_ref

BITS = {torch.int16: 15, torch.int32: 31, torch.int64: 63}


def reference(keys, end_bit=None):
    return sort_ref(keys, BITS[keys.dtype] if end_bit is None else end_bit)


implementations = pytest.mark.parametrize("sorts", [sort, reference], ids=["op", "ref"])


def assert_sorted(sorts, keys, end_bit=None):
    values = keys.tolist()
    modulus = 2 ** (BITS[keys.dtype] if end_bit is None else end_bit)
    expected = sorted(range(len(values)), key=lambda i: values[i] % modulus)  # Python's sort is stable
    sorted_keys, permutation = sorts(keys, end_bit)
    assert permutation.dtype == torch.int32
    assert sorted_keys.dtype == keys.dtype
    assert permutation.tolist() == expected
    assert sorted_keys.tolist() == [values[i] for i in expected]


@st.composite
def key_tensors(draw):
    dtype = draw(st.sampled_from(list(BITS)))
    bits = BITS[dtype]
    low = draw(st.integers(0, bits))
    high = draw(st.integers(low, bits))  # keys differ in bits low .. high only, above a common base
    base = draw(st.integers(0, 2**bits - 1)) & ~(2**high - 1)
    parts = st.integers(0, 2 ** (high - low) - 1)
    keys = draw(
        st.lists(parts, max_size=60) | st.lists(st.sampled_from(draw(st.lists(parts, min_size=1))), max_size=60)
    )
    return torch.tensor([base | (key << low) for key in keys], dtype=dtype)


@implementations
@settings(max_examples=60)
@given(keys=key_tensors(), data=st.data())
def test_equals_python_sort(sorts, keys, data):
    assert_sorted(sorts, keys, data.draw(st.none() | st.integers(1, BITS[keys.dtype])))


@implementations
@pytest.mark.parametrize("dtype", list(BITS))
@pytest.mark.parametrize("end_bit", [None, 3, 9])
def test_runs_of_several_threads(sorts, dtype, end_bit):
    keys = torch.randint(0, 2 ** BITS[dtype] - 1, (50_001,), generator=torch.Generator().manual_seed(0), dtype=dtype)
    for count in (1, 2, 5):
        with on_threads(count):
            assert_sorted(sorts, keys, end_bit)


@implementations
def test_extremes_and_views(sorts):
    for dtype, bits in BITS.items():
        assert_sorted(sorts, torch.empty(0, dtype=dtype))
        assert_sorted(sorts, torch.tensor([2**bits - 1, 0, 2**bits - 1, 2 ** (bits - 1)], dtype=dtype))
        assert_sorted(sorts, torch.full((9,), 77, dtype=dtype))
        assert_sorted(sorts, torch.randint(0, 9, (40, 3), dtype=dtype)[:, 1])


@implementations
def test_negative_key_is_named(sorts):
    for dtype in BITS:
        keys = torch.ones(20_000, dtype=dtype)
        keys[12_345] = -6
        keys[15_000] = -7
        with pytest.raises(RuntimeError, match=r"keys\[12345\]: expected at least 0, got -6"):
            sorts(keys, 4)


@pytest.mark.parametrize(
    ("keys", "end_bit", "error", "message"),
    [
        (torch.zeros(3), None, TypeError, "keys: expected dtype int16, int32 or int64, got torch.float32"),
        (torch.zeros(3, 2, dtype=torch.int32), None, ValueError, r"one dimension, got shape \(3, 2\)"),
        (torch.zeros(3, dtype=torch.int16), 16, ValueError, r"end_bit: expected 1 .. 15 for torch.int16, got 16"),
        (torch.zeros(3, dtype=torch.int64), 0, ValueError, r"end_bit: expected 1 .. 63 for torch.int64, got 0"),
        (torch.zeros(1, dtype=torch.int16).expand(2**31), None, ValueError, r"fewer than 2\*\*31 .*, got 2147483648"),
    ],
)
def test_errors_name_argument_and_values(keys, end_bit, error, message):
    with pytest.raises(error, match=message):
        sort(keys, end_bit)


@pytest.mark.parametrize("dtype", list(BITS))
def test_registration(dtype):
    torch.library.opcheck(torch.ops.dmoe.sort.default, (torch.randint(0, 9, (17,), dtype=dtype), 5))
