"""topology against a dense mask of the activation matrix, written one element at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dmoe.ops.topology import topology, topology_ref

implementations = pytest.mark.parametrize("columns_of", [topology, topology_ref], ids=["op", "ref"])


@implementations
@settings(max_examples=50)
@given(
    blocks=st.lists(st.integers(0, 4) | st.just(0), min_size=1, max_size=8),
    block_size=st.integers(1, 5),
    ffn_blocks=st.integers(1, 4),
    spare=st.integers(0, 3),
    dtype=st.sampled_from([torch.int32, torch.int64]),
)
def test_equals_the_dense_mask(columns_of, blocks, block_size, ffn_blocks, spare, dtype):
    num_row_blocks = sum(blocks) + spare
    offsets = [0]
    for count in blocks:
        offsets.append(offsets[-1] + count * block_size)
    # Element (row, column) of the (rows, E * F) activation is used when the row's expert owns the column.
    used = torch.zeros(num_row_blocks * block_size, len(blocks) * ffn_blocks * block_size)
    for e in range(len(blocks)):
        for row in range(offsets[e], offsets[e + 1]):
            for column in range(e * ffn_blocks * block_size, (e + 1) * ffn_blocks * block_size):
                used[row, column] = 1
    tiles = used.view(num_row_blocks, block_size, len(blocks) * ffn_blocks, block_size).amax((1, 3)).tolist()
    expected = []
    for row in tiles:
        mine = [column for column, value in enumerate(row) if value]
        expected += mine or [-1] * ffn_blocks
    got = columns_of(torch.tensor(offsets, dtype=dtype), block_size, ffn_blocks, num_row_blocks)
    assert got.dtype == torch.int32
    assert got.tolist() == expected


@implementations
def test_no_rows_many_rows_and_a_view(columns_of):
    assert columns_of(torch.zeros(4, dtype=torch.int32), 8, 3, 0).tolist() == []
    assert columns_of(torch.zeros(4, dtype=torch.int32), 8, 3, 2).tolist() == [-1] * 6
    offsets = torch.tensor([0, 99, 16, 99, 48, 99])[::2]
    assert columns_of(offsets, 16, 2, 4).tolist() == [0, 1, 2, 3, 2, 3, -1, -1]
    counts = torch.randint(0, 90, (64,), generator=torch.Generator().manual_seed(0))
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]) * 128
    blocks = int(counts.sum())
    got = columns_of(offsets, 128, 56, blocks + 5).view(-1, 56)
    assert torch.equal(got[:blocks, 0], torch.repeat_interleave(torch.arange(64) * 56, counts).int())
    assert torch.equal(got[:blocks] - got[:blocks, :1], torch.arange(56, dtype=torch.int32).expand(blocks, 56))
    assert (got[blocks:] == -1).all()


@implementations
@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([4, 8], r"expert_offsets\[0\]: expected a multiple of block_size 4 in 0 .. 0 \(never falling\), got 4"),
        ([0, 8, 4], r"expert_offsets\[2\]: .* in 8 .. 12 \(never falling\), got 4"),
        ([0, 6, 8], r"expert_offsets\[1\]: expected a multiple of block_size 4 in 0 .. 12 .*, got 6"),
        ([0, 8, 16], r"expert_offsets\[2\]: .* in 8 .. 12 \(never falling\), got 16"),
    ],
)
def test_bad_offsets_are_named(columns_of, offsets, message):
    with pytest.raises(RuntimeError, match=message):
        columns_of(torch.tensor(offsets), 4, 2, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(3), 4, 2, 3), TypeError, "expert_offsets: expected dtype int32 or int64, got torch.float32"),
        ((torch.zeros(1).int(), 4, 2, 3), ValueError, r"expected shape \(E\+1,\), got \(1,\)"),
        ((torch.zeros(3, 1).int(), 4, 2, 3), ValueError, r"expected shape \(E\+1,\), got \(3, 1\)"),
        ((torch.zeros(3).int(), 0, 2, 3), ValueError, "block_size: expected at least 1, got 0"),
        ((torch.zeros(3).int(), 4, 0, 3), ValueError, "ffn_blocks_per_expert: expected at least 1, got 0"),
        ((torch.zeros(3).int(), 4, 2, -1), ValueError, "num_row_blocks: expected at least 0, got -1"),
        ((torch.zeros(3).int(), 4, 2**30, 0), ValueError, r"fewer than 2\*\*31 column blocks .*, got 2147483648"),
    ],
)
def test_errors_name_argument_and_values(arguments, error, message):
    with pytest.raises(error, match=message):
        topology(*arguments)


def test_registration():
    offsets = torch.tensor([0, 8, 8, 16], dtype=torch.int32)
    torch.library.opcheck(torch.ops.dmoe.topology.default, (offsets, 8, 3, 4))
