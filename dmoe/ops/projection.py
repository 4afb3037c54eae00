"""One projection of all experts as compositions multiply by it: plain weights or codes, and thin factors beside them.

``rows W^T + s (rows A^T) B^T``: the product with W, and the thin one that is added while its results are in cache. W
may be held as codes (:mod:`dmoe.ops.weight_formats`), which are decoded block by block inside the product.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from dmoe.ops._moe_mlp_parts import beside
from dmoe.ops.expert_products import ExpertProducts, RowProducts
from dmoe.ops.grouped_gemm import grouped_gemm, grouped_gemm_weight
from dmoe.ops.grouped_gemm_sum import grouped_gemm_sum
from dmoe.ops.quantized_gemm import quantized_gemm, quantized_gemm_ref


class Factors(NamedTuple):
    """Thin factors of one projection: ``a (G, r, in)``, ``b (G, out, r)``, ``out`` in the order of its columns.

    G groups of rows: the experts, or those of each expert and each of several adapters.
    """

    a: Tensor
    b: Tensor
    scale: float = 1.0
    dropout: float = 0.0


class Codes(NamedTuple):
    """A projection's matrices ``(E, N, K)`` as codes; see :class:`dmoe.QuantizedWeight`.

    Attributes:
        codes: ``(E, N, K)`` int8 or float8_e4m3fn, or ``(E, N, K / 2)`` uint8, two of 4 bits in a byte.
        scales: ``(E, ceil(N / block[0]), ceil(K / block[1]))`` float32, bfloat16 or float16; of mxfp4 uint8.
        zeros: zero points of int4, floating point in the scales' shape, or None.
        format: one of :data:`dmoe.ops.weight_formats.FORMATS`.
        block: (rows, columns) that share a scale.
        shape: ``(E, N, K)``.
        interleaved: whether rows of gate and up take turns.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    format: str
    block: tuple[int, int]
    shape: tuple[int, int, int]
    interleaved: bool = False

    def times(
        self, multiply: Callable[..., Tensor], a: Tensor, offsets: Tensor, back: bool, added: ThinProduct
    ) -> Tensor:
        """``multiply``, the operation or its reference, of rows and these."""
        block = list(self.block)
        return multiply(a, self.codes, self.scales, self.zeros, self.format, block, offsets, not back, *added)


ThinProduct = tuple[Tensor | None, Tensor | None]  # rows (R, r) and their weight, as grouped_gemm_sum adds them
NO_THIN_PRODUCT: ThinProduct = (None, None)


class Products(RowProducts, Protocol):
    """Those of rows, and with projections, which may be codes."""

    def taken(self, a: Tensor) -> Any:
        """Rows in the form in which :meth:`through` multiplies them, if that is another."""

    def through(self, a: Any, weight: Tensor | Codes, back: bool, added: ThinProduct = NO_THIN_PRODUCT) -> Tensor:
        """``a[r] @ W[e]^T``, ``@ W[e]`` for the way back, plus the product of ``added``, in the same order."""


class GroupedProducts:
    """By this library's own kernels."""

    def __init__(self, expert_offsets: Tensor) -> None:
        self.expert_offsets = expert_offsets

    def rows(self, a: Tensor, b: Tensor) -> Tensor:
        """See :class:`Products`."""
        return grouped_gemm(a, b, self.expert_offsets, trans_b=False)

    def sums(self, a: Tensor, b: Tensor, *, columns_first: bool = False) -> Tensor:
        """See :class:`Products`."""
        return self.sums(b, a).mT if columns_first else grouped_gemm_weight(a, b, self.expert_offsets)

    def row_sums(self, a: Tensor) -> Tensor:
        """See :class:`Products`."""
        return self.sums(a, a.new_ones(a.shape[0], 1)).squeeze(2)

    def taken(self, a: Tensor) -> Tensor:
        """See :class:`Products`."""
        return a

    def through(self, a: Tensor, weight: Tensor | Codes, back: bool, added: ThinProduct = NO_THIN_PRODUCT) -> Tensor:
        """See :class:`Products`."""
        if isinstance(weight, Codes):
            return weight.times(quantized_gemm, a, self.expert_offsets, back, added)
        if added[0] is None:
            return grouped_gemm(a, weight, self.expert_offsets, trans_b=not back)
        return grouped_gemm_sum(a, weight, *added, self.expert_offsets, not back)


class TorchProducts(ExpertProducts):
    """By PyTorch's own operations."""

    def taken(self, a: Tensor) -> Tensor:
        """See :class:`Products`."""
        return a

    def through(self, a: Tensor, weight: Tensor | Codes, back: bool, added: ThinProduct = NO_THIN_PRODUCT) -> Tensor:
        """See :class:`Products`."""
        if isinstance(weight, Codes):
            return weight.times(quantized_gemm_ref, a, self.expert_offsets, back, added)
        out = self.rows(a, weight if back else weight.mT)
        thin, factor = added
        return out if thin is None or factor is None else out.add_(self.rows(thin, factor if back else factor.mT))


class Projection:
    """One projection of a pass, with its factors if it has some, and the r numbers a row that both directions make.

    Args:
        weights: its matrices, ``(E, N, K)`` each, whose columns of results stand side by side.
        products: over the experts' rows.
        factors: thin ones beside it.
        thin: products over the factors' groups of rows; ``products`` where these are the experts.
        dropped: rows of its input under the factors' dropout.
    """

    def __init__(
        self,
        weights: Sequence[Tensor | Codes],
        products: Products,
        factors: Factors | None,
        thin: RowProducts,
        dropped: Callable[[Tensor], Tensor],
    ) -> None:
        self.weights, self.products, self.factors, self.thin, self.dropped = weights, products, factors, thin, dropped
        self.inner: Tensor | None = None  # s A times the projection's rows; in backward those times the gate
        self.back: Tensor | None = None  # s B^T times the gradients of its results
        self.b_grad: Tensor | None = None
        self.trained = False

    @property
    def _in_one(self) -> bool:
        """Whether the thin product can be added inside the other one."""
        return len(self.weights) == 1 and self.thin is self.products

    def through(self, rows: Callable[[], Tensor], taken: Any = None) -> Tensor:
        """``rows W^T + s (rows A^T) B^T``.

        Args:
            rows: makes them.
            taken: what the products take of them, where that exists already: without factors they are not made then.
        """
        made = rows() if taken is None or self.factors is not None else None
        taken = self.products.taken(made) if taken is None and made is not None else taken
        if self.factors is None or made is None:
            return beside([self.products.through(taken, weight, False) for weight in self.weights])
        self.inner = self.thin.rows(self.dropped(made), self.factors.a.mT).mul_(self.factors.scale)
        if self._in_one:
            return self.products.through(taken, self.weights[0], False, (self.inner, self.factors.b))
        plain = beside([self.products.through(taken, weight, False) for weight in self.weights])
        return plain.add_(self.thin.rows(self.inner, self.factors.b.mT))

    def back_through(self, grads: Tensor) -> Tensor:
        """``grads W + s (grads B) A``, and of the same rows b's gradient, if they are trained."""
        if self.factors is None:
            return self._back_through_weights(grads)
        if self.trained and self.inner is not None:
            self.b_grad = self.thin.sums(grads, self.inner)
        self.back = self.thin.rows(grads, self.factors.b).mul_(self.factors.scale)
        if self._in_one and not self.factors.dropout:
            return self.products.through(grads, self.weights[0], True, (self.back, self.factors.a))
        thin = self.dropped(self.thin.rows(self.back, self.factors.a))
        return self._back_through_weights(grads).add_(thin)

    def _back_through_weights(self, grads: Tensor) -> Tensor:
        widths = [weight.shape[1] for weight in self.weights]
        parts = zip(grads.split(widths, 1), self.weights, strict=True)
        return functools.reduce(operator.add, (self.products.through(part, weight, True) for part, weight in parts))

    def grads(self, rows: Callable[[], Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """Of a and b; the projection's rows are made only if they are needed."""
        if self.back is None or not self.trained:
            return None, None
        return self.thin.sums(self.back, self.dropped(rows())), self.b_grad


def masked_rows(rows: Tensor, mask_of: Callable[[slice], Tensor | None], chunks: Sequence[slice]) -> Tensor:
    """A copy of the rows, each chunk times its mask."""
    out = torch.empty_like(rows)
    for part in chunks:
        mask = mask_of(part)
        out[part] = rows[part] if mask is None else rows[part] * mask
    return out
