"""Block-sparse structures and integer values for tests, and the products as the kernels compute them."""

from __future__ import annotations

import functools

import torch

from dmoe.ops import block_sparse
from dmoe.ops.topology import BlockTopology

KERNELS = {
    "sdd": functools.partial(block_sparse._sdd, block_sparse.sdd_cuda),
    "dsd": functools.partial(block_sparse._dsd, block_sparse.spmm_cuda),
    "dds": functools.partial(block_sparse._dds, block_sparse.spmm_cuda),
}


def structure(used: list[list[bool]], tail: int = 0, behind: int = -1) -> BlockTopology:
    """Index tensors of a matrix with blocks where ``used``, and ``tail`` places that hold none, marked ``behind``."""
    columns = len(used[0]) if used else 0
    by_row = [(r, c) for r, line in enumerate(used) for c, flag in enumerate(line) if flag]
    by_column = sorted(by_row, key=lambda place: (place[1], place[0]))

    def offsets(lines: list[int], count: int) -> list[int]:
        return [sum(line < end for line in lines) for end in range(count + 1)]

    nothing = [behind] * tail
    lists = (
        [r for r, _ in by_row] + nothing,
        [c for _, c in by_row] + nothing,
        offsets([r for r, _ in by_row], len(used)),
        [r for r, _ in by_column] + nothing,
        offsets([c for _, c in by_column], columns),
        [by_row.index(place) for place in by_column] + nothing,
    )
    return BlockTopology(*(torch.tensor(values, dtype=torch.int32) for values in lists))


def integers(*shape, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-2, 3, shape, generator=generator).to(dtype)


def to_dense(data: torch.Tensor, topology: BlockTopology) -> torch.Tensor:
    block = data.shape[-1]
    shape = (topology.offsets.shape[0] - 1) * block, (topology.offsets_t.shape[0] - 1) * block
    dense = torch.zeros(shape, dtype=data.dtype)
    for i in range(int(topology.offsets[-1])):
        r, c = int(topology.row_indices[i]) * block, int(topology.column_indices[i]) * block
        dense[r : r + block, c : c + block] = data[i]
    return dense


def to_blocks(dense: torch.Tensor, topology: BlockTopology, block: int) -> torch.Tensor:
    data = dense.new_zeros(topology.row_indices.shape[0], block, block)
    for i in range(int(topology.offsets[-1])):
        r, c = int(topology.row_indices[i]) * block, int(topology.column_indices[i]) * block
        data[i] = dense[r : r + block, c : c + block]
    return data
