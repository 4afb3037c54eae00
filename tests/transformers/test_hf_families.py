"""Every family behind the experts interface equals "eager": outputs and gradients of a tiny model, and its experts.

A third of them in turn, and all with gates of their own; ``DMOE_FAMILIES=all`` takes all (`make test-transformers`).
"""

from __future__ import annotations

import copy
import datetime
import os
import threading

import hf_families
import pytest
import torch
from helpers import assert_as_accurate, nudged

import dmoe.integrations.transformers as on_transformers
from dmoe.integrations.transformers import experts as dmoe_side

on_transformers.register()

# What no third may leave out: a family of each path, and all gates that are no plain activation.
ALWAYS = (
    "aria beam deepseek_v4 gemma4 glm5_next gpt_oss hy_v4 hy_v4_vl inkling2 "
    "inkling2_loop minimax_m3_vl mixtral muse_spark nemotron_h openai_privacy_filter"
)


def chosen():
    wanted = os.environ.get("DMOE_FAMILIES", str(datetime.date.today().isocalendar().week % 3))
    every = hf_families.families()
    return [f for i, f in enumerate(every) if wanted == "all" or f in ALWAYS.split() or i % 3 == int(wanted)]


@pytest.fixture
def computed_by(monkeypatch):
    """What dmoe computed, as one operation or piece by piece."""
    calls = []
    for path in ("moe_mlp", "composed_experts"):
        place = dmoe_side if path == "composed_experts" else dmoe_side.dmoe.functional
        monkeypatch.setattr(place, path, _counting(getattr(place, path), path, calls))
    return calls


def _counting(function, path, calls):
    def counted(*args, **kwargs):
        if threading.current_thread() is threading.main_thread():  # gates are recognised in another
            calls.append(path)
        return function(*args, **kwargs)

    return counted


def outputs_and_grads(model, implementation):
    hf_families.set_implementation(model, implementation)
    model.zero_grad()
    y = hf_families.run(model)
    torch.manual_seed(1)
    (y * torch.randn(y.shape).to(y.dtype)).sum().backward()  # the same numbers for every dtype
    grads = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    return y.detach(), grads


@pytest.mark.parametrize("family", chosen())
def test_a_model_equals_eager(family, computed_by):
    model = hf_families.tiny_model(family)
    wanted, wanted_grads = outputs_and_grads(model, "eager")
    assert not computed_by
    y, grads = outputs_and_grads(model, "dmoe")
    assert computed_by == ["composed_experts" if family == "muse_spark" else "moe_mlp"] * len(computed_by) != []
    assert (y - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert grads.keys() == wanted_grads.keys()
    largest = max(grad.abs().max() for grad in wanted_grads.values())
    # Sums that cancel are as wrong as what they sum.
    bounds = {name: 1e-5 * grad.abs().max() + 1e-7 * largest for name, grad in wanted_grads.items()}
    beyond = [name for name, grad in wanted_grads.items() if (grads[name] - grad).abs().max() > bounds[name]]
    if beyond:  # where a family enlarges roundings, ours as eager's: neither is the truth then
        exact_grads = outputs_and_grads(copy.deepcopy(model).double(), "eager")[1]
        for name in beyond:
            error, own = ((g[name] - exact_grads[name]).abs().max() for g in (grads, wanted_grads))
            assert error <= 2 * own + bounds[name], name
    again, grads_again = outputs_and_grads(model, "dmoe")
    assert torch.equal(y, again)
    assert all(torch.equal(grads[name], grads_again[name]) for name in grads)


def run_experts(experts, implementation, inputs, dtype):
    """Output, and gradients of input, gate weights and parameters, from copies in a dtype."""
    experts = copy.deepcopy(experts).to(dtype)
    experts.config._experts_implementation = {"": implementation}
    x, index, gates = inputs
    x, gates = (t.detach().to(dtype).requires_grad_() for t in (x, gates))
    y = experts(x, index, gates)
    torch.manual_seed(2)
    y.backward(torch.randn(y.shape).to(torch.bfloat16).to(dtype))
    return {"y": y.detach(), "x": x.grad, "gates": gates.grad} | {n: p.grad for n, p in experts.named_parameters()}


@pytest.mark.parametrize("family", chosen())
def test_experts_in_bfloat16_are_as_accurate_as_eager(family):
    module = next(iter(hf_families.experts_of(hf_families.tiny_model(family)).values()))
    torch.manual_seed(0)
    hidden = getattr(module, "gate_up_proj" if module.has_gate else "up_proj").shape[1 if module.is_transposed else 2]
    x = torch.randn(40, hidden).bfloat16()
    index = torch.rand(40, module.num_experts).argsort(1)[:, :2]
    gates = torch.rand(40, 2).bfloat16()
    module = module.to(torch.bfloat16)
    # eager computes openai_privacy_filter in float32, whatever its weights are in
    plain = "grouped_mm" if family == "openai_privacy_filter" else "eager"
    own = []
    for x_near in (x, nudged(x), nudged(x)):
        near = x_near, index, gates
        own.append(
            (run_experts(module, plain, near, torch.bfloat16), run_experts(module, "eager", near, torch.float64))
        )
    found, exact = run_experts(module, "dmoe", (x, index, gates), torch.bfloat16), own[0][1]
    for name in found:
        assert_as_accurate(name, found[name], exact[name], [(plain[name], truth[name]) for plain, truth in own])
