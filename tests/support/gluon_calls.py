"""Calls of the expert MLP that the Gluon kernels serve."""

from __future__ import annotations

import torch

from dmoe.ops._moe_mlp_call import Call
from dmoe.ops.tile_table import tile_table

TOKENS = 90


def with_slots(call):
    """The call with the indices by token made anew from ``row_to_token``."""
    token = call.row_to_token.long()
    real = (token >= 0).nonzero().squeeze(1)
    order = real[token[real].argsort(stable=True)]
    tokens = call.x.shape[0]
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), torch.bincount(token[real], minlength=tokens).cumsum(0)])
    slots = torch.zeros_like(token)
    slots[order] = torch.arange(len(order)) - offsets[token[order]]
    return call._replace(token_offsets=offsets.int(), row_to_slot=slots.int(), token_rows=order.int())


def make_call(
    seed=0,
    counts=(0, 150, 3, 128),
    hidden=136,
    ffn=72,
    gated=True,
    bias=False,
    holes=0,
    dtype=torch.float16,
    tokens=TOKENS,
    **fields,
):
    """A call whose experts have ``counts`` rows, of which ``holes`` hold no token, and rows behind them."""
    torch.manual_seed(seed)
    experts, rows = len(counts), sum(counts)
    offsets = torch.tensor([0, *counts]).cumsum(0).int()
    row_to_token = torch.full((rows + 40,), -1)
    row_to_token[:rows] = torch.randint(tokens, (rows,))
    row_to_token[torch.randperm(rows)[:holes]] = -1
    tiles, by_load = tile_table(offsets, rows + 40, 128)
    halves = (2,) if gated else ()

    def normal(*shape, scale=1.0):
        return (torch.randn(shape) * scale).to(dtype)

    call = Call(
        normal(tokens, hidden), torch.rand(int((row_to_token >= 0).sum())),
        normal(experts, *halves, ffn, hidden, scale=hidden**-0.5), normal(experts, hidden, ffn, scale=ffn**-0.5),
        normal(experts, *halves, ffn) if bias else None, normal(experts, hidden) if bias else None, offsets,
        row_to_token.int(), None, None, None, None, [], fields.pop("activation", "silu"), gated, "output", 0.0, 0.0,
        None, tiles, by_load, 128,
    )._replace(**fields)  # fmt: skip
    return with_slots(call)
