"""Experts' products in fp8, for compositions: both factors are quantised where they are multiplied, and only there.

Forward, and the gradients of rows, multiply e4m3 codes with power-of-two scales (:mod:`dmoe.ops.fp8`): each row has a
scale of its own, activations and gradients alike, each 128 x 128 block of a weight another. Gradients of weights are
products of unquantised rows in the model's dtype, as in torchao's recipe ``rowwise_with_gw_hp``
(torchao/float8/config.py): what they sum over is the tokens, along which a row's scale cannot be taken out of the sum.
The gradient passes rounding as if it were not there (straight through).

Weights are quantised anew in every product, from the master weights as they are then, and kept nowhere.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dmoe.ops.fp8 import fp8_gemm, quantize_blocks, quantize_rows
from dmoe.ops.fp8_ref import decoded_codes, dequantize_blocks, exact_dtype, quantize_blocks_ref, quantize_rows_ref
from dmoe.ops.projection import NO_THIN_PRODUCT, GroupedProducts, ThinProduct, TorchProducts


class Fp8Rows(NamedTuple):
    """Rows as codes ``(R, K)`` float8_e4m3fn and scales ``(R,)`` float32."""

    codes: Tensor
    scales: Tensor

    def decoded(self, dtype: torch.dtype) -> Tensor:
        """What they stand for: exact, but in float16, whose range is smaller than that of scales."""
        exact = exact_dtype(dtype)
        return decoded_codes(self.codes, exact).mul_(self.scales.to(exact).unsqueeze(1)).to(dtype)


def quantized(rows: Tensor, backend: str | None) -> Fp8Rows:
    """Rows that are quantised by the operation, or for ``torch`` by PyTorch's own."""
    return Fp8Rows(*(quantize_rows_ref(rows) if backend == "torch" else quantize_rows(rows)))


class Fp8Products:
    """Products over one plan's rows, those with projections in fp8; the thin ones of adapters are ``inner``'s.

    Where these are PyTorch's own operations, and for float64, which the operation does not know, factors are decoded
    and multiplied as any others: the same numbers, since codes and scales decode exactly.
    """

    def __init__(self, inner: GroupedProducts | TorchProducts) -> None:
        self.inner = inner
        self.backend = "torch" if isinstance(inner, TorchProducts) else None

    def rows(self, a: Tensor, b: Tensor) -> Tensor:
        """See :class:`dmoe.ops.projection.Products`; not in fp8."""
        return self.inner.rows(a, b)

    def sums(self, a: Tensor, b: Tensor, *, columns_first: bool = False) -> Tensor:
        """See :class:`dmoe.ops.projection.Products`; not in fp8."""
        return self.inner.sums(a, b, columns_first=columns_first)

    def row_sums(self, a: Tensor) -> Tensor:
        """See :class:`dmoe.ops.projection.Products`; not in fp8."""
        return self.inner.row_sums(a)

    def taken(self, a: Tensor) -> Fp8Rows:
        """Rows as :meth:`through` multiplies them: quantised once, whatever the number of matrices."""
        return quantized(a, self.backend)

    def through(self, a: Tensor | Fp8Rows, weight: Any, back: bool, added: ThinProduct = NO_THIN_PRODUCT) -> Tensor:
        """See :class:`dmoe.ops.projection.Products`; of tensors alone, as :mod:`dmoe.expert_inputs` sees to."""
        rows = a if isinstance(a, Fp8Rows) else self.taken(a)
        decodes = self.backend == "torch" or weight.dtype == torch.float64
        out = (self._of_decoded if decodes else self._of_codes)(rows, weight, back)
        thin, factor = added
        return out if thin is None or factor is None else out.add_(self.rows(thin, factor if back else factor.mT))

    def _of_codes(self, rows: Fp8Rows, weight: Tensor, back: bool) -> Tensor:
        offsets, dtype = self.inner.expert_offsets, weight.dtype
        # Tensor cores sum along what is contiguous: backward sums over the other dimension of a weight.
        codes, scales, turned = quantize_blocks(weight, with_transposed=back and weight.is_cuda)
        if turned is not None:
            return fp8_gemm(*rows, turned, scales.mT.contiguous(), offsets, dtype=dtype)
        return fp8_gemm(*rows, codes, scales, offsets, trans_b=not back, dtype=dtype)

    def _of_decoded(self, rows: Fp8Rows, weight: Tensor, back: bool) -> Tensor:
        exact = exact_dtype(weight.dtype)
        codes, scales, _ = quantize_blocks_ref(weight)
        decoded = torch.stack([dequantize_blocks(*one, exact) for one in zip(codes, scales, strict=True)])
        return self.inner.through(rows.decoded(exact), decoded, back).to(weight.dtype)
