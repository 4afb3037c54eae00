"""Generation against a plain loop over whole texts: searches, draws, batches, and what goes through the model."""

from __future__ import annotations

import math

import pytest
import torch
from gpt_cases import PROMPTS, continued, small_config, small_model

from dmoe import MoEConfig
from dmoe.models import GenerationOptions, MoEGPT, generate
from dmoe.routing import Hash

SEARCHES = [
    {},
    {"temperature": 0.7},
    {"temperature": 3.0, "repetition_penalty": 1.7},
    {"repetition_penalty": 1.4},
    {"repetition_penalty": 0.6, "min_length": 3},
    {"presence_penalty": 1.25, "temperature": 0.5},
    {"presence_penalty": -2.0},
    {"min_length": 20, "presence_penalty": 3.0},
]


@pytest.fixture(scope="module")
def model():
    return small_model(seed=9, tied_head=False)


@pytest.mark.parametrize("batch_size", [None, 2])
@pytest.mark.parametrize("search", SEARCHES, ids=str)
def test_greedy_search_is_the_plain_loop(model, search, batch_size):
    free = [continued(model, prompt, output_len=9, **search)[0] for prompt in PROMPTS]
    # Whatever comes third in the second sequence ends all of them, too.
    for end_id in (None, free[1][3]):
        how = {"output_len": 9, "end_id": -1 if end_id is None else end_id, **search}
        expected = [continued(model, prompt, **how) for prompt in PROMPTS]
        options = GenerationOptions(output_len=9, end_id=end_id, **search)
        found = generate(model, PROMPTS, options, batch_size=batch_size, log_probs=True)
        assert found.lengths.tolist() == [len(ids) for ids, _ in expected]
        assert found.ids.shape == (3, 16)
        for n, (ids, steps) in enumerate(expected):
            assert found.ids[n].tolist() == ids + [end_id or 0] * (16 - len(ids))
            chosen = ids[len(PROMPTS[n]) :]
            assert found.continuations()[n] == chosen
            logs = [torch.tensor(row).double().log_softmax(0)[t].item() for row, t in zip(steps, chosen, strict=True)]
            assert found.log_probs[n, : len(logs)].tolist() == pytest.approx(logs, abs=1e-6)
            assert not found.log_probs[n, len(logs) :].any()


def test_penalties_and_the_end_matter_in_these_cases(model):
    plain = [continued(model, prompt, output_len=9)[0] for prompt in PROMPTS]
    for search in SEARCHES[2:-1]:
        assert plain != [continued(model, prompt, output_len=9, **search)[0] for prompt in PROMPTS], search


@pytest.mark.parametrize("batch_size", [None, 1])
def test_a_prompt_goes_through_once_and_then_token_by_token(model, batch_size):
    """Until its own end: what has ended takes no expert while others go on."""
    widths, counted = [], []
    handles = [
        model.blocks[0].register_forward_pre_hook(lambda _m, args: widths.append(args[0].shape[1])),
        model.blocks[0].register_forward_pre_hook(lambda _m, args: counted.append(int(args[1].token_mask.sum()))),
    ]
    free = generate(model, PROMPTS, GenerationOptions(output_len=6), batch_size=batch_size)
    assert sum(counted) == sum(map(len, PROMPTS)) + 5 * 3
    assert widths == ([7, *[1] * 5] if batch_size is None else [7, *[1] * 5, 1, *[1] * 5, 4, *[1] * 5])
    counted.clear()
    ended = generate(model, PROMPTS, GenerationOptions(output_len=6, end_id=free.continuations()[1][2]))
    for handle in handles:
        handle.remove()
    lengths = list(map(len, ended.continuations()))
    assert min(lengths) < max(lengths), "one ends before another"
    assert sum(counted) == sum(map(len, PROMPTS)) + sum(length - 1 for length in lengths)


def test_it_stops_when_all_have_ended_and_the_bar_is_full(model):
    first = generate(model, [[5]], GenerationOptions(output_len=1)).ids[0, 1].item()
    steps, calls = [], []
    handle = model.blocks[0].register_forward_pre_hook(lambda _m, args: calls.append(args[0].shape))
    options = GenerationOptions(output_len=9, end_id=first)
    try:
        found = generate(model, [[5], [5]], options, progress=steps.append)
    finally:
        handle.remove()
    assert found.continuations() == [[first], [first]]
    assert len(calls) == 1
    assert sum(steps) == 9


H = {"hidden_size": 16, "ffn_hidden_size": 12, "num_experts": 4}
DEPENDENT = [
    pytest.param(MoEConfig(**H, top_k=1, capacity_factor=1.0), id="capacity"),
    pytest.param(MoEConfig(**H, top_k=2, capacity_factor=0.5, drop_order="batch_prioritized"), id="priority"),
    pytest.param(MoEConfig(**H, top_k=2, capacity_factor=1.0, token_groups="sequence"), id="sequence"),
    pytest.param(MoEConfig(**H, top_k=2, router="expert_choice", causal=False), id="expert choice"),
    pytest.param(MoEConfig(**H, top_k=1, router="sinkhorn", causal=False), id="sinkhorn"),
]


@pytest.mark.parametrize("layer", DEPENDENT)
@pytest.mark.parametrize("residual", [{}, {1: 8}], ids=["alone", "residual"])
def test_neighbours_and_padding_change_nothing_where_tokens_compete(layer, residual):
    model = small_model(seed=2, moe={1: layer}, residual=residual)
    options = GenerationOptions(output_len=7, presence_penalty=1.0)
    together = generate(model, PROMPTS, options)
    for n, prompt in enumerate(PROMPTS):
        alone = generate(model, [prompt], options)
        assert alone.continuations()[0] == together.continuations()[n]
    with torch.no_grad():  # the prompt sees itself as in a forward of it alone
        ids = torch.tensor([PROMPTS[0] + [0] * 3, PROMPTS[0][:2] + [0] * 8])
        mask = torch.arange(10) < torch.tensor([[7], [2]])
        padded = model(ids, token_mask=mask)
        torch.testing.assert_close(padded[0, :7], model(ids[:1, :7])[0], atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(padded[1, :2], model(ids[1:, :2])[0], atol=1e-12, rtol=1e-12)


def test_hash_layers_route_by_the_ids_that_are_generated():
    layer = MoEConfig(**H, top_k=1, router=Hash(vocab_size=30))
    model = small_model(seed=3, moe={0: layer}, residual={})
    options = GenerationOptions(output_len=6, presence_penalty=1.0)
    found = generate(model, PROMPTS, options)
    for n, prompt in enumerate(PROMPTS):
        ids, _ = continued(model, prompt, output_len=6, presence_penalty=1.0)
        assert found.continuations()[n] == ids[len(prompt) :]


def test_it_runs_in_evaluation_mode_and_gives_the_mode_back():
    model = small_model().train()
    model.blocks[1].eval()
    before = [module.training for module in model.modules()]
    modes = []
    handle = model.blocks[0].ffn.register_forward_hook(lambda m, _x, y: modes.append((m.training, y.requires_grad)))
    generate(model, PROMPTS, GenerationOptions(output_len=2))
    handle.remove()
    assert set(modes) == {(False, False)}
    assert [module.training for module in model.modules()] == before
    model(torch.tensor([[1, 2]])).sum().backward()  # nothing that generating left behind stands in the way


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_narrow_types(dtype):
    model = small_model(dtype=dtype)
    options = GenerationOptions(output_len=5, top_p=0.9)
    found = generate(model, PROMPTS, options, log_probs=True)
    assert found.lengths.tolist() == [12, 6, 9]
    assert torch.isfinite(found.log_probs).all()
    assert found.log_probs.dtype == torch.float32


BAD = [
    ([], {}, "prompts: expected at least one, got none"),
    ([[1], []], {}, "prompts: expected at least one id in each, got none in prompt 1"),
    ([[1, 30]], {}, r"prompts: expected ids in \[0, 30\), got 30 in prompt 0"),
    ([[-1]], {}, r"prompts: expected ids in \[0, 30\), got -1 in prompt 0"),
    ([[1], [2] * 16], {}, "expected at most 20 tokens in all, the model's max_positions, got 16 in prompt 1 and"),
    ([[1]], {"batch_size": 0}, "batch_size: expected at least 1, or None, got 0"),
]


@pytest.mark.parametrize(("prompts", "how", "message"), BAD, ids=str)
def test_bad_prompts_are_told(model, prompts, how, message):
    with pytest.raises(ValueError, match=message):
        generate(model, prompts, GenerationOptions(output_len=5), **how)


def test_the_last_position_may_be_used(model):
    found = generate(model, [[2] * 15, [1]], GenerationOptions(output_len=5))
    assert found.ids[0].tolist() == continued(model, [2] * 15, output_len=5)[0]


def test_nan_is_told():
    broken = MoEGPT(small_config())
    broken.norm.weight.data.fill_(math.nan)
    with pytest.raises(ValueError, match=r"expected numbers, got NaN for prompt 0 at step 0: .*float32"):
        generate(broken, [[2]], GenerationOptions(output_len=5))
