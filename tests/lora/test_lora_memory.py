"""What a step allocates and keeps: nothing as large as the weights of all experts, and r numbers a row."""

from __future__ import annotations

import copy

import pytest
import torch
from big_allocations import BigAllocations
from helpers import saved_bytes
from lora_cases import randomise

import dmoe

FIELDS = {"hidden_size": 48, "ffn_hidden_size": 40, "num_experts": 32, "top_k": 2, "load_balancing_coefficient": 0.0}
TOKENS, RANK = 24, 3
# The least of the tensors that must not be: one number for each of the down projections' weights.
LARGE = 32 * 48 * 40 * 4


def made(**fields):
    torch.manual_seed(0)
    return dmoe.MoE(**{**FIELDS, **fields}), torch.randn(TOKENS, 48, requires_grad=True)


@pytest.mark.parametrize(
    "fields",
    [{}, {"backend": "torch"}, {"gate_weight_on": "activation"}, {"bias": "expert", "recompute_pre_activation": True}],
    ids=str,
)
@pytest.mark.parametrize("several", [False, True])
def test_a_training_step_makes_nothing_as_large_as_all_experts(fields, several):
    layer, x = made(**fields)
    trained = dmoe.lora.add(layer, rank=RANK, targets=("*",), dropout=0.1)
    if several:
        trained |= dmoe.lora.add(layer, rank=RANK, targets=("*",), name="other", dropout=0.1)
    optimizer = torch.optim.AdamW(trained.values(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        with BigAllocations(LARGE, *layer.parameters(), own=True) as big:
            with dmoe.lora.use(layer, torch.arange(TOKENS) % 3 - 1) if several else torch.enable_grad():
                layer(x).square().sum().backward()
            optimizer.step()
        assert big.found == []
    assert all(parameter.grad is None for name, parameter in layer.named_parameters() if name not in trained)


def test_such_tensors_would_have_been_seen():
    layer, x = made()
    randomise(dmoe.lora.add(layer, rank=RANK, freeze=False).values())
    with BigAllocations(LARGE, *layer.parameters(), own=True) as big:
        layer(x).square().sum().backward()
    assert big.found  # the gradients of a base that is trained


@pytest.mark.parametrize("backend", [None, "torch"])
@pytest.mark.parametrize("recompute", [False, True])
def test_saved_are_the_closed_form_and_r_numbers_a_row(backend, recompute):
    """x, the pre-activation, the routing, and ``A x`` and ``A a``; of the first the rows are made again."""
    if backend == "torch" and recompute:
        backend = "grouped"
    layer, x = made(backend=backend, recompute_pre_activation=recompute)
    layer.requires_grad_(False)
    rows = TOKENS * 2
    totals = []
    for rank in (1, 4, 9):
        with_rank = copy.deepcopy(layer)
        dmoe.lora.add(with_rank, rank=rank)
        with saved_bytes(exclude=[x, *with_rank.parameters()]) as saved:
            with_rank(x)
        totals.append(saved.total)
    with saved_bytes(exclude=[x, *layer.parameters()]) as plain:
        layer(x)
    thin = rows * 4 * (1 if recompute else 2)  # A x is computed again with the pre-activation
    assert totals[1] - totals[0] == 3 * thin
    assert totals[2] - totals[0] == 8 * thin
    assert totals[0] - thin <= plain.total + 256
    pre = rows * 2 * 40 * 4
    assert (totals[0] >= pre) == (not recompute)


def test_an_adapter_of_every_tokens_own_keeps_r_numbers_a_row_too():
    layer, x = made()
    dmoe.lora.add(layer, rank=RANK)
    with saved_bytes(exclude=[x, *layer.parameters()]) as one:
        layer(x)
    for name in ("other", "third"):
        dmoe.lora.add(layer, rank=RANK, name=name)
    factors = sum(p.numel() for name, p in layer.named_parameters() if ".default." in name)
    with dmoe.lora.use(layer, torch.arange(TOKENS) % 4 - 1), saved_bytes(exclude=[x, *layer.parameters()]) as several:
        layer(x)
    stacked = 4 * 4 * factors  # of three adapters and none, side by side
    offsets = 4 * (32 * 4 + 1)
    assert several.total <= one.total + stacked + offsets + 1024
