"""``sdd``, ``dsd`` and ``dds`` on ``stk.Matrix``: dmoe's kernels behind the calls that users of stanford-stk know.

The matrix type is stk's (Gale et al. 2022), an optional dependency that is imported at the first call; the products
are dmoe's, so blocks of 16 to 128, bfloat16, float16 and float32, more than 32,767 block rows, the CPU, and structures
with an unused tail all work. Indices may be int16, as stk makes them, or int32, as all results have them; because
``Matrix.validate()`` admits int16 and float16 only, it is not called.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dmoe.ops._library import count_flops
from dmoe.ops.block_sparse import BLOCK_SIZES, block_dds, block_dsd, block_sdd
from dmoe.ops.topology import BlockTopology


def _matrix_type(op: str) -> Any:
    try:
        from stk import Matrix
    except ImportError as error:
        raise ImportError(
            f"{op}: block-sparse matrices are stk.Matrix, and stanford-stk is not installed; install it with "
            "`pip install 'dmoe[sparse]'`, or use dmoe.ops.block_sdd, block_dsd and block_dds on plain tensors"
        ) from error
    return Matrix


def sparse_matrix(size: tuple[int, int], data: Tensor, topology: BlockTopology) -> Any:
    """An ``stk.Matrix`` of a structure that dmoe made, for instance by :func:`dmoe.ops.expert_topology`.

    Args:
        size: (M, N) in elements.
        data: ``(nnz, B, B)``.
        topology: its structure.

    Returns:
        ``stk.Matrix`` that shares all these tensors. Its ``validate()`` refuses int32 indices; the products take them.
    """
    return _matrix_type("sparse_matrix")(torch.Size(size), data, *topology)


def _check(op: str, name: str, value: Any) -> None:
    count_flops()
    if not isinstance(value, _matrix_type(op)):
        raise TypeError(f"{op}: {name}: expected an stk.Matrix, got {type(value).__name__}")
    if value.data.dim() != 3 or value.data.shape[1] != value.data.shape[2] or value.blocking not in BLOCK_SIZES:
        raise ValueError(
            f"{op}: {name}: expected blocks of 16, 32, 64 or 128 as data (nnz, B, B), got {tuple(value.data.shape)}"
        )


def _check_dense(op: str, name: str, value: Any, like: Any, extent: int | None, dim: int) -> None:
    """``extent``: what the sparse factor wants of dimension ``dim``; None where the structure's rows are meant."""
    if not isinstance(value, Tensor) or value.dim() != 2:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{op}: {name}: expected a tensor of two dimensions, got {got}")
    if extent is not None and value.shape[dim] != extent:
        raise ValueError(
            f"{op}: {name}: expected {extent} {('rows', 'columns')[dim]} for a sparse matrix of size "
            f"{tuple(like.size())}, got shape {tuple(value.shape)}"
        )
    # The structure's device: the values of one that only says where blocks are may be nowhere (on ``meta``).
    device = like.offsets.device
    if value.device != device:
        raise ValueError(f"{op}: {name}: expected on {device} like the sparse matrix, got {value.device}")


def _check_values(op: str, name: str, value: Any) -> None:
    """Where values are multiplied, they lie where their structure does."""
    if value.data.device != value.offsets.device:
        raise ValueError(
            f"{op}: {name}: expected values on {value.offsets.device} like their structure, got {value.data.device}"
        )


def _same_dtype(op: str, a: Tensor, b: Tensor) -> None:
    if not a.is_floating_point() or (a.dtype != b.dtype and not torch.is_autocast_enabled(a.device.type)):
        raise TypeError(f"{op}: expected two factors of one floating-point dtype, got {a.dtype} and {b.dtype}")


def _topology(matrix: Any) -> BlockTopology:
    """Its structure as stored (not transposed), int32."""
    parts = (
        matrix.row_indices,
        matrix.column_indices,
        matrix.offsets,
        matrix.column_indices_t,
        matrix.offsets_t,
        matrix.block_offsets_t,
    )
    return BlockTopology(*(part.to(torch.int32).contiguous() for part in parts))


def sdd(a: Tensor, b: Tensor, topology: Any) -> Any:
    """Dense times dense, where ``topology`` has blocks: ``a @ b`` masked, stored sparse.

    Args:
        a: ``(M, K)`` floating point, any strides (``x.t()`` is read in place).
        b: ``(K, N)``, likewise.
        topology: ``stk.Matrix`` of size (M, N), not transposed; its values are not looked at.

    Returns:
        ``stk.Matrix`` of ``topology``'s structure with int32 indices, in a's dtype; differentiable in ``a`` and ``b``.
        Blocks behind the structure's used part hold zeros.

    Raises:
        ImportError: stanford-stk is not installed.
        TypeError, ValueError: something else than a matrix, or shapes, dtypes or devices that do not fit.
    """
    _check("sdd", "topology", topology)
    if not topology.is_contiguous():
        raise ValueError("sdd: topology: expected a matrix that is not transposed, got a transposed one")
    rows, columns = topology.size()
    _check_dense("sdd", "a", a, topology, rows, 0)
    _check_dense("sdd", "b", b, topology, columns, 1)
    if a.shape[1] != b.shape[0]:
        raise ValueError(f"sdd: expected a (M, K) and b (K, N), got {tuple(a.shape)} and {tuple(b.shape)}")
    _same_dtype("sdd", a, b)
    structure = _topology(topology)
    return sparse_matrix(topology.size(), block_sdd(a, b, *structure, topology.blocking), structure)


def dsd(a: Any, b: Tensor) -> Tensor:
    """Sparse times dense: ``a @ b``.

    Args:
        a: ``stk.Matrix`` (M, K), or the ``.t()`` of one.
        b: ``(K, N)`` floating point in a's dtype, any strides.

    Returns:
        ``(M, N)`` contiguous, zero in block rows without blocks; differentiable in ``a.data`` and ``b``.

    Raises:
        ImportError: stanford-stk is not installed.
        TypeError, ValueError: something else than a matrix, or shapes, dtypes or devices that do not fit.
    """
    _check("dsd", "a", a)
    _check_dense("dsd", "b", b, a, a.size()[1], 0)
    _check_values("dsd", "a", a)
    _same_dtype("dsd", a.data, b)
    return block_dsd(a.data, *_topology(a), not a.is_contiguous(), b)


def dds(a: Tensor, b: Any) -> Tensor:
    """Dense times sparse: ``a @ b``.

    Args:
        a: ``(M, K)`` floating point in b's dtype, any strides.
        b: ``stk.Matrix`` (K, N), or the ``.t()`` of one.

    Returns:
        ``(M, N)`` contiguous, zero in block columns without blocks; differentiable in ``a`` and ``b.data``.

    Raises:
        ImportError: stanford-stk is not installed.
        TypeError, ValueError: something else than a matrix, or shapes, dtypes or devices that do not fit.
    """
    _check("dds", "b", b)
    _check_dense("dds", "a", a, b, b.size()[0], 1)
    _check_values("dds", "b", b)
    _same_dtype("dds", b.data, a)
    return block_dds(a, b.data, *_topology(b), not b.is_contiguous())
