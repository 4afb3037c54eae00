"""Formats of quantised weights: every code by its bits, and what encoding loses."""

from __future__ import annotations

import itertools
import math
import re

import pytest
import quantized_cases as cases
import torch
from big_allocations import BigAllocations
from hypothesis import given, settings
from hypothesis import strategies as st

from dmoe.ops.weight_formats import FORMATS, check_block, code_values, decode, encode

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@given(drawn=cases.weights(), experts=st.integers(0, 3), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99))
@settings(max_examples=80)
def test_decoding_is_what_the_bits_say(drawn, experts, dtype, seed):
    codes, scales, zeros = cases.build_weights(drawn, experts, seed)
    expected = cases.decoded(codes, scales, zeros, drawn["format"], drawn["block"], dtype)
    assert torch.equal(decode(codes, scales, zeros, drawn["format"], drawn["block"], dtype), expected)


def test_every_code_and_every_power_of_two():
    codes = torch.arange(256, dtype=torch.uint8).view(1, 1, -1)
    of_fp8 = decode(codes.view(torch.float8_e4m3fn), torch.ones(1, 1, 2), None, "fp8", (128, 128), torch.float64)
    torch.testing.assert_close(
        of_fp8[0, 0], torch.tensor([cases.e4m3(i) for i in range(256)]).double(), rtol=0, atol=0, equal_nan=True
    )
    ones = torch.full((1, 256, 16), 0x22, dtype=torch.uint8)  # e2m1's 1 is code 2
    powers = decode(ones, codes.view(1, 256, 1), None, "mxfp4", (1, 32), torch.float64)[0, :, 0]
    torch.testing.assert_close(
        powers, torch.tensor([cases.e8m0(i) for i in range(256)], dtype=torch.float64), rtol=0, atol=0, equal_nan=True
    )


def test_tables_are_the_published_ones():
    assert list(code_values("nf4")) == cases.NF4
    assert code_values("nf4") == pytest.approx(cases.nf4_quantiles(), abs=2e-7)  # computed in float32 there
    assert list(code_values("mxfp4")) == [cases.e2m1(code) for code in range(16)]
    assert list(code_values("int4")) == list(range(-8, 8))
    assert list(code_values("int4", zero_points=True)) == list(range(16))


def largest_gap(format):
    """Half of the widest distance between neighbouring values, in parts of the largest."""
    table = sorted(set(code_values(format)))
    return max(high - low for low, high in itertools.pairwise(table)) / 2 / table[-1]


@given(drawn=cases.weights(), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99), spread=st.sampled_from([0, 3]))
@settings(max_examples=80)
def test_encoding_takes_the_nearest_value(drawn, dtype, seed, spread):
    """No code beside the chosen one is nearer, for the scale that was kept; and blocks' largest values are kept."""
    format, block, zero_points = drawn["format"], drawn["block"], drawn["zero_points"]
    weight = random(2, drawn["rows"], drawn["columns"], seed=seed)
    weight = (weight * torch.exp2(spread * random(2, drawn["rows"], 1, seed=seed + 1))).to(dtype)
    kept = None if format == "mxfp4" else drawn["scales_dtype"]
    codes, scales, zeros = encode(weight, format, block, zero_points, kept)
    assert codes.dtype == FORMATS[format].codes
    assert (zeros is not None) == zero_points
    exact = weight.double()
    error = (cases.decoded(codes, scales, zeros, format, block, torch.float64) - exact).abs()
    if format == "fp8":
        return  # relative to the value; below
    ones = torch.full_like(codes, 1 if format == "int8" else 0x99)
    of_code = torch.tensor(cases.values_of(ones, format, zero_points))[0, 0, 0].item()
    plain = cases.decoded(
        ones, scales, None if zeros is None else torch.zeros_like(zeros), format, block, torch.float64
    )
    scale = plain / (of_code if format != "int4" or zero_points else 1.0)
    if format in ("int8", "int4"):
        bound = 0.5 * scale
    elif format == "nf4":
        bound = largest_gap("nf4") * scale
    else:
        bound = scale * torch.where(exact.abs() > 6 * scale, 2.0, 1.0)  # between 6 and 8 scales all become 6
    largest_scale = torch.finfo(scales.dtype).eps if scales.is_floating_point() else 0.0
    assert (error <= bound * (1 + 1e-5) + exact.abs() * largest_scale).all()


@given(rows=st.sampled_from([1, 5, 128, 200]), columns=st.sampled_from([1, 128, 300]), seed=st.integers(0, 99))
@settings(max_examples=20)
def test_fp8_blocks_are_deepseeks(rows, columns, seed):
    weight = random(1, rows, columns, seed=seed)
    codes, scales, _ = encode(weight, "fp8")
    assert scales.shape == (1, math.ceil(rows / 128), math.ceil(columns / 128))
    for i in range(scales.shape[1]):
        for j in range(scales.shape[2]):
            part = weight[0, 128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)]
            assert scales[0, i, j].item() == pytest.approx(part.abs().max().item() / 448, rel=1e-6)
    error = (cases.decoded(codes, scales, None, "fp8", (128, 128), torch.float64) - weight).abs()
    assert (error <= weight.abs() * 2**-4 * 1.0001 + scales.max() * 2**-9).all()


def test_mxfp4_is_the_specifications():
    """Section 6.3: the power of two of the largest, less 2; ties to even, saturating at 6."""
    values = [6.0, 7.9, 5.0, 2.5, 3.5, 0.25, 0.75, 1.25, 1.75, 0.2, 0.3, -0.25, -5.0, 0.0, 4.0, 3.0]
    rounded = [6.0, 6.0, 4.0, 2.0, 4.0, 0.0, 1.0, 1.0, 2.0, 0.0, 0.5, -0.0, -4.0, 0.0, 4.0, 3.0]
    for power in (0, -20, 60, -126):
        weight = torch.tensor([values + [0.0] * 16]).double().mul(2.0**power).float().unsqueeze(0)
        codes, scales, _ = encode(weight, "mxfp4")
        assert scales.item() == 127 + power
        got = cases.decoded(codes, scales, None, "mxfp4", (1, 32), torch.float64)[0, 0]
        assert got[:16].tolist() == [value * 2.0**power for value in rounded]


def test_what_a_format_can_hold_comes_back():
    for format in FORMATS:
        block = FORMATS[format].block(128)
        kept = torch.float32 if format == "mxfp4" else FORMATS[format].scales
        codes, scales, _ = cases.random_weights(format, block, 2, 9, 128, seed=3, scales_dtype=kept)
        if format == "int8":
            codes.clamp_(min=-127)
        if format == "int4":
            codes[codes & 15 == 0] |= 8  # symmetric codes are from 1 on
            codes[codes >> 4 == 0] |= 0x80
        per_byte = 128 // codes.shape[-1]
        largest = {"int8": 127, "fp8": 0x7E, "int4": 0x8F, "nf4": 0x8F, "mxfp4": 0x17}[format]
        codes.view(torch.uint8)[:, :: block[0], :: block[1] // per_byte] = largest  # in each block
        values = decode(codes, scales, None, format, block, torch.float32)
        again = decode(*encode(values, format), format, block, torch.float32)
        torch.testing.assert_close(again, values, rtol=1e-6, atol=0)
    assert not decode(*encode(torch.zeros(1, 4, 64), "nf4"), "nf4", (1, 64), torch.float32).any()
    for format in FORMATS:
        assert encode(torch.empty(0, 4, 64), format)[0].shape[0] == 0
        codes, scales, _ = encode(torch.zeros(1, 4, 128, device="meta"), format)
        assert codes.is_meta
        assert scales.is_meta


@pytest.mark.parametrize("format", FORMATS)
def test_encoding_takes_memory_for_one_expert(format):
    weight = random(64, 64, 128)
    with BigAllocations(weight[0].nbytes * 16, weight) as seen:
        encode(weight, format)
    assert not [name for name in seen.found if "empty" not in name]
    whole = encode(weight, format)
    assert sum(part.nbytes for part in whole if part is not None) < weight.nbytes * 0.27


def test_strided_weights():
    weight = random(2, 128, 64)
    for format in FORMATS:
        strided = weight.mT.contiguous().mT
        for one, other in zip(encode(weight, format), encode(strided, format), strict=True):
            assert one is None or torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def test_bad_input():
    weight = random(2, 4, 64)
    with pytest.raises(ValueError, match=r"encode: format: expected one of int8, fp8, int4, nf4, mxfp4, got 'int3'"):
        encode(weight, "int3")
    with pytest.raises(TypeError, match=r"encode: weight: expected floating point, got torch.int64"):
        encode(weight.long(), "nf4")
    with pytest.raises(ValueError, match=r"encode: weight: expected \(E, N, K\).*got shape \(4, 64\)"):
        encode(weight[0], "nf4")
    with pytest.raises(ValueError, match=r"encode: nf4: expected a multiple of 64 columns, the group's, got 48"):
        encode(weight[..., :48], "nf4")
    with pytest.raises(ValueError, match=re.escape("encode: block: expected (1, 64) or (1, 32) or (1, 128) for int4")):
        encode(weight, "int4", (1, 16))
    with pytest.raises(ValueError, match=r"encode: zero_points: expected False.*got True for nf4"):
        encode(weight, "nf4", zero_points=True)
    with pytest.raises(TypeError, match=r"encode: scales_dtype: expected None, as mxfp4 has its own"):
        encode(weight, "mxfp4", scales_dtype=torch.float32)
    with pytest.raises(TypeError, match=r"encode: scales_dtype: expected .*got torch.float64"):
        encode(weight, "int8", scales_dtype=torch.float64)
    with pytest.raises(ValueError, match=r"encode: scales_dtype: expected one that holds .*e\+07, got torch.float16"):
        encode(weight * 1e8, "int4", scales_dtype=torch.float16)
    for bad in (math.nan, math.inf):
        broken = weight.clone()
        broken[1, 2, 3] = bad
        with pytest.raises(ValueError, match=r"encode: weight: expected finite values, got others in expert 1"):
            encode(broken, "nf4")
    with pytest.raises(ValueError, match=r"check: block: expected \(1, 40\) for int8, got \(1, 32\)"):
        check_block("check", "int8", (1, 32), 40)
