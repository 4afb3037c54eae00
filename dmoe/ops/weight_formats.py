"""The formats of quantised weights: their codes and scales from values, and values from those.

A decoded value is ``value(code) * scale`` (int4 with zero points: ``(code - zero) * scale``), computed in float32 and
then rounded once to the dtype that is asked for:

========= ================= ==================================================== ======================================
format    codes             value of a code                                      who share a scale
========= ================= ==================================================== ======================================
``int8``  int8              the code                                             a row
``fp8``   float8_e4m3fn     the number (DeepSeek-V3, arXiv 2412.19437, 3.3)      128 rows by 128 columns, ragged at ends
``int4``  two in a uint8    the code - 8, or with zero points the code           32, 64 or 128 columns of a row
``nf4``   two in a uint8    quantiles (QLoRA, Dettmers et al. 2023, appendix E)  64 columns of a row
``mxfp4`` two in a uint8    e2m1 (OCP Microscaling Formats, MX, v1.0)            32 columns of a row; scales are e8m0
========= ================= ==================================================== ======================================

Of two codes in a byte the lower nibble is the even column. e2m1 is a sign (bit 3), two bits of exponent with bias 1 and
one of mantissa; e8m0 a power of two, ``2 ** (code - 127)``, and NaN for 255.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class WeightFormat(NamedTuple):
    """What is fixed for a format.

    Attributes:
        codes: dtype of the codes.
        bits: of one code; two of 4 bits lie in a byte.
        rows: that share a scale.
        columns: that may share a scale, the default first; none where all columns of a row do.
        scales: dtype in which :func:`encode` writes scales.
        largest: the largest value of a code.
    """

    codes: torch.dtype
    bits: int
    rows: int
    columns: tuple[int, ...]
    scales: torch.dtype
    largest: float

    def block(self, columns: int) -> tuple[int, int]:
        """The default (rows, columns) that share a scale, of a matrix of so many columns."""
        return self.rows, self.columns[0] if self.columns else columns

    def codes_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the codes of matrices ``(..., K)``: two of 4 bits lie in a byte."""
        return *shape[:-1], shape[-1] * self.bits // 8


FORMATS: dict[str, WeightFormat] = {
    "int8": WeightFormat(torch.int8, 8, 1, (), torch.float32, 127.0),
    "fp8": WeightFormat(torch.float8_e4m3fn, 8, 128, (128,), torch.float32, 448.0),
    "int4": WeightFormat(torch.uint8, 4, 1, (64, 32, 128), torch.bfloat16, 7.0),
    "nf4": WeightFormat(torch.uint8, 4, 1, (64,), torch.bfloat16, 1.0),
    "mxfp4": WeightFormat(torch.uint8, 4, 1, (32,), torch.uint8, 6.0),
}
SCALES = (torch.float32, torch.bfloat16, torch.float16)  # dtypes of scales and zero points, but for mxfp4's scales

# The values of 4-bit codes, by code. nf4's as the appendix prints them.
_INT4 = tuple(float(code - 8) for code in range(16))
_CODES = tuple(float(code) for code in range(16))
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E2M1_EXPONENT = 2  # of its largest power of two


def format_of(op: str, name: str) -> WeightFormat:
    """The format of this name.

    Raises:
        ValueError: there is none.
    """
    if name not in FORMATS:
        raise ValueError(f"{op}: format: expected one of {', '.join(FORMATS)}, got {name!r}")
    return FORMATS[name]


def check_block(op: str, name: str, block: Sequence[int], columns: int) -> None:
    """``block`` is one that the format has, for matrices of so many columns.

    Raises:
        ValueError: it is not, or does not divide the columns.
    """
    form = format_of(op, name)
    allowed = [(form.rows, wide) for wide in form.columns or (columns,)]
    if tuple(block) not in allowed:
        raise ValueError(f"{op}: block: expected {' or '.join(map(str, allowed))} for {name}, got {tuple(block)}")
    if form.bits == 4 and columns % block[1]:
        raise ValueError(f"{op}: {name}: expected a multiple of {block[1]} columns, the group's, got {columns}")


def code_values(name: str, zero_points: bool = False) -> tuple[float, ...]:
    """The values of the 16 codes of a 4-bit format, by code."""
    if name == "int4":
        return _CODES if zero_points else _INT4
    return _NF4 if name == "nf4" else (*_E2M1, *(-value for value in _E2M1))


def columns_of(codes: Tensor, name: str) -> int:
    """Columns of the matrices that codes ``(E, N, ...)`` stand for."""
    return codes.shape[-1] * 8 // FORMATS[name].bits


def scales_shape(shape: Sequence[int], block: Sequence[int]) -> tuple[int, int, int]:
    """Shape of the scales of matrices ``(E, N, K)``."""
    experts, rows, columns = shape
    return experts, -(-rows // block[0]), -(-columns // block[1])


def encode(
    weight: Tensor,
    format: str,
    block: Sequence[int] | None = None,
    zero_points: bool = False,
    scales_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes and scales whose decoded values are near to a weight's, expert by expert.

    The largest magnitude of a block becomes the largest value of a code (int4 7, so that the error is at most half a
    scale), scales are rounded first and codes chosen for the rounded ones. With zero points the range of a block, and
    0, is spread over the 16 codes (Frantar et al. 2022, GPTQ, arXiv 2210.17323), and zero points are whole. mxfp4 takes
    the power of two of section 6.3 of the MX specification, and rounds ties to even; nf4 the nearest quantile.

    Args:
        weight: ``(E, N, K)`` floating point, of any strides; matrices in ``nn.Linear``'s order, K the inputs.
        format: one of :data:`FORMATS`.
        block: (rows, columns) that share a scale; None is the format's default.
        zero_points: int4 alone: codes from 0 to 15 of which one stands for 0, instead of -7 to 7.
        scales_dtype: of scales and zero points, one of :data:`SCALES`; None is the format's. mxfp4 has its own.

    Returns:
        Codes ``(E, N, K)``, or ``(E, N, K / 2)`` uint8 in 4 bits; scales ``(E, ceil(N / rows), ceil(K / columns))``;
        zero points in the scales' shape and dtype, or None. Beside these it takes memory for one expert.

    Raises:
        TypeError: no floating point tensor; a dtype that scales cannot have.
        ValueError: an unknown format or block, K no multiple of the group, zero points of another format, values that
            are not finite, scales that ``scales_dtype`` does not hold.
    """
    form = format_of("encode", format)
    if not weight.is_floating_point():
        raise TypeError(f"encode: weight: expected floating point, got {weight.dtype}")
    if weight.ndim != 3 or 0 in weight.shape[1:]:
        raise ValueError(f"encode: weight: expected (E, N, K), N and K at least 1, got shape {tuple(weight.shape)}")
    experts, rows, columns = weight.shape
    block = form.block(columns) if block is None else (block[0], block[1])
    check_block("encode", format, block, columns)
    if zero_points and format != "int4":
        raise ValueError(f"encode: zero_points: expected False, which int4 alone has, got True for {format}")
    own = form.scales == torch.uint8
    if scales_dtype is not None and (own or scales_dtype not in SCALES):
        raise TypeError(
            f"encode: scales_dtype: expected {'None, as mxfp4 has its own' if own else SCALES}, got {scales_dtype}"
        )
    codes = weight.new_empty(form.codes_shape(weight.shape), dtype=form.codes)
    scales = weight.new_empty(scales_shape(weight.shape, block), dtype=scales_dtype or form.scales)
    zeros = torch.empty_like(scales) if zero_points else None
    if weight.is_meta:
        return codes, scales, zeros
    for e in range(experts):
        matrix = weight[e].detach().float()
        if not matrix.isfinite().all():
            raise ValueError(f"encode: weight: expected finite values, got others in expert {e} (or too large ones)")
        blocks = _in_blocks(matrix, block)  # (block rows, rows, block columns, columns)
        if format == "mxfp4":
            chosen = _encode_mxfp4(blocks, scales[e])
        elif zeros is not None:
            chosen = _encode_with_zeros(blocks, scales[e], zeros[e])
        else:
            chosen = _encode_symmetric(blocks, scales[e], format)
        chosen = chosen.flatten(2).flatten(0, 1)[:rows, :columns]
        codes[e] = chosen if form.bits == 8 else packed(chosen)
    return codes, scales, zeros


def decode(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, format: str, block: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """The values ``(E, N, K)`` of codes and scales, in ``dtype``; see the module.

    A part of matrices is decoded like a whole: rows and columns cut at multiples of the block, and so their scales.
    """
    if FORMATS[format].bits == 4:
        table = torch.tensor(code_values(format, zeros is not None), device=codes.device)
        nibbles = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)
        values = table[nibbles.int()]
    else:
        values = codes.float()
    if zeros is not None:
        values = values - spread(zeros.float(), block, values.shape)
    scales = _power_of_two(scales) if scales.dtype == torch.uint8 else scales.float()
    return (values * spread(scales, block, values.shape)).to(dtype)


def spread(scales: Tensor, block: Sequence[int], shape: Sequence[int]) -> Tensor:
    """One number per block ``(..., ceil(N / rows), ceil(K / columns))`` as one per row and column of ``shape``.

    ``(..., N, K)``, or ``(..., N, 1)`` where there is one block of columns.
    """
    rows, columns = shape[-2:]
    if block[0] > 1:
        scales = scales.repeat_interleave(block[0], -2)[..., :rows, :]
    return scales if scales.shape[-1] == 1 else scales.repeat_interleave(block[1], -1)[..., :columns]


def _power_of_two(codes: Tensor) -> Tensor:
    """e8m0 as float32, from its bits: 0 is a subnormal number, 255 NaN."""
    exponents = codes.int()
    bits = torch.where(exponents == 0, 0x00400000, exponents << 23)
    return torch.where(exponents == 255, math.nan, bits.view(torch.float32))


def _in_blocks(matrix: Tensor, block: Sequence[int]) -> Tensor:
    """``(N, K)`` as ``(ceil(N / rows), rows, ceil(K / columns), columns)``, with zeros where blocks are ragged."""
    rows, columns = matrix.shape
    down, across = -rows % block[0], -columns % block[1]
    matrix = F.pad(matrix, (0, across, 0, down)) if down or across else matrix
    return matrix.view(-1, block[0], matrix.shape[1] // block[1], block[1])


def _kept(scale: Tensor, out: Tensor) -> Tensor:
    """Writes scales, rounded, and returns what codes are chosen for: never 0, and spread over their blocks."""
    out.copy_(scale)
    rounded = out.float()
    if not rounded.isfinite().all():
        raise ValueError(f"encode: scales_dtype: expected one that holds {scale.max().item():g}, got {out.dtype}")
    return torch.where(rounded > 0, rounded, 1.0)[:, None, :, None]


def _encode_symmetric(blocks: Tensor, scales: Tensor, format: str) -> Tensor:
    largest = FORMATS[format].largest
    scaled = blocks / _kept(blocks.abs().amax((1, 3)) / largest, scales)
    if format == "fp8":
        return scaled.clamp_(-largest, largest).to(torch.float8_e4m3fn)
    if format == "nf4":
        between = [(low + high) / 2 for low, high in itertools.pairwise(_NF4)]
        return torch.bucketize(scaled.contiguous(), torch.tensor(between, device=scaled.device), out_int32=True)
    codes = scaled.round_().clamp_(-largest, largest)
    return codes if format == "int8" else codes + 8


def _encode_with_zeros(blocks: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    low, high = blocks.amin((1, 3)).clamp(max=0), blocks.amax((1, 3)).clamp(min=0)
    scale = _kept((high - low) / 15, scales)
    zeros.copy_((-low / scale[:, 0, :, 0]).round().clamp(0, 15))
    return (blocks / scale + zeros.float()[:, None, :, None]).round_().clamp_(0, 15)


def _encode_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    _, exponent = torch.frexp(blocks.abs().amax((1, 3)))  # of a mantissa in [0.5, 1), so that log2 rounds down
    exponent = (exponent - 1 - _E2M1_EXPONENT).clamp(-127, 127)
    scales.copy_(exponent + 127)
    scaled = torch.ldexp(blocks, -exponent[:, None, :, None]).abs().contiguous()
    table = torch.tensor(_E2M1, device=blocks.device)
    between = (table[1:] + table[:-1]) / 2
    # A tie goes to the code whose mantissa is even: down from an even one, up from an odd one.
    down = torch.bucketize(scaled, between, out_int32=True)
    up = torch.bucketize(scaled, between, out_int32=True, right=True)
    magnitude = torch.where(down % 2 == 0, down, up)
    return magnitude + 8 * blocks.signbit()


def packed(codes: Tensor) -> Tensor:
    """Codes of 4 bits ``(..., K)``, whole numbers from 0 to 15 of any dtype, as uint8 ``(..., K / 2)``."""
    codes = codes.to(torch.uint8)
    return codes[..., ::2] | codes[..., 1::2] << 4
