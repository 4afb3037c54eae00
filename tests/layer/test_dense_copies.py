"""Experts from a dense FFN: what is cut, what is drawn anew, and by which numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dmoe.dense_copies import generator_of, perturb, redraw, router_rows, segments


def ffn(width, hidden, seed=0):
    generator = torch.Generator().manual_seed(seed)
    gate, up = (torch.randn(width, hidden, generator=generator, dtype=torch.float64) for _ in range(2))
    return [gate, up], torch.randn(hidden, width, generator=generator, dtype=torch.float64)


def run(ups, down, x):
    gate, up = ups
    return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T


@settings(max_examples=20)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 6))
def test_an_ffn_is_the_mean_of_its_segments(granularity, step, hidden):
    ups, down = ffn(granularity * step, hidden)
    x = torch.randn(3, hidden, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    parts = segments(ups, down, granularity)
    assert [part[1].shape for part in parts] == [(hidden, step)] * granularity
    mean = torch.stack([run(*part, x) for part in parts]).mean(0)
    torch.testing.assert_close(mean, run(ups, down, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("granularity", [0, 4, 5])
def test_only_a_divisor_cuts_it(granularity):
    with pytest.raises(ValueError, match=f"expected a divisor of the FFN's width 6, got {granularity}"):
        segments(*ffn(6, 2), granularity)


def test_noise_has_the_size_that_was_asked_for():
    weight = 0.3 + 0.05 * torch.randn(200, 300, generator=torch.Generator().manual_seed(0))
    noisy = perturb(weight, 0.5, generator_of(1))
    assert torch.equal(noisy, perturb(weight, 0.5, generator_of(1)))
    noise = (noisy - weight) / (0.5 * weight.std())
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02
    assert abs(torch.corrcoef(torch.stack([noise.flatten(), weight.flatten()]))[0, 1]) < 0.02
    relative = perturb(weight, 0.5, generator_of(1), relative=True) / weight - 1
    torch.testing.assert_close(relative, 0.5 * noise, rtol=1e-3, atol=1e-3)
    half = perturb(weight.to(torch.bfloat16), 0.0, generator_of(1))
    assert torch.equal(half, weight.to(torch.bfloat16))


def test_columns_are_drawn_anew_and_the_same_in_all_projections():
    width, hidden = 160, 120
    ups, down = [weight.float() for weight in ffn(width, hidden)[0]], ffn(width, hidden)[1].float()
    ups[0], down = 0.1 * ups[0] + 3, 0.02 * down - 1
    (gate, up), new_down = redraw(ups, down, 0.3, generator_of(0))
    changed = [(gate != ups[0]).all(1), (up != ups[1]).all(1), (new_down != down).all(0)]
    assert changed[0].sum() == 48
    assert torch.equal(changed[0], changed[1])
    assert torch.equal(changed[0], changed[2])
    kept = ~changed[0]
    assert torch.equal(gate[kept], ups[0][kept])
    assert torch.equal(new_down[:, kept], down[:, kept])
    for new, old in ((gate[~kept], ups[0]), (up[~kept], ups[1]), (new_down[:, ~kept], down)):
        assert abs(new.mean() - old.mean()) < 0.06 * old.std()
        assert abs(new.std() / old.std() - 1) < 0.05
    for share, number in ((0, 0), (1, width)):
        assert (redraw(ups, down, share, generator_of(0))[1] != down).all(0).sum() == number


def test_a_groups_router_rows_are_one_row():
    rows = router_rows(50, 3, 400, 0.02, generator_of(0, "router"))
    assert rows.shape == (150, 400)
    groups = rows.view(50, 3, 400)
    assert torch.equal(groups, groups[:, :1].expand_as(groups))
    assert len(set(rows[:, 0].tolist())) == 50
    assert abs(rows.std() / 0.02 - 1) < 0.02


def test_random_numbers_belong_to_what_they_are_for():
    def first(*where):
        return torch.randn(4, generator=generator_of(*where)).tolist()

    assert first(0, "layer", 1) == first(0, "layer", 1)
    drawn = [first(0, "layer", 1), first(0, "layer", 2), first(1, "layer", 1), first(0, "layer", 1, "router")]
    assert len(set(map(tuple, drawn))) == 4
