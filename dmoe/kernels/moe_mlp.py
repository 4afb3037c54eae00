"""Launches of the expert MLP's kernels: which launch shape, which grid, which path to memory.

A :class:`Rows` says where the rows are; every function here writes into tensors it is given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dmoe.kernels import gluon_moe_mlp as gluon
from dmoe.kernels._launch import capability, launch, multiprocessors
from dmoe.kernels.combine import combine_kernel
from dmoe.kernels.configs import Config, choose
from dmoe.kernels.expert_mlp import hidden_grad_kernel, up_kernel
from dmoe.kernels.grouped_gemm import (
    bias_dots_kernel,
    expert_sums_kernel,
    masked_rows_kernel,
    rows_kernel,
    weight_grad_kernel,
)
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


def _config(kernel: str, like: Tensor, tile_rows: int, k: int, n: int) -> Config:
    """k and n are the columns of operand and result, as their rows' alignment decides which loads are possible."""
    return choose(kernel, capability(like.device), like.element_size(), tile_rows, k, n)


def _precision(like: Tensor) -> str:
    """tf32 where PyTorch's own setting allows it. Means nothing to 16-bit numbers."""
    if like.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "ieee"


def _descriptor(matrix: Tensor, block_rows: int, block_columns: int) -> TensorDescriptor | None:
    """A view ``(rows, columns)`` for the copy engine (TMA), where the GPU has one and rows are 16-byte aligned."""
    aligned = matrix.stride(0) * matrix.element_size() % 16 == 0 and matrix.data_ptr() % 16 == 0
    if matrix.element_size() != 2 or not aligned or capability(matrix.device) // 10 not in (9, 10):
        return None
    return TensorDescriptor(matrix, list(matrix.shape), [matrix.stride(0), 1], [block_rows, block_columns])


class _Operand(NamedTuple):
    """A weight ``(E, N, K)`` as kernels take it: ``rows`` below each other, and an expert's begin ``expert_rows`` after
    another's. They are rows of n, or of k where the weight is transposed in memory, or was asked for as ``(E, K, N)``.
    """

    rows: Tensor
    expert_rows: int
    k_rows: bool

    @classmethod
    def of(cls, weight: Tensor, *, k_rows: bool = False) -> _Operand:
        if is_transposed(weight):
            weight, k_rows = weight.mT, not k_rows
        experts, height, width = weight.shape
        plain = weight.is_contiguous()
        stride = width if plain else weight.stride(1)
        expert_rows = height if plain else weight.stride(0) // stride
        rows = weight.as_strided(((experts - 1) * expert_rows + height, width), (stride, 1))
        return cls(rows, expert_rows, k_rows)

    def descriptor(self, config: Config, k: int) -> TensorDescriptor | None:
        """For tiles of a product that sums over ``k``."""
        if not self.k_rows:
            return _descriptor(self.rows, config.block_n, config.block_k)
        # The summed dimension runs over rows, and the copy engine does not stop at an expert's last.
        return _descriptor(self.rows, config.block_k, config.block_n) if k % config.block_k == 0 else None

    @property
    def options(self) -> dict[str, Any]:
        """What kernels are told about it."""
        return {"EXPERT_ROWS": self.expert_rows, "STRIDE": self.rows.stride(0), "K_ROWS": self.k_rows}


def _persistent(config: Config, like: Tensor, num_tiles: int, n: int) -> tuple[int]:
    return (min(num_tiles * math.ceil(n / config.block_n), config.programs * multiprocessors(like.device)),)


def _shape(config: Config) -> dict[str, Any]:
    return {
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def up(
    x: Tensor,
    weights: Sequence[Tensor],
    bias: Tensor | None,
    gate_weights: Tensor,
    pre: Tensor | None,
    hidden: Tensor | None,
    rows: Rows,
    *,
    gated: bool,
    activation: str,
    gate_weight_on: str,
    dropout: Dropout,
) -> None:
    """Fill ``pre`` (R, F or 2F) and ``hidden`` (R, F), each unless it is None, from x ``(T, H)``.

    ``weights`` is ``(E, F, H)``; gated, two of them that lie alike, gate and up, or one ``(E, 2 F, H)``.
    """
    plain = gate_weight_on == "output" and not dropout.p
    if gluon.up(x, weights, bias, pre, hidden, rows, gated, activation, plain):
        return
    apart = len(weights) == 2
    *gate, weight = (_Operand.of(each) for each in weights)
    h, f = weights[0].shape[2], weights[0].shape[1] // (1 if apart or not gated else 2)
    config = _config("up_gated" if gated else "up", x, rows.tile_rows, h, f)
    descriptor = weight.descriptor(config, h)
    gate_descriptor = gate[0].descriptor(config, h) if apart else None
    if apart and gate_descriptor is None:
        descriptor = None
    in_front = f if gated and not apart else 0  # of up, the gate
    launch(
        up_kernel,
        _persistent(config, x, rows.tiles.shape[0], f),
        x,
        descriptor or weight.rows,
        (gate_descriptor if descriptor else gate[0].rows) if apart else None,
        bias,
        gate_weights,
        dropout.seed,
        pre,
        hidden,
        rows.tiles,
        rows.expert_offsets,
        rows.row_to_token,
        rows.row_to_slot,
        rows.token_offsets,
        rows.tiles.shape[0],
        dropout.threshold,
        dropout.scale,
        H=h,
        F=f,
        UP_ROW=0 if weight.k_rows else in_front,
        UP_COLUMN=in_front if weight.k_rows else 0,
        APART=apart,
        **weight.options,
        ACTIVATION=activation,
        GATED=gated,
        BIAS=bias is not None,
        WEIGH_INPUT=gate_weight_on == "input",
        WEIGH_HIDDEN=gate_weight_on == "activation",
        DROPOUT=dropout.p > 0,
        STORE_PRE=pre is not None,
        STORE_HIDDEN=hidden is not None,
        DESCRIPTOR=descriptor is not None,
        PRECISION=_precision(x),
        BLOCK_M=rows.tile_rows,
        GROUP=config.group,
        PARTS=config.parts,
        FLATTEN=config.flatten,
        **_shape(config),
    )


def multiply_rows(
    kernel: str,
    a: Tensor,
    weight: Tensor | Sequence[Tensor],
    out: Tensor,
    rows: Rows,
    *,
    trans_b: bool,
    bias: Tensor | None = None,
    dropout: Dropout | None = None,
    x: Tensor | None = None,
    dots: Tensor | None = None,
) -> None:
    """``out[r] = a[r] @ weight[e]`` (transposed: ``@ weight[e].T``) for a ``(R, K)``, out ``(R, N)``.

    Args:
        kernel: ``down`` or ``row_grad``: whose launch shape.
        a, weight, out: ``(R, K)``, ``(E, K, N)`` (transposed ``(E, N, K)``), ``(R, N)``. Or two weights that lie
            alike, of which one takes the first half of K and the other the second.
        rows: where the rows are.
        trans_b: see ``weight``.
        bias: ``(E, N)``, added to every row of its expert.
        dropout: of the result.
        x, dots: fill ``dots`` (:func:`num_columns` of them, R) with ``<out[r], x[token of r]>`` in parts.
    """
    if gluon.multiply_rows(a, weight, out, rows, trans_b, bias, dots is None and not (dropout and dropout.p)):
        return
    weights = (weight,) if isinstance(weight, Tensor) else tuple(weight)
    first, *second = (_Operand.of(each, k_rows=not trans_b) for each in weights)
    k, n = a.shape[1] // len(weights), out.shape[1]
    config = _config(kernel, a, rows.tile_rows, k, n)
    descriptor_b = first.descriptor(config, k)
    second_b = second[0].descriptor(config, k) if second else None
    if second and second_b is None:
        descriptor_b = None
    halves_aligned = not second or k * a.element_size() % 16 == 0
    descriptor_a = _descriptor(a, rows.tile_rows, config.block_k) if halves_aligned else None
    dropout = dropout or Dropout(0.0, None)
    launch(
        rows_kernel,
        _persistent(config, a, rows.tiles.shape[0], n),
        descriptor_a or a,
        descriptor_b or first.rows,
        (second_b if descriptor_b else second[0].rows) if second else None,
        bias,
        out,
        rows.tiles,
        rows.expert_offsets,
        rows.row_to_token,
        rows.row_to_slot,
        rows.token_offsets,
        dropout.seed,
        x,
        dots,
        rows.tiles.shape[0],
        rows.num_rows,
        dropout.threshold,
        dropout.scale,
        K=k,
        N=n,
        **first.options,
        SECOND=bool(second),
        BIAS=bias is not None,
        DROPOUT=dropout.p > 0,
        DOTS=dots is not None,
        DESCRIPTOR_A=descriptor_a is not None,
        DESCRIPTOR_B=descriptor_b is not None,
        PRECISION=_precision(a),
        BLOCK_M=rows.tile_rows,
        GROUP=config.group,
        PARTS=config.parts,
        FLATTEN=config.flatten and not second,  # only one loop becomes one with the loop around it
        **_shape(config),
    )


def num_columns(kernel: str, like: Tensor, rows: Rows, k: int, n: int) -> int:
    """Tiles side by side in a result of n columns: how many parts a sum over them comes in."""
    return math.ceil(n / _config(kernel, like, rows.tile_rows, k, n).block_n)


def hidden_grad_name(dropout: Dropout, weight: Tensor) -> str:
    """Whose launch shape :func:`hidden_grad` takes: a mask in the epilogue, or a weight that is transposed in memory,
    needs registers that a wide tile uses up.
    """
    return "hidden_grad_dropout" if dropout.p or is_transposed(weight) else "hidden_grad"


def hidden_grad(
    grad_out: Tensor,
    weight: Tensor,
    pre: Tensor,
    gate_weights: Tensor,
    grad_pre: Tensor,
    hidden: Tensor | None,
    row_grads: Tensor | None,
    rows: Rows,
    *,
    gather: bool,
    gated: bool,
    activation: str,
    weighed: bool,
    dropout: Dropout,
) -> None:
    """Fill ``grad_pre``, the activation again (``hidden``) and, if ``weighed``, ``row_grads`` (:func:`num_columns`, R).

    ``grad_out`` is ``(T, H)`` to be gathered, or already ``(R, H)``.
    """
    plain, kept = gather and not dropout.p, (pre, gate_weights, grad_pre, hidden, row_grads)
    if gluon.hidden_grad(grad_out, weight, *kept, rows, gated, activation, weighed, plain):
        return
    h, f = weight.shape[-2:]
    config = _config(hidden_grad_name(dropout, weight), grad_out, rows.tile_rows, h, f)
    operand = _Operand.of(weight, k_rows=True)
    descriptor = operand.descriptor(config, h)
    launch(
        hidden_grad_kernel,
        _persistent(config, grad_out, rows.tiles.shape[0], f),
        grad_out,
        descriptor or operand.rows,
        pre,
        gate_weights,
        dropout.seed,
        grad_pre,
        hidden,
        row_grads,
        rows.tiles,
        rows.expert_offsets,
        rows.row_to_token,
        rows.row_to_slot,
        rows.token_offsets,
        rows.tiles.shape[0],
        rows.num_rows,
        dropout.threshold,
        dropout.scale,
        H=h,
        F=f,
        **operand.options,
        ACTIVATION=activation,
        GATED=gated,
        WEIGHED=weighed,
        DROPOUT=dropout.p > 0,
        STORE_HIDDEN=hidden is not None,
        GATHER=gather,
        DESCRIPTOR=descriptor is not None,
        PRECISION=_precision(grad_out),
        BLOCK_M=rows.tile_rows,
        GROUP=config.group,
        PARTS=config.parts,
        FLATTEN=config.flatten,
        **_shape(config),
    )


def weight_grad(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    rows: Rows,
    *,
    gather_a: bool = False,
    gather_b: bool = False,
    gate_weights: Tensor | None = None,
    accumulate: bool = False,
) -> None:
    """``out[e] = sum of outer(w[r] a[r], b[r])`` over e's rows: out ``(E, M, N)``, a of M and b of N columns.

    Args:
        a, b: ``(R, ...)``, or ``(T, ...)`` where they are to be gathered; rows contiguous.
        out: any floating dtype; each expert's rows, or its columns, contiguous.
        rows: where the rows are.
        gather_a, gather_b: read rows through ``row_to_token``.
        gate_weights: multiply rows of ``a`` by these; None for 1.
        accumulate: add to ``out`` instead of overwriting it.
    """
    if gluon.weight_grad(a, b, out, rows, gather_a, gather_b, accumulate, gate_weights is None):
        return
    if is_transposed(out):  # that of outer(b, a), the weight being part of either
        a, b, gather_a, gather_b, out = b, a, gather_b, gather_a, out.mT
    m, n = a.shape[1], b.shape[1]
    places = _Operand.of(out)
    config = _config("weight_grad", a, rows.tile_rows, m, n)
    # A gathered operand's row numbers are fetched a step ahead of its rows, which takes one stage from these.
    block_m = min(config.block_m, max(16, 1 << (m - 1).bit_length()))
    launch(
        weight_grad_kernel,
        (rows.num_experts * math.ceil(m / block_m) * math.ceil(n / config.block_n),),
        a,
        b,
        gate_weights,
        places.rows,
        rows.expert_offsets,
        rows.experts_by_load,
        rows.row_to_token,
        rows.row_to_slot,
        rows.token_offsets,
        M=m,
        N=n,
        A_STRIDE=a.stride(0),
        B_STRIDE=b.stride(0),
        EXPERT_ROWS=places.expert_rows,
        STRIDE=places.rows.stride(0),
        GATHER_A=gather_a,
        GATHER_B=gather_b,
        WEIGHED=gate_weights is not None,
        ACCUMULATE=accumulate,
        PRECISION=_precision(a),
        BLOCK_M=block_m,
        PARTS=config.parts,
        **{**_shape(config), "num_stages": config.num_stages - (not gather_a and not gather_b)},
    )


def expert_sums(a: Tensor, out: Tensor, rows: Rows, *, gather: bool, gate_weights: Tensor | None = None) -> None:
    """``out[e]`` = sum of ``w[r] a[r]`` over e's rows: out ``(E, N)``."""
    n = a.shape[1]
    launch(
        expert_sums_kernel,
        (rows.num_experts, math.ceil(n / 128)),
        a,
        gate_weights,
        out,
        rows.expert_offsets,
        rows.row_to_token,
        rows.row_to_slot,
        rows.token_offsets,
        N=n,
        GATHER=gather,
        WEIGHED=gate_weights is not None,
        BLOCK_N=128,
        BLOCK_K=32,
        num_warps=4,
    )


def bias_dots(grad_out: Tensor, bias: Tensor, dots: Tensor, rows: Rows, *, gather: bool) -> None:
    """``dots[r] = <grad_out[r], bias[e]>``: dots ``(R,)`` float32."""
    launch(
        bias_dots_kernel,
        (rows.tiles.shape[0],),
        grad_out,
        bias,
        dots,
        rows.tiles,
        rows.expert_offsets,
        rows.row_to_token,
        N=bias.shape[1],
        GATHER=gather,
        BLOCK_M=rows.tile_rows,
        BLOCK_N=64,
        num_warps=8 if rows.tile_rows == 128 else 4,  # rows that are not aligned would spill with 4
    )


def masked_rows(grad_y: Tensor, out: Tensor, rows: Rows, dropout: Dropout) -> None:
    """``out[r] = grad_y[token of r]`` under the expert dropout's mask: ``(T, H)`` to ``(R, H)``."""
    n = grad_y.shape[1]
    launch(
        masked_rows_kernel,
        (rows.tiles.shape[0], math.ceil(n / 64)),
        grad_y,
        out,
        dropout.seed,
        rows.tiles,
        rows.expert_offsets,
        rows.row_to_token,
        rows.row_to_slot,
        rows.token_offsets,
        dropout.threshold,
        dropout.scale,
        N=n,
        BLOCK_M=rows.tile_rows,
        BLOCK_N=64,
        num_warps=4,
    )


def combine(
    values: Tensor,
    gate_weights: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
    rows: Rows,
    *,
    row_grads: Tensor | None = None,
    gate_grads: Tensor | None = None,
) -> None:
    """``out[t] = residual[t] + sum of w[j] values[row of j]`` over t's assignments j, ``(R, H)`` to ``(T, H)``.

    With ``row_grads`` (parts, R) each assignment's sum over parts goes to ``gate_grads`` (N,).
    """
    num_tokens, h = out.shape
    num_parts = 0 if row_grads is None else row_grads.shape[0]
    assert rows.token_rows is not None
    slots = min(8, 1 << max(math.ceil(rows.token_rows.shape[0] / num_tokens) - 1, 0).bit_length())
    block = min(1024, max(16, 1 << (h - 1).bit_length()))
    launch(
        combine_kernel,
        (num_tokens, math.ceil(h / block)),
        values,
        gate_weights,
        residual,
        out,
        row_grads,
        gate_grads,
        rows.token_offsets,
        rows.token_rows,
        rows.num_rows,
        num_parts,
        rows.token_rows.shape[0],
        H=h,
        WEIGHED=gate_weights is not None,
        RESIDUAL=residual is not None,
        ROW_GRADS=row_grads is not None,
        PARTS=1 << max(num_parts - 1, 0).bit_length(),
        SLOTS=slots,
        BLOCK=block,
        num_warps=4 if block * slots >= 2048 else 1,
    )
