"""A projection of all experts held as codes and scales, as one value: frozen, and never decoded whole by products.

The formats, and how a number is read from its code, are those of :mod:`dmoe.ops.weight_formats`. :mod:`dmoe.quant`
makes them of a model's weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dmoe.ops._checks import check_tensors
from dmoe.ops.projection import Codes
from dmoe.ops.weight_formats import SCALES, check_block, decode, format_of, scales_shape
from dmoe.strides import half_by_half


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight of :class:`dmoe.ExpertWeights`, frozen, as codes.

    Its matrices are ``(E, N, K)``: N results, of gate and up together where it is both, and K inputs. A number is
    ``value(code) * scale``, computed in float32 and rounded once to the dtype of x.

    Attributes:
        codes: ``(E, N, K)`` int8 for ``int8``, float8_e4m3fn for ``fp8``; ``(E, N, K / 2)`` uint8 for the formats of
            four bits, even columns in the low halves of bytes.
        scales: ``(E, ceil(N / block[0]), ceil(K / block[1]))`` float32, bfloat16 or float16; uint8 exponents (e8m0) for
            ``mxfp4``.
        format: ``int8``, ``fp8``, ``int4``, ``nf4`` or ``mxfp4``.
        shape: of the weight: ``(E, 2, F, H)``, ``(E, F, H)`` or ``(E, H, F)``.
        block: rows and columns that share a scale.
        zeros: what is subtracted from ``int4`` codes, in the shape of ``scales``; None for 8.
        interleaved: rows of gate and up take turns, as in GPT-OSS's files.

    Raises:
        TypeError: something that is no tensor; codes, scales or zeros of another dtype than the format's.
        ValueError: an unknown format, shapes or devices that do not fit together.
    """

    codes: Tensor
    scales: Tensor
    format: str
    shape: tuple[int, ...]
    block: tuple[int, int]
    zeros: Tensor | None = None
    interleaved: bool = False

    def __post_init__(self) -> None:
        given = {"codes": self.codes, "scales": self.scales}
        check_tensors("QuantizedWeight", **given, **({} if self.zeros is None else {"zeros": self.zeros}))
        own = format_of("QuantizedWeight", self.format)
        if len(self.shape) not in (3, 4) or (len(self.shape) == 4 and self.shape[1] != 2):
            raise ValueError(f"QuantizedWeight: shape: expected (E, 2, F, H) or (E, N, K), got {tuple(self.shape)}")
        if self.interleaved and len(self.shape) != 4:
            raise ValueError(f"QuantizedWeight: interleaved: expected a shape (E, 2, F, H), got {tuple(self.shape)}")
        check_block("QuantizedWeight", self.format, self.block, self.matrices[2])
        coded, grid = own.codes_shape(self.matrices), scales_shape(self.matrices, self.block)
        expected = {"codes": (self.codes, coded), "scales": (self.scales, grid), "zeros": (self.zeros, grid)}
        for name, (tensor, shape) in expected.items():
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ValueError(
                    f"QuantizedWeight: {name}: expected shape {shape} for a {self.format} weight of shape "
                    f"{tuple(self.shape)} in blocks of {tuple(self.block)}, got {tuple(tensor.shape)}"
                )
        self._check_scales()
        if self.codes.dtype != own.codes:
            raise TypeError(f"QuantizedWeight: codes: expected {own.codes} for {self.format}, got {self.codes.dtype}")

    def _check_scales(self) -> None:
        """Dtypes and devices of scales and zeros."""
        allowed = (torch.uint8,) if self.format == "mxfp4" else SCALES
        if self.scales.dtype not in allowed:
            names = " or ".join(map(str, allowed))
            raise TypeError(f"QuantizedWeight: scales: expected {names} for {self.format}, got {self.scales.dtype}")
        if self.zeros is not None and (self.format != "int4" or self.zeros.dtype not in SCALES):
            what = "None" if self.format != "int4" else " or ".join(map(str, SCALES))
            raise TypeError(f"QuantizedWeight: zeros: expected {what} for {self.format}, got {self.zeros.dtype}")
        for name, tensor in (("scales", self.scales), ("zeros", self.zeros)):
            if tensor is not None and tensor.device != self.codes.device:
                raise ValueError(
                    f"QuantizedWeight: {name}: expected on {self.codes.device} like codes, got {tensor.device}"
                )

    @property
    def matrices(self) -> tuple[int, int, int]:
        """``(E, N, K)``."""
        experts, *halves, rows, columns = self.shape
        return experts, rows * (2 if halves else 1), columns

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zeros."""
        tensors = (self.codes, self.scales, *(() if self.zeros is None else (self.zeros,)))
        return sum(tensor.nbytes for tensor in tensors)

    def __getitem__(self, experts: Any) -> QuantizedWeight:
        """Those experts' part; ``experts`` is a slice, or an index tensor."""
        parts = (self.codes[experts], self.scales[experts], None if self.zeros is None else self.zeros[experts])
        return replace(
            self, codes=parts[0], scales=parts[1], zeros=parts[2], shape=(parts[0].shape[0], *self.shape[1:])
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight as a tensor ``shape`` in ``dtype``: as large as what the codes stand for."""
        rows = decode(self.codes, self.scales, self.zeros, self.format, self.block, dtype)
        if len(self.shape) == 3:
            return rows
        return half_by_half(rows) if self.interleaved else rows.unflatten(1, (2, -1))

    @property
    def operand(self) -> Codes:
        """As the operation takes it."""
        block = (int(self.block[0]), int(self.block[1]))
        return Codes(self.codes, self.scales, self.zeros, self.format, block, self.matrices, self.interleaved)
