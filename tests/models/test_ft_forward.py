"""MoEGPT against an independent implementation with FasterTransformer's semantics, from whole checkpoints."""

from __future__ import annotations

import pytest
import torch
from gpt_cases import FORWARD, reference_model

from dmoe.models import GenerationOptions, generate

CASES = [pytest.param(case, id=str(number)) for number, case in enumerate(FORWARD)]
TOLERANCES = [(torch.float64, 1e-9), (torch.float32, 2e-5)]
# ids, lengths and margins are what a search is to find; everything else is how.
FOUND = ("ids", "lengths", "least_logit_margin", "least_route_margin")


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_logits_of_every_position(case, dtype, tolerance):
    model = reference_model(case, dtype)
    for prompt, expected in zip(case["prompts"], case["logits"], strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt]))[0]
        assert logits.dtype == dtype
        exact = torch.tensor(expected, dtype=torch.float64)
        torch.testing.assert_close(logits.double(), exact, atol=tolerance, rtol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_every_token_takes_its_expert_with_its_probability(case, dtype, tolerance):
    model = reference_model(case, dtype)
    seen = {}
    for number, layer in ((n, model.blocks[n].ffn) for n in model.config.moe):
        layer.router.register_forward_hook(lambda _m, _x, routing, n=number: seen.__setitem__(n, routing))
    for prompt, routes in zip(case["prompts"], case["routes"], strict=True):
        with torch.no_grad():
            model(torch.tensor([prompt]))
        assert sorted(map(int, routes)) == sorted(seen)
        for number, expected in routes.items():
            routing = seen[int(number)]
            assert routing.expert_indices.flatten().tolist() == [expert for expert, _ in expected]
            weights = [p for _, p in expected]
            assert routing.gate_weights.flatten().tolist() == pytest.approx(weights, abs=tolerance, rel=0)
            assert int(routing.plan.tokens_per_expert.sum()) == len(prompt), "nothing is dropped"


@pytest.mark.parametrize("case", CASES)
def test_the_experts_output_bias_is_added(case):
    model = reference_model(case)
    for layer in model.moe_layers:
        layer.experts.down_bias.data.zero_()
    for prompt, expected in zip(case["prompts"], case["last_logits_without_expert_output_bias"], strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt]))[0, -1]
        torch.testing.assert_close(logits, torch.tensor(expected, dtype=torch.float64), atol=1e-9, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("batch_size", [None, 1, 2])
@pytest.mark.parametrize("case", CASES)
def test_continuations(case, batch_size, dtype):
    model = reference_model(case, dtype)
    for wanted in case["generate"]:
        how = {name: value for name, value in wanted.items() if name not in FOUND}
        found = generate(model, case["prompts"], GenerationOptions(**how), batch_size=batch_size)
        assert found.ids.tolist() == wanted["ids"], how
        assert found.lengths.tolist() == wanted["lengths"], how
        assert found.prompt_lengths.tolist() == list(map(len, case["prompts"]))
