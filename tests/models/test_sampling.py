"""The next token: draws against a plain loop and their probabilities, ties, the end, options that are refused."""

from __future__ import annotations

import math

import pytest
import torch
from gpt_cases import PROMPTS, continued, small_model
from hypothesis import given
from hypothesis import strategies as st

from dmoe.models import GenerationOptions, generate
from dmoe.models.sampling import adjusted_logits, choose, uniform_draws


@pytest.fixture(scope="module")
def model():
    return small_model(seed=9, tied_head=False)


@pytest.mark.parametrize(
    "search", [{"top_k": 5}, {"top_p": 0.8}, {"top_k": 7, "top_p": 0.6, "temperature": 2.0}, {"top_p": 1.0}], ids=str
)
def test_draws_are_the_plain_loop(model, search):
    """The first token, from the likeliest down, at which the sum of probabilities reaches draw * top_p * all."""
    options = GenerationOptions(output_len=8, end_id=7, seed=5, repetition_penalty=1.2, **search)

    def picker(draws):
        def pick(row, step):
            biggest = max(row)
            weights = sorted(((math.exp(z - biggest), -token) for token, z in enumerate(row)), reverse=True)
            weights = weights[: search.get("top_k", len(weights))]
            wanted = draws[step] * search.get("top_p", 1.0) * math.fsum(weight for weight, _ in weights)
            total = 0.0
            for weight, token in weights:
                total += weight
                if total >= wanted:
                    return -token
            return -weights[-1][1]

        return pick

    temperature = {name: search[name] for name in search if name == "temperature"}
    found = generate(model, PROMPTS, options)
    for n, prompt in enumerate(PROMPTS):
        pick = picker(uniform_draws(options, n).tolist())
        ids, _ = continued(model, prompt, output_len=8, end_id=7, pick=pick, repetition_penalty=1.2, **temperature)
        assert found.ids[n, : len(ids)].tolist() == ids
        assert found.lengths[n] == len(ids)
    for batch_size in (1, 2):
        assert torch.equal(generate(model, PROMPTS, options, batch_size=batch_size).ids, found.ids)
    others = [generate(model, PROMPTS, GenerationOptions(output_len=8, seed=seed, **search)).ids for seed in (5, 5, 6)]
    assert torch.equal(others[0], others[1])
    assert not torch.equal(others[0], others[2])


def test_equal_prompts_get_draws_of_their_own(model):
    found = generate(model, [[3, 4]] * 4, GenerationOptions(output_len=8, top_p=1.0, temperature=3.0))
    assert len({tuple(ids) for ids in found.continuations()}) > 1


def test_drawn_tokens_have_their_probabilities():
    logits = torch.tensor([2.0, -1.0, 1.0, 1.5, -3.0]).double()
    draws = (torch.arange(100_000).double() + 1) / 100_000

    def shares(**how):
        options = GenerationOptions(output_len=1, **how)
        chosen = choose(logits.expand(len(draws), 5), draws, options)
        return (chosen.bincount(minlength=5) / len(draws)).tolist()

    p = logits.softmax(0)
    top = torch.where(torch.tensor([True, False, True, True, False]), p, 0.0)
    assert shares(top_p=1.0) == pytest.approx(p.tolist(), abs=2e-5)
    assert shares(top_k=3) == pytest.approx((top / top.sum()).tolist(), abs=2e-5)
    cut = 0.7  # within the second: it counts up to there
    expected = [p[0] / cut, 0.0, 0.0, (cut - p[0]) / cut, 0.0]
    assert p[0] < cut < p[0] + p[3]
    assert shares(top_p=cut) == pytest.approx([float(share) for share in expected], abs=2e-5)
    assert shares(top_k=50) == pytest.approx(p.tolist(), abs=2e-5)
    assert shares(top_k=1) == shares() == shares(top_k=0, top_p=0.0) == shares(top_p=1e-9) == [1, 0, 0, 0, 0]


@given(st.lists(st.integers(-2, 2), min_size=1, max_size=6), st.integers(1, 7))
def test_of_equals_the_lowest_id_comes_first(values, top_k):
    logits = torch.tensor([values]).double()
    first = values.index(max(values))
    assert choose(logits, None, GenerationOptions(output_len=1)).item() == first
    least = torch.tensor([1e-12])
    assert choose(logits, least, GenerationOptions(output_len=1, top_k=top_k)).item() == first
    last = choose(logits, torch.tensor([1.0]), GenerationOptions(output_len=1, top_k=top_k)).item()
    halves = choose(torch.zeros(1, 2), torch.tensor([0.5]), GenerationOptions(output_len=1, top_p=1.0))
    assert halves.item() == 0, "reached is enough"
    order = sorted(range(len(values)), key=lambda n: (-values[n], n))
    assert last == order[min(top_k, len(values)) - 1]


def test_the_end_is_barred_and_may_lie_outside():
    logits, seen = torch.zeros(1, 3), torch.zeros(1, 3, dtype=torch.bool)
    options = GenerationOptions(output_len=4, end_id=1, min_length=2)
    rows = [adjusted_logits(logits, seen, step, options).isinf().tolist() for step in range(3)]
    assert rows == [[[False, True, False]], [[False, True, False]], [[False, False, False]]]
    outside = GenerationOptions(output_len=4, end_id=9, min_length=2)
    assert not adjusted_logits(logits, seen, 0, outside).isinf().any()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"output_len": 0}, "output_len: expected an integer of at least 1, got 0"),
        ({"end_id": -1}, "end_id: expected an integer of at least 0, or None, got -1"),
        ({"top_k": -1}, "top_k: expected an integer of at least 0, or None, got -1"),
        ({"top_p": 1.5}, r"top_p: expected a number in \[0, 1\], or None, got 1.5"),
        ({"temperature": 0.0}, "temperature: expected a number above 0, got 0.0"),
        ({"temperature": math.nan}, "temperature: expected a number above 0, got nan"),
        ({"repetition_penalty": -1.0}, "repetition_penalty: expected a number above 0, got -1.0"),
        ({"presence_penalty": math.inf}, "presence_penalty: expected a number, got inf"),
        ({"presence_penalty": 1.0, "repetition_penalty": 1.1}, "presence_penalty: expected 0 with repetition_penalty"),
        ({"min_length": True}, "min_length: expected an integer of at least 0, got True"),
        ({"seed": -1}, "seed: expected an integer of at least 0"),
    ],
    ids=str,
)
def test_bad_options_are_told(fields, message):
    with pytest.raises(ValueError, match=message):
        GenerationOptions(**{"output_len": 4, **fields})
