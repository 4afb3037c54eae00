"""router_logits on tensor cores: pieces whose sum is exact, and products against plain float64.

The interpreter multiplies bfloat16 wrongly, so there the kernels get float16 tokens, whose weights and gradients are
cut into float16 pieces by the same code.
"""

from __future__ import annotations

import pytest
import torch
from helpers import assert_as_accurate, nudged, where_kernels_run
from hypothesis import given, settings
from hypothesis import strategies as st

from dmoe.kernels.router_logits import grad_weight_parts
from dmoe.ops import router_logits as operation
from dmoe.ops.router_logits import (
    _in_pieces,
    cut,
    router_logits_pieces,
    router_logits_pieces_backward,
    router_logits_ref,
)

forward, backward = where_kernels_run(router_logits_pieces), where_kernels_run(router_logits_pieces_backward)
TOKENS = torch.bfloat16 if torch.cuda.is_available() else torch.float16


@given(st.integers(1, 5), st.integers(1, 300), st.integers(0, 2**20))
def test_three_pieces_of_a_float32_number_are_that_number(experts, hidden, seed):
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-60, 60, (experts, hidden), generator=generator)
    weight = torch.ldexp(torch.randn(experts, hidden, generator=generator), exponents)
    pieces = where_kernels_run(lambda w: cut(w, torch.bfloat16))(weight)
    assert pieces.shape == (3, experts, hidden)
    assert torch.equal(pieces.double().sum(0), weight.double())
    assert ((pieces[0].double() - weight).abs() <= weight.abs() / 64).all()  # what grad_x leaves out is small
    assert (pieces[2].double().abs() <= weight.abs() / 64**2).all()


def test_a_weight_of_the_tokens_type_is_its_own_piece():
    weight = torch.randn(3, 5).bfloat16()
    pieces = cut(weight, torch.bfloat16)
    assert pieces.shape == (1, 3, 5)
    assert pieces.data_ptr() == weight.data_ptr()


def check(tokens, experts, hidden, weight_dtype, biased, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, hidden, generator=generator).to(TOKENS)
    # Times 16: the third piece of a smaller number would be below what float16 holds. bfloat16 has no such floor.
    weight = (16 * torch.randn(experts, hidden, generator=generator)).to(weight_dtype)
    bias = torch.randn(experts, generator=generator).to(weight_dtype) if biased else None
    grad = 16 * torch.randn(tokens, experts, generator=generator)

    def products(x, weight, grad, dtype):
        """logits and both gradients in ``dtype``, rounded as the operation rounds them."""
        x, weight, grad = x.to(dtype), weight.to(dtype), grad.to(dtype)
        logits = x @ weight.T if bias is None else x @ weight.T + bias.to(dtype)
        return logits, grad @ weight, grad.T @ x

    logits = forward(x, weight, bias)
    grad_x, grad_weight = backward(grad, x, weight)
    assert (logits.dtype, grad_x.dtype, grad_weight.dtype) == (torch.float32, TOKENS, weight_dtype)
    copies = [(x, weight, grad), *((nudged(x), nudged(weight), nudged(grad)) for _ in range(2))]
    exact = products(x, weight, grad, torch.float64)
    dtypes = (torch.float32, TOKENS, weight_dtype)
    for i, (name, mine) in enumerate((("logits", logits), ("grad_x", grad_x), ("grad_weight", grad_weight))):
        own = [(products(*copy, torch.float32)[i].to(dtypes[i]), products(*copy, torch.float64)[i]) for copy in copies]
        assert_as_accurate(name, mine, exact[i], own)


@settings(max_examples=25)
@given(
    st.integers(0, 40), st.integers(1, 20), st.integers(1, 40), st.sampled_from([torch.float32, TOKENS]),
    st.booleans(), st.integers(0, 2**20),
)  # fmt: skip
def test_equals_plain_products(tokens, experts, hidden, weight_dtype, biased, seed):
    check(tokens, experts, hidden, weight_dtype, biased, seed)


@pytest.mark.parametrize(
    ("tokens", "experts", "hidden"),
    [(150, 150, 140), (1100, 3, 33), (65, 16, 256)],  # several blocks each way; several partial sums
)
def test_several_blocks(tokens, experts, hidden):
    check(tokens, experts, hidden, torch.float32, True, 1)


def test_partial_sums_cover_every_size():
    device = torch.device("cpu")
    assert grad_weight_parts(0, 8, 8, device) == 1
    assert grad_weight_parts(1100, 33, 3, device) == 3
    assert grad_weight_parts(2**20, 2048, 128, device) == 17  # 16 blocks of columns on 132 multiprocessors, twice
    assert grad_weight_parts(2**20, 64, 8, device) == 32


def test_strided_arguments_are_read_as_they_are():
    torch.manual_seed(0)
    x, weight, bias = torch.randn(12, 9).to(TOKENS).T, torch.randn(24, 5).T[:, ::2], torch.randn(10)[::2]
    torch.testing.assert_close(forward(x, weight, bias), router_logits_ref(x, weight, bias, torch.float32, 0.0, None))
    spread = torch.randn(()).expand(9, 5)
    grad_x, grad_weight = backward(spread, x, weight)
    torch.testing.assert_close(grad_x, (spread @ weight).to(TOKENS))
    torch.testing.assert_close(grad_weight, spread.T @ x.float())


def test_a_small_difference_of_large_gradients_reaches_the_tokens():
    grad = torch.tensor([[1 + 2.0**-12, -1.0]])  # both round to 1 in half precision
    grad_x, _ = backward(grad, torch.zeros(1, 3).to(TOKENS), torch.ones(2, 3))
    assert torch.equal(grad_x, torch.full((1, 3), 2.0**-12, dtype=TOKENS))


def test_infinite_bias_and_a_bad_token_stay_where_they_are():
    torch.manual_seed(0)
    x, weight = torch.randn(4, 6).to(TOKENS), torch.randn(3, 6)
    bias = torch.tensor([0.0, -torch.inf, 1.0])
    clean = forward(x, weight, bias)
    assert (clean[:, 1] == -torch.inf).all()
    x[2, 3] = torch.nan
    spoiled = forward(x, weight, bias)
    others = torch.tensor([0, 1, 3])
    assert torch.equal(spoiled[others], clean[others])
    assert spoiled[2].isnan().all()


@pytest.mark.parametrize(
    ("x", "weight", "dtype", "seeded", "taken"),
    [
        (torch.bfloat16, torch.float32, torch.float32, False, True),
        (torch.bfloat16, torch.bfloat16, torch.float32, False, True),
        (torch.bfloat16, torch.float32, torch.float32, True, False),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16, False, False),
        (torch.bfloat16, torch.float64, torch.float32, False, False),
        (torch.float16, torch.float32, torch.float32, False, False),
        (torch.float32, torch.float32, torch.float32, False, False),
    ],
)
def test_only_exact_pieces_are_taken(x, weight, dtype, seeded, taken):
    seed = torch.tensor(1) if seeded else None
    assert _in_pieces(torch.zeros(2, 3, dtype=x), torch.zeros(4, 3, dtype=weight), dtype, seed) == taken


@pytest.mark.gpu
def test_bfloat16_on_a_gpu_is_as_accurate_as_float32():
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(5000, 2048, generator=generator).bfloat16(), torch.randn(128, 2048, generator=generator)
    logits = operation(x.cuda(), weight.cuda(), dtype=torch.float32).cpu()
    exact = x.double() @ weight.double().T
    assert_as_accurate("logits", logits, exact, [(x.float() @ weight.T, exact)], slack_ulp=4)
