"""Launches of the expert MLP's products: which launch shape, which grid, which path to memory.

A :class:`Rows` says where the rows are; every function here writes into tensors it is given. What goes with the
products, row by row, is launched in :mod:`dmoe.kernels.moe_mlp_rows`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from dmoe.kernels import configs
from dmoe.kernels import gluon_moe_mlp as gluon
from dmoe.kernels._launch import launch
from dmoe.kernels.expert_mlp import hidden_grad_kernel, up_kernel
from dmoe.kernels.grouped_gemm import rows_kernel, weight_grad_kernel
from dmoe.kernels.operands import (
    Dropout,
    Operand,
    Product,
    Rows,
    activation_options,
    config_of,
    copy_descriptor,
    persistent,
    precision,
    shape_options,
)
from dmoe.strides import is_transposed


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
    interleaved: bool,
    activation: str,
    gate_weight_on: str,
    dropout: Dropout,
) -> None:
    """Fill ``pre`` (R, F or 2F) and ``hidden`` (R, F), each unless it is None, from x ``(T, H)``.

    ``weights`` is ``(E, F, H)``; gated, two of them that lie alike, gate and up, or one ``(E, 2 F, H)``, whose rows may
    be those of gate and up by turns, ``interleaved``. So may the numbers of ``bias (E, 2, F)``, dense in either order.
    """
    plain = gate_weight_on == "output" and not dropout.p and not interleaved and (bias is None or bias.is_contiguous())
    if gluon.up(x, weights, bias, pre, hidden, rows, gated, activation, plain):
        return
    apart = len(weights) == 2
    *gate, weight = (Operand.of(each) for each in weights)
    h, f = weights[0].shape[2], weights[0].shape[1] // (1 if apart or not gated else 2)
    config = config_of("up_gated" if gated else "up", x, rows.tile_rows, h, f)
    descriptor = weight.descriptor(config, h, halves=2 if interleaved else 1)
    gate_descriptor = gate[0].descriptor(config, h) if apart else None
    if apart and gate_descriptor is None:
        descriptor = None
    joined = weight.joined(config, f) if gated and not apart and not interleaved else None
    in_front = f if gated and not apart else 0  # of up, the gate
    launch(
        up_kernel,
        persistent(config, x, rows.tiles.shape[0], f),
        x,
        joined or descriptor or weight.rows,
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
        rows.num_experts,
        rows.tiles.shape[0],
        dropout.threshold,
        dropout.scale,
        H=h,
        F=f,
        UP_ROW=0 if weight.k_rows else in_front,
        UP_COLUMN=in_front if weight.k_rows else 0,
        APART=apart,
        JOINED=joined is not None,
        INTERLEAVED=interleaved,
        **weight.options,
        **activation_options(activation),
        GATED=gated,
        BIAS=bias is not None,
        BIAS_HALF=0 if bias is None or not gated else bias.stride(1),
        BIAS_STEP=1 if bias is None else bias.stride(-1),
        WEIGH_INPUT=gate_weight_on == "input",
        WEIGH_HIDDEN=gate_weight_on == "activation",
        DROPOUT=dropout.p > 0,
        STORE_PRE=pre is not None,
        STORE_HIDDEN=hidden is not None,
        DESCRIPTOR=descriptor is not None,
        PRECISION=precision(x),
        BLOCK_M=rows.tile_rows,
        GROUP=config.group,
        PARTS=config.parts,
        FLATTEN=config.flatten
        and (joined is not None or interleaved or not gated),  # two products a step: the assembler gives up
        **shape_options(config),
    )


def multiply_rows(
    kernel: str,
    a: Tensor,
    weight: Tensor | Sequence[Tensor],
    out: Tensor,
    rows: Rows,
    *,
    trans_b: bool,
    second: tuple[Tensor, Tensor] | None = None,
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
        second: ``a2 (R, K2)`` and its weight, likewise, for ``+ a2[r] @ weight2[e]``, before anything is rounded.
        bias: ``(E, N)``, added to every row of its expert.
        dropout: of the result.
        x, dots: fill ``dots`` (:func:`num_columns` of them, R) with ``<out[r], x[token of r]>`` in parts.
    """
    plain = second is None and dots is None and not (dropout and dropout.p)
    if gluon.multiply_rows(a, weight, out, rows, trans_b, bias, plain):
        return
    if not isinstance(weight, Tensor):
        weight, *other = weight
        if other:
            middle = a.shape[1] // 2
            a, second = a[:, :middle], (a[:, middle:], other[0])
    k, n = a.shape[1], out.shape[1]
    config = config_of(kernel, a, rows.tile_rows, k, n)
    product = Product.of(a, weight, config, rows.tile_rows, trans_b=trans_b)
    thin = Product.second_of(second, config, rows.tile_rows, trans_b=trans_b)
    dropout = dropout or Dropout(0.0, None)
    launch(
        rows_kernel,
        persistent(config, a, rows.tiles.shape[0], n),
        product.a,
        product.weight,
        None if thin is None else thin.a,
        None if thin is None else thin.weight,
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
        rows.num_experts,
        rows.tiles.shape[0],
        rows.num_rows,
        dropout.threshold,
        dropout.scale,
        N=n,
        **product.options,
        **(thin.second_options() if thin else Product.no_second_options()),
        BIAS=bias is not None,
        DROPOUT=dropout.p > 0,
        DOTS=dots is not None,
        PRECISION=precision(a),
        BLOCK_M=rows.tile_rows,
        GROUP=config.group,
        PARTS=config.parts,
        # Only one loop becomes one with the loop around it; a second product of one step is none.
        FLATTEN=config.flatten and (thin is None or thin.one_step),
        **shape_options(config),
    )


def num_columns(kernel: str, like: Tensor, rows: Rows, k: int, n: int) -> int:
    """Tiles side by side in a result of n columns: how many parts a sum over them comes in."""
    return math.ceil(n / config_of(kernel, like, rows.tile_rows, k, n).block_n)


def hidden_grad_name(dropout: Dropout, weight: Tensor, activation: str, interleaved: bool) -> str:
    """Whose launch shape :func:`hidden_grad` takes."""
    return configs.hidden_grad_name(activation, dropout.p, is_transposed(weight), interleaved)


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
    interleaved: bool,
    activation: str,
    weighed: bool,
    dropout: Dropout,
) -> None:
    """Fill ``grad_pre``, the activation again (``hidden``) and, if ``weighed``, ``row_grads`` (:func:`num_columns`, R).

    ``grad_out`` is ``(T, H)`` to be gathered, or already ``(R, H)``. ``interleaved``: columns of ``grad_pre`` are those
    of gate and up by turns.
    """
    h, f = weight.shape[-2:]
    config = config_of(hidden_grad_name(dropout, weight, activation, interleaved), grad_out, rows.tile_rows, h, f)
    plain, kept = gather and not dropout.p and not interleaved, (pre, gate_weights, grad_pre, hidden, row_grads)
    if gluon.hidden_grad(grad_out, weight, *kept, rows, gated, activation, weighed, plain, config.block_n):
        return
    operand = Operand.of(weight, k_rows=True)
    descriptor = operand.descriptor(config, h)
    launch(
        hidden_grad_kernel,
        persistent(config, grad_out, rows.tiles.shape[0], f),
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
        rows.num_experts,
        rows.tiles.shape[0],
        rows.num_rows,
        dropout.threshold,
        dropout.scale,
        H=h,
        F=f,
        **operand.options,
        **activation_options(activation),
        GATED=gated,
        INTERLEAVED=interleaved,
        WEIGHED=weighed,
        DROPOUT=dropout.p > 0,
        STORE_HIDDEN=hidden is not None,
        GATHER=gather,
        DESCRIPTOR=descriptor is not None,
        PRECISION=precision(grad_out),
        BLOCK_M=rows.tile_rows,
        GROUP=config.group,
        PARTS=config.parts,
        FLATTEN=config.flatten,
        **shape_options(config),
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
    places = Operand.of(out)
    config = config_of("weight_grad", a, rows.tile_rows, m, n)
    # A gathered operand's row numbers are fetched ahead of its rows: half of the stages are theirs.
    stages = config.num_stages if gather_a or gather_b else config.num_stages // 2 + 1
    block_m = min(config.block_m, max(16, 1 << (m - 1).bit_length()))
    descriptor_a = descriptor_b = None
    if gate_weights is None and not gather_b:
        descriptor_b = copy_descriptor(b, config.block_k, config.block_n)
    elif gate_weights is None and not gather_a:
        descriptor_a = copy_descriptor(a, config.block_k, block_m)
    launch(
        weight_grad_kernel,
        (rows.num_experts * math.ceil(m / block_m) * math.ceil(n / config.block_n),),
        a,
        b,
        descriptor_a or descriptor_b,
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
        DESCRIPTOR_A=descriptor_a is not None,
        DESCRIPTOR_B=descriptor_b is not None,
        WEIGHED=gate_weights is not None,
        ACCUMULATE=accumulate,
        PRECISION=precision(a),
        BLOCK_M=block_m,
        PARTS=config.parts,
        **{**shape_options(config), "num_stages": stages},
    )
