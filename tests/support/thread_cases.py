"""Every operation, and whole layers, on shapes that PyTorch's threads share: what has the same bits for any number.

Run as a program with names of dtypes it prints, as JSON, what changes with the number of threads in each case: BLAS
library and oneDNN choose their code paths once a process.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import torch
from helpers import on_threads
from moe_mlp_cases import build
from quantized_cases import random_weights

import dmoe
from dmoe import losses, metrics, ops
from dmoe.compat import megablocks
from dmoe.compat.megablocks.layers.mlp import MLP
from dmoe.ops import moe_mlp as moe_mlp_op
from dmoe.ops.moe_mlp_deferred import defer, moe_mlp_deferred
from dmoe.ops.quantized_gemm import quantized_gemm
from dmoe.ops.router_top_k import TopKRule

THREADS = (1, 2, 3, 4)
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
CASES: dict[str, Callable[[torch.dtype], list[torch.Tensor]]] = {}
# Rows per expert, with a hot one, as sums over them are what libraries cut; PyTorch's own sums are cut from 32,768
# numbers on.
COUNTS, INNER, COLUMNS = (900, 0, 37, 200), 96, 80
TOKENS, EXPERTS, HIDDEN = 1100, 64, 96


def case(function):
    CASES[function.__name__] = function
    return function


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def offsets() -> torch.Tensor:
    return torch.tensor([0, *COUNTS]).cumsum(0).int()


def with_gradients(function, *leaves: torch.Tensor) -> list[torch.Tensor]:
    """The results, and the gradients of the leaves under a gradient of the results that is not even."""
    leaves = tuple(leaf.clone().requires_grad_() for leaf in leaves)
    results = function(*leaves)
    results = [results] if isinstance(results, torch.Tensor) else list(results)
    smooth = [one for one in results if one.requires_grad]
    seeds = [random(*one.shape, dtype=one.dtype, seed=9) for one in smooth]
    return [one.detach() for one in results] + list(torch.autograd.grad(smooth, leaves, seeds))


@case
def grouped_gemm(dtype):
    a, b = random(sum(COUNTS), INNER, dtype=dtype), random(len(COUNTS), COLUMNS, INNER, dtype=dtype, seed=1)
    return with_gradients(lambda a, b: ops.grouped_gemm(a, b, offsets()), a, b)


@case
def grouped_gemm_of_one_expert(dtype):
    end = torch.tensor([0, 2000], dtype=torch.int32)
    a, b = random(2000, INNER, dtype=dtype), random(1, COLUMNS, INNER, dtype=dtype, seed=1)
    return with_gradients(lambda a, b: ops.grouped_gemm(a, b, end), a, b)


@case
def grouped_gemm_of_few_rows(dtype):
    """Columns are cut, of the product and of a's gradient."""
    found = []
    for rows in (1, 50):
        a, b = random(rows, 600, dtype=dtype), random(1, 700, 600, dtype=dtype, seed=1)
        end = torch.tensor([0, rows], dtype=torch.int32)
        found += with_gradients(lambda a, b, end=end: ops.grouped_gemm(a, b, end), a, b)
    return found


@case
def grouped_gemm_weight(dtype):
    a, b = random(sum(COUNTS), INNER, dtype=dtype), random(sum(COUNTS), COLUMNS, dtype=dtype, seed=1)
    return with_gradients(lambda a, b: ops.grouped_gemm_weight(a, b, offsets()), a, b)


@case
def products_with_quantized_weights(dtype):
    """A hot expert whose rows are cut, columns that are, a single row; both ways, with an addend."""
    found = []
    for counts, rows, columns in ((COUNTS, 80, 128), ((2000,), 96, 64), ((1, 0), 700, 640), ((50,), 700, 640)):
        codes, scales, _ = random_weights("nf4", (1, 64), len(counts), rows, columns)
        ends = torch.tensor([0, *counts]).cumsum(0).int()
        for inner, out, trans_b in ((columns, rows, True), (rows, columns, False)):
            a, a2 = random(sum(counts), inner, dtype=dtype), random(sum(counts), 8, dtype=dtype, seed=1)
            b2 = random(len(counts), *((out, 8) if trans_b else (8, out)), dtype=dtype, seed=2)
            found.append(quantized_gemm(a, codes, scales, None, "nf4", [1, 64], ends, trans_b, a2, b2))
    return found


@case
def capacity_form(dtype):
    a, b = random(1, 1163, 256, dtype=dtype), random(1, 64, 256, dtype=dtype, seed=1)
    rows = random(1, 1163, 64, dtype=dtype, seed=2)
    return [
        *with_gradients(ops.grouped_gemm, a, b),
        *with_gradients(ops.grouped_gemm_weight, rows, a),
    ]


def mlp_call(dtype, **changed):
    drawn = {
        "tokens": 1100, "experts": 3, "top_k": 2, "hidden": 80, "sizes": 72, "activation": "silu", "gated": True,
        "bias": True, "gate_on": "output", "layout": "packed", "hot": True, "seed": 0,
    }  # fmt: skip
    return build(drawn | changed, dtype)[0]


def through(run, arguments, count: int = 6):
    """Values and gradients of an operation whose first ``count`` arguments are what it is differentiated in."""
    given = [i for i in range(count) if arguments[i] is not None]

    def function(*leaves):
        filled = list(arguments)
        for i, leaf in zip(given, leaves, strict=True):
            filled[i] = leaf
        return run(*filled)

    return with_gradients(function, *(arguments[i] for i in given))


@case
def mlp(dtype):
    return through(moe_mlp_op.moe_mlp, mlp_call(dtype))


@case
def mlp_of_different_widths(dtype):
    return through(moe_mlp_op.moe_mlp, mlp_call(dtype, sizes=[72, 8, 300], gate_on="input", gated=False))


@case
def mlp_of_one_block(dtype):
    return through(moe_mlp_op.moe_mlp, mlp_call(dtype, experts=1, top_k=1, tokens=90, hidden=700, sizes=500))


@case
def mlp_of_few_rows(dtype):
    """Columns are cut: of two experts of different widths in one block each, and of a single token's."""
    few = {"tokens": 70, "experts": 2, "top_k": 1, "hidden": 300, "sizes": [400, 136]}
    return [
        *through(moe_mlp_op.moe_mlp, mlp_call(dtype, **few)),
        *through(moe_mlp_op.moe_mlp, mlp_call(dtype, **few, gate_on="input", bias=False)),
        moe_mlp_op.moe_mlp(*mlp_call(dtype, tokens=1, experts=1, top_k=1, hidden=512, sizes=700))[0],
    ]


@case
def mlp_of_a_few_tokens(dtype):
    """Products of one row to a handful, in both orders of the weights."""
    few = {"tokens": 9, "experts": 8, "top_k": 2, "hidden": 600, "sizes": 272}
    return [
        *through(moe_mlp_op.moe_mlp, mlp_call(dtype, **few)),
        *through(moe_mlp_op.moe_mlp, mlp_call(dtype, **few, weights="transposed")),
        moe_mlp_op.moe_mlp(*mlp_call(dtype, tokens=1, experts=1, top_k=1, hidden=1100, sizes=1030))[0],
    ]


@case
def mlp_inference(dtype):
    with torch.no_grad():
        return [moe_mlp_op.moe_mlp(*mlp_call(dtype, gate_on="activation"))]


@case
def mlp_deferred(dtype):
    def run(*arguments):
        weights, later = defer(*arguments[2:6])
        return moe_mlp_deferred(later, *arguments[:2], *weights, *arguments[6:])

    few = mlp_call(dtype, tokens=60, experts=1, top_k=1, hidden=300, sizes=400)
    return through(run, mlp_call(dtype)) + through(run, few)


@case
def block_sparse(dtype):
    structure = ops.expert_topology(torch.tensor([0, 64, 320], dtype=torch.int32), 64, [128, 64], 5)
    a, b = random(320, 900, dtype=dtype), random(900, 192, dtype=dtype, seed=1)
    blocks = random(structure.row_indices.shape[0], 64, 64, dtype=dtype, seed=2)
    right, left = random(192, 200, dtype=dtype, seed=3), random(200, 320, dtype=dtype, seed=4)
    return [
        *with_gradients(lambda a, b: ops.block_sdd(a, b, *structure, 64), a, b),
        *with_gradients(lambda blocks, dense: ops.block_dsd(blocks, *structure, False, dense), blocks, right),
        *with_gradients(lambda dense, blocks: ops.block_dds(dense, blocks, *structure, False), left, blocks),
    ]


@case
def rows_to_tokens(dtype):
    _, weights, *_, expert_offsets, row_to_token, row_to_slot, token_offsets, token_rows = mlp_call(dtype)[:11]
    del expert_offsets
    rows = random(row_to_token.shape[0], 80, dtype=dtype)
    plan = (row_to_token, row_to_slot, token_offsets, token_rows)
    return [
        *with_gradients(lambda rows, weights: ops.unpermute(rows, weights, *plan), rows, weights),
        *with_gradients(
            lambda x: ops.permute(x, row_to_token, token_offsets, token_rows), random(1100, 80, dtype=dtype)
        ),
    ]


@case
def router(dtype):
    x, weight, bias = random(TOKENS, HIDDEN, dtype=dtype), random(EXPERTS, HIDDEN, seed=1), random(EXPERTS, seed=2)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return with_gradients(lambda x, w, b: ops.router_logits(x, w, b, dtype=wide), x, weight.to(wide), bias.to(wide))


@case
def router_in_its_inputs_dtype(dtype):
    x, weight = random(TOKENS, HIDDEN, dtype=dtype), random(8, HIDDEN, dtype=dtype, seed=1)
    seed = torch.tensor(3)
    return with_gradients(lambda x, w: ops.router_logits(x, w, jitter=0.1, seed=seed), x, weight)


@case
def scores_and_choices(dtype):
    logits = random(TOKENS, EXPERTS, dtype=dtype)

    def run(logits):
        scores, log_z = ops.router_scores(logits, with_log_z=True)
        chosen = ops.router_top_k(logits, TopKRule(4, normalization=1.0), with_log_z=True)
        weights = ops.gate_weights(scores, chosen.expert_indices, normalization=2.0)
        return scores, log_z, chosen.scores, chosen.log_z, chosen.gate_weights, weights

    return with_gradients(run, logits)


@case
def auxiliary_losses(dtype):
    logits = random(40_000, 4, dtype=dtype)
    mask = torch.arange(40_000) % 7 > 0
    wide = dtype if dtype == torch.float64 else torch.float32

    def run(logits):
        probs, log_z = ops.router_scores(logits.to(wide), with_log_z=True)
        chosen = ops.topk_indices(probs, 2)
        counts = torch.bincount(chosen.flatten().long(), minlength=4)
        return [
            losses.load_balancing_loss(probs, counts),
            losses.load_balancing_loss(probs, counts, mask),
            losses.sequence_load_balancing_loss(probs, chosen, 1),
            losses.sequence_load_balancing_loss(probs, chosen, 5, mask),
            losses.router_z_loss(log_z),
            losses.router_z_loss(log_z, mask),
            metrics.routing_entropy(probs.detach()),
        ]

    return with_gradients(run, logits)


@case
def integers(dtype):
    keys = torch.randint(0, 64, (100_000,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    sorted_keys, order = ops.sort(keys, 6)
    plan = ops.routing_plan(keys.view(-1, 2), 64, block_size=16, capacity=1500, choice_major=True)
    return [sorted_keys, order, ops.histogram(keys, 64), ops.inclusive_cumsum(keys, 0), *plan]


@case
def assignment(dtype):
    scores = random(TOKENS * 4 // EXPERTS * EXPERTS, EXPERTS, dtype=dtype)
    return [ops.balanced_assignment(scores), ops.balanced_assignment(scores.round())]  # the second is full of ties


def layer(dtype, **fields):
    torch.manual_seed(0)
    config = {"hidden_size": HIDDEN, "ffn_hidden_size": 72, "num_experts": 8, "top_k": 2, "init_std": 0.3}
    moe = dmoe.MoE(**(config | fields), dtype=dtype)
    x = random(2, 300, HIDDEN, dtype=dtype).requires_grad_()
    y = moe(x)
    total = (y * random(*y.shape, dtype=dtype, seed=1)).sum()
    loss = dmoe.aux_loss(moe)
    (total if loss is None else total + loss).backward()
    with torch.no_grad():
        evaluated = moe.eval()(x)
    return [y.detach(), evaluated, x.grad, *(p.grad for p in moe.parameters() if p.grad is not None)]


@case
def layer_with_everything(dtype):
    return layer(
        dtype, num_experts=64, top_k=4, shared_ffn_hidden_size=48, shared_expert_gate=True, bias="output",
        router_bias=True, router_z_loss_coefficient=0.1,
    )  # fmt: skip


@case
def layer_with_a_capacity(dtype):
    return layer(dtype, capacity_factor=1.0, bias="expert", score_function="sigmoid", router_dtype="input")


@case
def layer_of_expert_choice(dtype):
    return layer(dtype, router="expert_choice", capacity_factor=2.0, causal=False)


@case
def layer_of_block_sparse_experts(dtype):
    return layer(dtype, num_experts=3, ffn_hidden_size=[128, 64, 64], backend="block_sparse")


@case
def bins_through_an_activation_of_the_users(dtype):
    args = megablocks.Arguments(
        hidden_size=256, ffn_hidden_size=64, moe_num_experts=1, activation_fn=torch.tanh, fp16=False
    )
    experts = MLP(args).to(dtype)
    with torch.no_grad():
        for index, weight in enumerate(experts.parameters()):
            weight.copy_(random(*weight.shape, seed=index))
    return with_gradients(lambda x, *_: experts(x), random(1, 1163, 256, dtype=dtype, seed=5))


def changes(name: str, dtype: torch.dtype) -> list[str]:
    """Which results of a case have other bits with several threads than with one."""
    results = []
    for number in THREADS:
        with on_threads(number):
            results.append(CASES[name](dtype))
    found = []
    for number, several in zip(THREADS[1:], results[1:], strict=True):
        for index, (one, other) in enumerate(zip(results[0], several, strict=True)):
            if not torch.equal(one, other):
                found.append(f"result {index} with {number} threads")
    return found


if __name__ == "__main__":
    dtypes = [getattr(torch, name) for name in sys.argv[1:]]
    report = {f"{name} {dtype}": changes(name, dtype) for name in CASES for dtype in dtypes}
    print(json.dumps({name: found for name, found in report.items() if found}))
