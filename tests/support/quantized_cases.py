"""Quantised weights drawn by their bits, and their values worked out from these without a line of dmoe."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import torch
from hypothesis import strategies as st

# Format -> (rows, columns) that share a scale; None is all columns. Those that tests draw from.
BLOCKS = {
    "int8": [(1, None)],
    "fp8": [(128, 128)],
    "int4": [(1, 32), (1, 64), (1, 128)],
    "nf4": [(1, 64)],
    "mxfp4": [(1, 32)],
}
FOUR_BITS = ("int4", "nf4", "mxfp4")
SCALES = (torch.float32, torch.bfloat16, torch.float16)


def small_float(code: int, exponent_bits: int, mantissa_bits: int, bias: int) -> float:
    """A number by its sign, exponent and mantissa, as IEEE 754 has subnormal and normal ones."""
    sign = -1.0 if code >> (exponent_bits + mantissa_bits) & 1 else 1.0
    exponent, mantissa = code >> mantissa_bits & (1 << exponent_bits) - 1, code & (1 << mantissa_bits) - 1
    fraction = mantissa / (1 << mantissa_bits)
    return sign * (fraction * 2.0 ** (1 - bias) if exponent == 0 else (1 + fraction) * 2.0 ** (exponent - bias))


def e2m1(code: int) -> float:
    return small_float(code, 2, 1, bias=1)


def e4m3(code: int) -> float:
    return math.nan if code & 0x7F == 0x7F else small_float(code, 4, 3, bias=7)


def e8m0(code: int) -> float:
    return math.nan if code == 255 else 2.0 ** (code - 127)


# As QLoRA's appendix E prints them.
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def nf4_quantiles() -> list[float]:
    """The appendix's formula: quantiles of a normal distribution, 7 below 0 and 8 above, and 0."""
    outermost = 1 - (1 / 32 + 1 / 30) / 2
    quantile = NormalDist().inv_cdf
    above = [quantile(0.5 + (outermost - 0.5) * i / 8) for i in range(1, 9)]
    below = [-quantile(0.5 + (outermost - 0.5) * i / 7) for i in range(7, 0, -1)]
    largest = above[-1]
    return [value / largest for value in (*below, 0.0, *above)]


def values_of(codes: torch.Tensor, format: str, with_zeros: bool) -> np.ndarray:
    """float32 ``(E, N, K)``, code by code."""
    if format == "int8":
        return codes.numpy().astype(np.float32)
    if format == "fp8":
        return np.array([e4m3(code) for code in range(256)], np.float32)[codes.view(torch.uint8).numpy()]
    table = {
        "int4": [float(code) if with_zeros else code - 8.0 for code in range(16)],
        "nf4": NF4,
        "mxfp4": [e2m1(code) for code in range(16)],
    }[format]
    packed = codes.numpy()
    nibbles = np.empty((*packed.shape[:-1], packed.shape[-1] * 2), np.uint8)
    nibbles[..., 0::2], nibbles[..., 1::2] = packed % 16, packed // 16
    return np.array(table, np.float32)[nibbles]


def decoded(codes, scales, zeros, format, block, dtype) -> torch.Tensor:
    """``(E, N, K)`` in ``dtype``: scaled in float32, rounded once."""
    values = values_of(codes, format, zeros is not None)
    _, rows, columns = values.shape
    row, column = np.arange(rows) // block[0], np.arange(columns) // block[1]
    if format == "mxfp4":
        of_blocks = np.array([e8m0(code) for code in range(256)], np.float32)[scales.numpy()]
    else:
        of_blocks = scales.float().numpy()
    if zeros is not None:
        values = values - zeros.float().numpy()[:, row][:, :, column]
    return torch.from_numpy(values * of_blocks[:, row][:, :, column]).to(dtype)


def random_weights(format, block, experts, rows, columns, *, seed=0, scales_dtype=torch.float32, zero_points=False):
    """Codes that are any bits but NaN, and positive scales of about 1 / 50 to 1 / 10: ``(codes, scales, zeros)``."""
    generator = torch.Generator().manual_seed(seed)
    width = columns // 2 if format in FOUR_BITS else columns
    codes = torch.randint(0, 256, (experts, rows, width), generator=generator, dtype=torch.uint8)
    shape = experts, -(-rows // block[0]), -(-columns // block[1])
    if format == "fp8":
        codes[codes & 0x7F == 0x7F] ^= 1
        codes = codes.view(torch.float8_e4m3fn)
    if format == "int8":
        codes = codes.view(torch.int8)
    if format == "mxfp4":
        scales = torch.randint(120, 125, shape, generator=generator, dtype=torch.uint8)
    else:
        scales = (0.02 + 0.08 * torch.rand(shape, generator=generator)).to(scales_dtype)
    zeros = torch.randint(0, 16, shape, generator=generator).to(scales_dtype) if zero_points else None
    return codes, scales, zeros


@st.composite
def weights(draw, formats=tuple(BLOCKS)):
    """Format, block, rows and columns of a weight, dtype of its scales, whether it has zero points."""
    format = draw(st.sampled_from(formats))
    block_rows, block_columns = draw(st.sampled_from(BLOCKS[format]))
    if format in FOUR_BITS:
        columns = block_columns * draw(st.integers(1, 3))
    else:
        columns = draw(st.sampled_from([1, 2, 7, 16, 31, 130]))
    block = block_rows, columns if block_columns is None else block_columns
    return {
        "format": format,
        "block": block,
        "rows": draw(st.sampled_from([1, 2, 7, 16, 31, 33, 130])),
        "columns": columns,
        "scales_dtype": draw(st.sampled_from(SCALES)),
        "zero_points": format == "int4" and draw(st.booleans()),
    }


def build_weights(drawn, experts, seed=0):
    """What :func:`weights` drew, as codes, scales and zero points."""
    return random_weights(
        drawn["format"],
        drawn["block"],
        experts,
        drawn["rows"],
        drawn["columns"],
        seed=seed,
        scales_dtype=drawn["scales_dtype"],
        zero_points=drawn["zero_points"],
    )
