"""torch's symmetric memory on gloo ranks: a CPU kernel for the operation that has none, under torch's own schema.

The checks are those of ``nvshmem_extension.cu``, and one more: an exchange must not send from, or put its splits in,
what the one before it used, which others may still read.
"""

from __future__ import annotations

import contextlib
import math
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric

_allocated, _shared = {}, {}  # by address: tensors, and the names of the groups that know of them
_before = {}  # by group: what the last exchange used
sizes = []  # of the buffers of bytes, since `installed`


def empty(*size, dtype=None, device=None):
    tensor = torch.zeros(*size, dtype=dtype, device=device)
    _allocated[tensor.data_ptr()] = tensor
    if dtype == torch.uint8:
        sizes.append(tensor.numel())
        tensor.fill_(255)
    return tensor


def rendezvous(tensor, group):
    assert tensor.data_ptr() in _allocated
    shapes = [None] * dist.get_world_size(group)
    dist.all_gather_object(shapes, (tuple(tensor.shape), str(tensor.dtype)), group=group)
    assert len(set(shapes)) == 1, "symmetric memory has one shape and dtype on all ranks"
    _shared[tensor.data_ptr()] = group.group_name


def all_to_all_vdev_2d(input, out, in_splits, out_splits_offsets, group_name, major_align=None):
    group = dist.distributed_c10d._resolve_process_group(group_name)
    world, align = dist.get_world_size(group), 1 if major_align is None else major_align
    given = (input, out, in_splits, out_splits_offsets)
    assert all(t.is_contiguous() for t in given)
    assert all(_shared.get(t.data_ptr()) == group_name for t in given), "not symmetric memory of this group"
    assert world <= 32
    assert align > 0
    assert out_splits_offsets.shape == (2, in_splits.shape[0])
    assert in_splits.shape[0] % world == 0
    assert input.dtype == out.dtype
    assert input.stride(0) == out.stride(0)
    assert in_splits.dtype == out_splits_offsets.dtype == torch.int64
    experts = in_splits.shape[0] // world
    assert experts <= 16
    assert in_splits.min() >= 0
    assert in_splits.sum() <= input.shape[0], "sum of splits is larger than input dim"
    used = {input.data_ptr(), in_splits.data_ptr(), out_splits_offsets.data_ptr()}
    assert not used & _before.get(group_name, set()), "others may still read this"
    _before[group_name] = used
    arriving = torch.empty_like(in_splits)
    dist.all_to_all_single(arriving, in_splits, group=group)
    sent, received = (splits.view(world, experts).sum(1).tolist() for splits in (in_splits, arriving))
    rows = torch.empty(sum(received), *input.shape[1:], dtype=input.dtype)
    dist.all_to_all_single(rows, input[: sum(sent)].clone(), received, sent, group=group)
    pieces = rows.split(arriving.tolist())
    first, places = 0, []
    for expert in range(experts):
        start = first
        for rank in range(world):
            piece = pieces[rank * experts + expert]
            out[first : first + len(piece)] = piece
            assert first + len(piece) <= out.shape[0]
            places.append((len(piece), first))
            first += len(piece)
        first = start + max(math.ceil((first - start) / align) * align, align)
    out_splits_offsets.copy_(torch.tensor(places).T)


@contextlib.contextmanager
def installed():
    """As with NVSHMEM, on CPU tensors."""
    sizes.clear()
    library = torch.library.Library("symm_mem", "IMPL", "CPU")
    library.impl("all_to_all_vdev_2d", all_to_all_vdev_2d)
    fakes = {"empty": empty, "rendezvous": rendezvous, "is_nvshmem_available": lambda: True}
    try:
        with patch.multiple(symmetric, **fakes):
            yield
    finally:
        library._destroy()
        for held in (_allocated, _shared, _before):
            held.clear()
