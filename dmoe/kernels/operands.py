"""What the host tells the expert MLP's kernels: where rows and weights lie, launch shapes, paths to memory."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dmoe.activations import kind_and_numbers
from dmoe.kernels._launch import capability, multiprocessors
from dmoe.kernels.configs import Config, choose
from dmoe.strides import is_transposed


@dataclass(frozen=True)
class Rows:
    """Rows sorted by expert, cut into tiles; see :class:`dmoe.plan.RoutingPlan` for the index tensors.

    A bare product needs no way back to tokens, and leaves the last four out.
    """

    tiles: Tensor
    experts_by_load: Tensor
    tile_rows: int
    expert_offsets: Tensor
    num_rows: int  # R, the static bound
    row_to_token: Tensor | None = None
    row_to_slot: Tensor | None = None
    token_offsets: Tensor | None = None
    token_rows: Tensor | None = None

    @property
    def num_experts(self) -> int:
        """E."""
        return self.expert_offsets.shape[0] - 1


@dataclass(frozen=True)
class Dropout:
    """A dropout probability and its seed; p = 0 is none."""

    p: float
    seed: Tensor | None

    @property
    def threshold(self) -> int:
        """Random words below it drop; it has to fit in 32 bits like them."""
        return min(round(self.p * 2**32), 2**32 - 1)

    @property
    def scale(self) -> float:
        """What is kept is multiplied by this."""
        return 1.0 / (1.0 - self.p)


def config_of(kernel: str, like: Tensor, tile_rows: int, k: int, n: int) -> Config:
    """k and n are the columns of operand and result, as their rows' alignment decides which loads are possible."""
    return choose(kernel, capability(like.device), like.element_size(), tile_rows, k, n)


def precision(like: Tensor) -> str:
    """tf32 where PyTorch's own setting allows it. Means nothing to 16-bit numbers."""
    if like.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "ieee"


def copy_descriptor(matrix: Tensor, block_rows: int, block_columns: int) -> TensorDescriptor | None:
    """A view ``(rows, columns)`` for the copy engine (TMA), where the GPU has one and rows are 16-byte aligned."""
    aligned = matrix.stride(0) * matrix.element_size() % 16 == 0 and matrix.data_ptr() % 16 == 0
    short = block_columns * matrix.element_size() < 16  # less than the copy engine takes at once
    if matrix.element_size() > 2 or short or not aligned or capability(matrix.device) // 10 not in (9, 10):
        return None
    return TensorDescriptor(matrix, list(matrix.shape), [matrix.stride(0), 1], [block_rows, block_columns])


class Operand(NamedTuple):
    """A weight ``(E, N, K)`` as kernels take it: ``rows`` below each other, and an expert's begin ``expert_rows`` after
    another's. They are rows of n, or of k where the weight is transposed in memory, or was asked for as ``(E, K, N)``.
    """

    rows: Tensor
    expert_rows: int
    k_rows: bool

    @classmethod
    def of(cls, weight: Tensor, *, k_rows: bool = False) -> Operand:
        """As it lies in memory; ``k_rows`` where ``(E, K, N)`` was given."""
        if is_transposed(weight):
            weight, k_rows = weight.mT, not k_rows
        experts, height, width = weight.shape
        plain = weight.is_contiguous()
        stride = width if plain else weight.stride(1)
        expert_rows = height if plain else weight.stride(0) // stride
        rows = weight.as_strided(((experts - 1) * expert_rows + height, width), (stride, 1))
        return cls(rows, expert_rows, k_rows)

    def descriptor(self, config: Config, k: int, *, halves: int = 1) -> TensorDescriptor | None:
        """For tiles of a product that sums over ``k``, each as wide as so many of the launch shape's."""
        columns = halves * config.block_n
        if columns > 256:  # more than the copy engine takes at once
            return None
        if not self.k_rows:
            return copy_descriptor(self.rows, columns, config.block_k)
        # The summed dimension runs over rows, and the copy engine does not stop at an expert's last.
        return copy_descriptor(self.rows, config.block_k, columns) if k % config.block_k == 0 else None

    def joined(self, config: Config, f: int) -> TensorDescriptor | None:
        """Of gate and up ``(E, 2 F, H)``: for tiles of both, the same rows of either."""
        experts, h = self.rows.shape[0] // (2 * f), self.rows.shape[1]
        if self.k_rows or self.expert_rows != 2 * f or self.descriptor(config, h) is None:
            return None
        stride = self.rows.stride(0)
        return TensorDescriptor(
            self.rows, [2 * experts, f, h], [f * stride, stride, 1], [2, config.block_n, config.block_k]
        )

    @property
    def options(self) -> dict[str, Any]:
        """What kernels are told about it."""
        return {"EXPERT_ROWS": self.expert_rows, "STRIDE": self.rows.stride(0), "K_ROWS": self.k_rows}


class Product(NamedTuple):
    """Rows ``(R, K)`` and a weight that multiplies them, as :func:`dmoe.kernels.plus_product.plus_product` takes them.

    Attributes:
        a, weight: what the kernel is given: a descriptor, or else the tensor.
        options: what it is told of them.
        block_k: how much of K a step takes.
    """

    a: TensorDescriptor | Tensor
    weight: TensorDescriptor | Tensor
    options: dict[str, Any]
    block_k: int

    @classmethod
    def of(cls, a: Tensor, weight: Tensor, config: Config, tile_rows: int, *, trans_b: bool) -> Product:
        """Of a ``(R, K)``, whose rows may lie apart, and ``(E, K, N)``, or with ``trans_b`` ``(E, N, K)``."""
        k = a.shape[1]
        operand = Operand.of(weight, k_rows=not trans_b)
        rows, matrix = copy_descriptor(a, tile_rows, config.block_k), operand.descriptor(config, k)
        paths = {"DESCRIPTOR_A": rows is not None, "DESCRIPTOR_B": matrix is not None}
        options = {"K": k, "A_STRIDE": a.stride(0), **operand.options, **paths}
        return cls(rows or a, matrix or operand.rows, options, config.block_k)

    @classmethod
    def second_of(
        cls, second: tuple[Tensor, Tensor] | None, config: Config, tile_rows: int, *, trans_b: bool
    ) -> Product | None:
        """What is added to a product of this launch shape; a low-rank factor's one step is no longer than it needs."""
        if second is None:
            return None
        block_k = min(config.block_k, max(16, 1 << (second[0].shape[1] - 1).bit_length()))
        return cls.of(*second, replace(config, block_k=block_k), tile_rows, trans_b=trans_b)

    @property
    def one_step(self) -> bool:
        """Whether it is no loop."""
        return bool(self.options["K"] <= self.block_k)

    def second_options(self) -> dict[str, Any]:
        """The options under the names that they have for a kernel's second product."""
        return {f"{name}2": value for name, value in (*self.options.items(), ("BLOCK_K", self.block_k))}

    @staticmethod
    def no_second_options() -> dict[str, Any]:
        """The same where there is none."""
        names = ("K", "A_STRIDE", "EXPERT_ROWS", "STRIDE", "K_ROWS", "DESCRIPTOR_A", "DESCRIPTOR_B", "BLOCK_K")
        return dict.fromkeys((f"{name}2" for name in names), 0)


def persistent(config: Config, like: Tensor, num_tiles: int, n: int) -> tuple[int]:
    """The grid: as many programs as run at once, or as there are tiles at most."""
    return (min(num_tiles * math.ceil(n / config.block_n), config.programs * multiprocessors(like.device)),)


def activation_options(activation: str) -> dict[str, Any]:
    """What kernels are told of an activation: its name, and its numbers."""
    kind, numbers = kind_and_numbers(activation)
    return {"ACTIVATION": kind, **dict(zip(("P0", "P1", "P2"), (*numbers, 0.0, 0.0, 0.0), strict=False))}


def shape_options(config: Config) -> dict[str, Any]:
    """What every product is told of its launch shape."""
    return {
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        **({} if config.maxnreg is None else {"maxnreg": config.maxnreg}),
    }
