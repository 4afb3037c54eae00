"""One product per expert, over the rows that the plan gave it, and the weight gradient that goes with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dmoe.ops._checks import check_index_tensors
from dmoe.ops._library import compiled, count_flops, define, has_triton, register_autograd
from dmoe.ops._trust import Subject, kind_of, precision
from dmoe.ops.tile_table import preferred_tile_rows, tile_table
from dmoe.strides import is_transposed, readable

if TYPE_CHECKING:
    from dmoe.kernels.operands import Rows


def rows_of_experts(expert_offsets: Tensor, num_experts: int, rows: int) -> Iterator[tuple[slice, Tensor | None]]:
    """For each expert a slice that holds its rows, and a mask ``(R, 1)`` of the others in it, None without others.

    On the CPU the slice is exact. On CUDA its ends would have to come to the host, so it is all rows, and a mask.
    """
    if expert_offsets.device.type == "cpu":
        bounds = expert_offsets.tolist()
        yield from ((slice(bounds[e], bounds[e + 1]), None) for e in range(num_experts))
    else:
        row = torch.arange(rows, device=expert_offsets.device).unsqueeze(1)
        for e in range(num_experts):
            yield slice(0, rows), (row < expert_offsets[e]) | (row >= expert_offsets[e + 1])


def grouped_gemm_ref(a: Tensor, b: Tensor, expert_offsets: Tensor, trans_b: bool) -> Tensor:
    """Plain-PyTorch meaning of :func:`grouped_gemm`; on CUDA it multiplies every row by every expert."""
    out = a.new_zeros(a.shape[0], b.shape[1 if trans_b else 2])
    for e, (rows, others) in enumerate(rows_of_experts(expert_offsets, b.shape[0], a.shape[0])):
        product = a[rows] @ (b[e].t() if trans_b else b[e])
        out[rows] = product if others is None else torch.where(others, out, product)
    return out


def grouped_gemm_weight_ref(a: Tensor, b: Tensor, expert_offsets: Tensor, num_experts: int) -> Tensor:
    """Plain-PyTorch meaning of :func:`grouped_gemm_weight`; on CUDA it sums over every row for every expert."""
    out = a.new_zeros(num_experts, a.shape[1], b.shape[1])
    for e, (rows, others) in enumerate(rows_of_experts(expert_offsets, num_experts, a.shape[0])):
        left, right = a[rows], b[rows]
        if others is not None:  # filled, not multiplied by 0: they may hold NaN
            left, right = left.masked_fill(others, 0), right.masked_fill(others, 0)
        out[e] = left.t() @ right
    return out


def _autocast(op: Any, dtype: torch.dtype, a: Tensor, b: Tensor, *rest: Any) -> Tensor:
    """Like ``torch.mm``: products run in the autocast dtype, float64 stays."""
    a, b = (t if t.dtype == torch.float64 else t.to(dtype) for t in (a, b))
    return op(a, b, *rest)


def _fake(a: Tensor, b: Tensor, expert_offsets: Tensor, trans_b: bool) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1 if trans_b else 2])


def _fake_weight(a: Tensor, b: Tensor, expert_offsets: Tensor, num_experts: int) -> Tensor:
    return a.new_empty(num_experts, a.shape[1], b.shape[1])


# What CUDA runs where the Triton kernels do not serve: plain CUDA C++.
_portable = define(
    "grouped_gemm_portable(Tensor a, Tensor b, Tensor expert_offsets, bool trans_b) -> Tensor",
    grouped_gemm_ref,
    fake=_fake,
)
_portable_weight = define(
    "grouped_gemm_weight_portable(Tensor a, Tensor b, Tensor expert_offsets, SymInt num_experts) -> Tensor",
    grouped_gemm_weight_ref,
    fake=_fake_weight,
)


def triton_serves(a: Tensor, *others: Tensor) -> bool:
    """Whether the Triton kernels know the dtype, and there is something to multiply."""
    return has_triton() and a.dtype != torch.float64 and all(tensor.numel() for tensor in (a, *others))


def rows_in_tiles(a: Tensor, expert_offsets: Tensor) -> Rows:
    """What kernels are told of rows ``a``: their tiles, cut from offsets that are cut to their range."""
    from dmoe.kernels.operands import Rows

    num_rows, num_experts = a.shape[0], expert_offsets.shape[0] - 1
    offsets = expert_offsets.clamp(0, num_rows)
    tile_rows = preferred_tile_rows(num_rows, num_experts)
    tiles, by_load = tile_table(offsets, num_rows, tile_rows)
    return Rows(tiles, by_load, tile_rows, offsets, num_rows)


def _subjects(part: str) -> Callable[..., Sequence[Subject]]:
    def subjects(a: Tensor, b: Tensor, expert_offsets: Tensor, last: Any) -> Sequence[Subject]:
        if not triton_serves(a, b):
            return []
        asked = (a, b, expert_offsets, last)
        extra = (preferred_tile_rows(a.shape[0], expert_offsets.shape[0] - 1), precision())
        numbers = (kind_of(a), kind_of(b), last if isinstance(last, bool) else None)
        return [Subject(part, asked, extra, numbers)]

    return subjects


def grouped_gemm_cuda(a: Tensor, b: Tensor, expert_offsets: Tensor, trans_b: bool) -> Tensor:
    """The product on tensor cores."""
    if not triton_serves(a, b):
        return _portable(a, b, expert_offsets, trans_b)
    from dmoe.kernels.moe_mlp import multiply_rows

    if b.stride(-1) != 1 and b.stride(-2) == 1:  # a transposed view is the other order, without a copy
        b, trans_b = b.transpose(1, 2), not trans_b
    a, b = a.contiguous(), b.contiguous()
    out = a.new_zeros(a.shape[0], b.shape[1 if trans_b else 2])  # rows of no expert stay zeros
    kernel = "down" if trans_b else "row_grad"
    multiply_rows(kernel, a, b, out, rows_in_tiles(a, expert_offsets), trans_b=trans_b)
    return out


def grouped_gemm_weight_cuda(a: Tensor, b: Tensor, expert_offsets: Tensor, num_experts: int) -> Tensor:
    """The weight gradient on tensor cores."""
    if not triton_serves(a, b):
        return _portable_weight(a, b, expert_offsets, num_experts)
    from dmoe.kernels.moe_mlp import weight_grad

    a, b = a.contiguous(), b.contiguous()
    out = a.new_empty(num_experts, a.shape[1], b.shape[1])
    weight_grad(a, b, out, rows_in_tiles(a, expert_offsets))
    return out


def by_rows_or_columns(b: Tensor) -> Tensor:
    """Itself where kernels can read it as it lies, an expanded factor of all experts too; else a contiguous copy."""
    return readable(b) if b.stride(-1) == 1 or is_transposed(b) else b.contiguous()


grouped_gemm_op = define(
    "grouped_gemm(Tensor a, Tensor b, Tensor expert_offsets, bool trans_b) -> Tensor",
    grouped_gemm_ref,
    fake=_fake,
    cuda=grouped_gemm_cuda,
    composition=_portable,
    subjects=_subjects("grouped_gemm"),
    autocast=_autocast,
)

_grouped_gemm_weight = define(
    "grouped_gemm_weight(Tensor a, Tensor b, Tensor expert_offsets, SymInt num_experts) -> Tensor",
    grouped_gemm_weight_ref,
    fake=_fake_weight,
    cuda=grouped_gemm_weight_cuda,
    composition=_portable_weight,
    subjects=_subjects("grouped_gemm_weight"),
    autocast=_autocast,
)


def _save_factors(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, b, expert_offsets, ctx.last = inputs
    ctx.columns_first = is_transposed(b)  # and so b's gradient
    # Either factor is needed only for the other's gradient.
    needs_a, needs_b = ctx.needs_input_grad[:2]
    ctx.save_for_backward(a if needs_b else None, b if needs_a else None, expert_offsets)


def outer_sums(a: Tensor, b: Tensor, expert_offsets: Tensor, *, columns_first: bool) -> Tensor:
    """:func:`grouped_gemm_weight` as it is, or with contiguous columns ``(E, M, N)`` instead of rows."""
    num_experts = expert_offsets.shape[0] - 1
    if columns_first:
        return _grouped_gemm_weight(b, a, expert_offsets, num_experts).transpose(1, 2)
    return _grouped_gemm_weight(a, b, expert_offsets, num_experts)


# The gradient of each is made of both, through the public operations, so derivatives of any order exist.


def _grouped_gemm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    # y_r = a_r @ B_e gives da_r = dy_r @ B_e^T and dB_e = a_e^T @ dy_e; with trans_b, B_e = b_e^T.
    a, b, expert_offsets = ctx.saved_tensors
    trans_b = ctx.last
    grad_a = grad_b = None
    if ctx.needs_input_grad[0]:
        grad_a = grouped_gemm_op(grad, b, expert_offsets, not trans_b)
    if ctx.needs_input_grad[1]:
        left, right = (grad, a) if trans_b else (a, grad)
        grad_b = outer_sums(left, right, expert_offsets, columns_first=ctx.columns_first)
    return grad_a, grad_b, None, None


def _grouped_gemm_weight_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    # G_e = sum_r a_r^T b_r gives da_r = b_r @ dG_e^T and db_r = a_r @ dG_e.
    a, b, expert_offsets = ctx.saved_tensors
    grad_a = grouped_gemm_op(b, grad, expert_offsets, True) if ctx.needs_input_grad[0] else None
    grad_b = grouped_gemm_op(a, grad, expert_offsets, False) if ctx.needs_input_grad[1] else None
    return grad_a, grad_b, None, None


register_autograd(grouped_gemm_op, _grouped_gemm_backward, _save_factors)
register_autograd(_grouped_gemm_weight, _grouped_gemm_weight_backward, _save_factors)


def _even_offsets(a: Tensor) -> Tensor | None:
    """Offsets that say what the capacity form implies; None where the batched product of PyTorch serves.

    On the CPU that one is shared among threads by the BLAS library, so that bits depend on how many there are.
    """
    if a.device.type != "cpu" or not compiled:
        return None
    return torch.arange(a.shape[0] + 1, dtype=torch.int32) * a.shape[1]


def _check_factors(op: str, a: Tensor, b: Tensor, expert_offsets: Tensor | None) -> None:
    count_flops()
    for name, tensor in (("a", a), ("b", b)):
        if tensor.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            raise TypeError(f"{op}: {name}: expected float32, float64, bfloat16 or float16, got {tensor.dtype}")
    if a.dtype != b.dtype and (a.is_meta or not torch.is_autocast_enabled(a.device.type)):
        raise TypeError(f"{op}: b: expected {a.dtype} like a, got {b.dtype}")
    if a.device != b.device:
        raise ValueError(f"{op}: b: expected on {a.device} like a, got {b.device}")
    if a.ndim == 3:
        if expert_offsets is not None:
            raise ValueError(f"{op}: expert_offsets: expected None for a of shape {tuple(a.shape)}, which implies them")
        return
    if a.ndim != 2:
        raise ValueError(f"{op}: a: expected two dimensions, or three in the capacity form, got {tuple(a.shape)}")
    if expert_offsets is None:
        raise ValueError(f"{op}: expert_offsets: expected shape (E + 1,) for a of shape {tuple(a.shape)}, got None")
    check_index_tensors(op, a.device, expert_offsets=expert_offsets)


def grouped_gemm(a: Tensor, b: Tensor, expert_offsets: Tensor | None = None, *, trans_b: bool = True) -> Tensor:
    """Multiply each row by the matrix of its expert: ``out[r] = a[r] @ b[e].T`` for expert_offsets[e] <= r < [e + 1].

    Rows from ``expert_offsets[-1]`` on belong to no expert: they are not read, and their results are 0. Products are
    accumulated in float32 (float64 for float64), and rounded once. Differentiable any number of times. Under autocast
    it runs in the autocast dtype, like ``torch.mm``.

    Args:
        a: rows sorted by expert, packed or padded, ``(R, Kd)`` float32, float64, bfloat16 or float16; or the capacity
            form ``(E, capacity, Kd)``, which is a batched product.
        b: one matrix per expert, of the dtype of ``a``: ``(E, N, Kd)``, the order of ``nn.Linear``, or with
            ``trans_b=False`` ``(E, Kd, N)``. Transposed views are taken without a copy on the CPU and on CUDA.
        expert_offsets: ``(E + 1,)`` int32, the first row of each expert, a leading 0, ascending; None with three
            dimensions.
        trans_b: see ``b``.

    Returns:
        ``(R, N)``, or ``(E, capacity, N)``.

    Raises:
        TypeError: dtypes that are not supported, or disagree.
        ValueError: shapes or devices disagree.
        RuntimeError: offsets that do not ascend from 0 to at most R, on the CPU. On CUDA, where looking would need a
            transfer to the host, they are cut to that range.
    """
    _check_factors("grouped_gemm", a, b, expert_offsets)
    order = "(E, N, Kd)" if trans_b else "(E, Kd, N)"
    if b.ndim != 3 or b.shape[2 if trans_b else 1] != a.shape[-1]:
        raise ValueError(
            f"grouped_gemm: b: expected {order} with Kd = {a.shape[-1]} for a of shape {tuple(a.shape)}, "
            f"got {tuple(b.shape)}"
        )
    experts = a.shape[0] if expert_offsets is None else expert_offsets.shape[0] - 1
    if b.shape[0] != experts:
        raise ValueError(
            f"grouped_gemm: b: expected {experts} experts, as many as "
            f"{'a' if expert_offsets is None else 'expert_offsets'} has, got shape {tuple(b.shape)}"
        )
    if expert_offsets is not None:
        return grouped_gemm_op(a, b, expert_offsets, trans_b)
    even = _even_offsets(a)
    if even is None:
        return torch.bmm(a, b.transpose(1, 2) if trans_b else b)
    return grouped_gemm_op(a.flatten(0, 1), b, even, trans_b).unflatten(0, a.shape[:2])


def grouped_gemm_weight(
    a: Tensor, b: Tensor, expert_offsets: Tensor | None = None, num_experts: int | None = None
) -> Tensor:
    """Sum the outer products of each expert's rows: ``out[e] = a_e.T @ b_e``, 0 for an expert without rows.

    The weight gradient of :func:`grouped_gemm`: ``grouped_gemm_weight(dy, x, ...)`` for weights in ``nn.Linear`` order.
    Rows from ``expert_offsets[-1]`` on are not read. Precision, autocast and derivatives as for :func:`grouped_gemm`.

    Args:
        a: rows sorted by expert, ``(R, M)`` float32, float64, bfloat16 or float16; or the capacity form
            ``(E, capacity, M)``.
        b: the same rows, ``(R, N)`` or ``(E, capacity, N)``, of the dtype of ``a``.
        expert_offsets: ``(E + 1,)`` int32, the first row of each expert, a leading 0, ascending; None with three
            dimensions.
        num_experts: E, to be checked; None takes it from the shapes.

    Returns:
        ``(E, M, N)``.

    Raises:
        TypeError: dtypes that are not supported, or disagree.
        ValueError: shapes or devices disagree.
        RuntimeError: offsets that do not ascend from 0 to at most R, on the CPU; on CUDA they are cut to that range.
    """
    _check_factors("grouped_gemm_weight", a, b, expert_offsets)
    if b.shape[:-1] != a.shape[:-1]:
        raise ValueError(
            f"grouped_gemm_weight: b: expected the rows of a, of shape {tuple(a.shape)}, got shape {tuple(b.shape)}"
        )
    experts = a.shape[0] if expert_offsets is None else expert_offsets.shape[0] - 1
    if num_experts is not None and num_experts != experts:
        raise ValueError(
            f"grouped_gemm_weight: num_experts: expected {experts}, as many as "
            f"{'a' if expert_offsets is None else 'expert_offsets'} has, got {num_experts}"
        )
    if expert_offsets is not None:
        return _grouped_gemm_weight(a, b, expert_offsets, experts)
    even = _even_offsets(a)
    if even is None:
        return torch.bmm(a.transpose(1, 2), b)
    return _grouped_gemm_weight(a.flatten(0, 1), b.flatten(0, 1), even, experts)
