"""Every expert's products by PyTorch's own operations: ``F.grouped_mm`` where that is one kernel, else one ``mm`` each.

``F.grouped_mm`` never waits for the host, but is one kernel for bfloat16 on Hopper and newer only; elsewhere PyTorch
itself loops over the groups. The loop here reads the offsets once for all products of a pass, and writes in place.
"""

from __future__ import annotations

import itertools
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class RowProducts(Protocol):
    """What a pass multiplies with: every expert's products over the rows of one plan."""

    def rows(self, a: Tensor, b: Tensor) -> Tensor:
        """``out[r] = a[r] @ b[e]``."""

    def sums(self, a: Tensor, b: Tensor, *, columns_first: bool = False) -> Tensor:
        """``out[e] = a_e^T @ b_e``."""

    def row_sums(self, a: Tensor) -> Tensor:
        """Of each expert's rows."""


class ExpertProducts:
    """Products over the rows of one plan."""

    def __init__(self, expert_offsets: Tensor, *operands: Tensor) -> None:
        """Decide for one pass.

        Args:
            expert_offsets: ``(E + 1,)`` int32.
            *operands: tensors whose last two dimensions and strides every product's sizes are made of.

        Raises:
            RuntimeError: a CUDA graph is being captured, and the products need the offsets on the host.
        """
        self.expert_offsets = expert_offsets
        self.grouped = grouped_mm_serves(*operands)
        if not self.grouped and expert_offsets.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "moe_mlp: a CUDA graph is being captured, and the products of plain PyTorch read the experts' loads on "
                "the host, but for bfloat16 of sizes that are multiples of 8 on sm_90 and newer; with the Triton "
                "kernels, run the layer once before capturing, so that they can be certified"
            )
        self.bounds = [] if self.grouped else expert_offsets.tolist()

    def rows(self, a: Tensor, b: Tensor) -> Tensor:
        """``out[r] = a[r] @ b[e]`` for the rows r of expert e: a ``(R, K)``, b ``(E, K, N)``, out ``(R, N)``.

        Rows behind the last expert's have any values.
        """
        if self.grouped:
            return F.grouped_mm(a, b, offs=self.expert_offsets[1:])
        out = a.new_empty(a.shape[0], b.shape[2])
        for e, (begin, end) in enumerate(itertools.pairwise(self.bounds)):
            torch.mm(a[begin:end], b[e], out=out[begin:end])
        out[self.bounds[-1] :] = 0  # a few rows, if any; compared with what a compiler made, they should be the same
        return out

    def sums(self, a: Tensor, b: Tensor, *, columns_first: bool = False) -> Tensor:
        """``out[e] = a_e^T @ b_e`` over the rows of expert e: ``(E, M, N)``, with contiguous columns if asked.

        Rows behind the last expert's are not read.
        """
        if columns_first:
            return self.sums(b, a).mT
        if self.grouped:
            out = F.grouped_mm(a.t(), b, offs=self.expert_offsets[1:])
            if torch.cuda.get_device_capability(a.device)[0] != 9:  # there alone an expert without rows gets zeros
                out.masked_fill_((self.expert_offsets.diff() == 0).view(-1, 1, 1), 0)
            return out
        out = a.new_empty(len(self.bounds) - 1, a.shape[1], b.shape[1])
        for e, (begin, end) in enumerate(itertools.pairwise(self.bounds)):
            torch.mm(a[begin:end].t(), b[begin:end], out=out[e])
        return out

    def row_sums(self, a: Tensor) -> Tensor:
        """Sum of each expert's rows ``(E, N)``, in float32 or wider, rounded once."""
        wide = torch.float64 if a.dtype == torch.float64 else torch.float32
        if self.grouped:
            offsets = self.expert_offsets.long()
            return torch.segment_reduce(a.to(wide), "sum", offsets=offsets, axis=0, unsafe=True, initial=0).to(a.dtype)
        sums = [a[begin:end].sum(0, dtype=wide) for begin, end in itertools.pairwise(self.bounds)]
        return torch.stack(sums).to(a.dtype)


def grouped_mm_serves(*operands: Tensor) -> bool:
    """Whether ``F.grouped_mm`` is one kernel for these: bfloat16, sm_90 or newer, rows that are 16-byte aligned."""
    first = operands[0]
    if not first.is_cuda or torch.version.hip is not None or first.dtype != torch.bfloat16 or not first.numel():
        return False
    if torch.cuda.get_device_capability(first.device)[0] < 9:
        return False
    sizes = (size for tensor in operands for size in (*tensor.shape[-2:], *tensor.stride()) if size != 1)
    return all(size % 8 == 0 for size in sizes) and all(tensor.data_ptr() % 16 == 0 for tensor in operands)
