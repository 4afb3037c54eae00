"""The contract with Transformers, on single experts modules: ids of no expert, dtypes, memory, and what is refused."""

from __future__ import annotations

import copy
import types

import hf_families
import pytest
import torch
from helpers import saved_bytes
from torch import nn

import dmoe.integrations.transformers as on_transformers
from dmoe.integrations.transformers import experts as dmoe_side
from dmoe.integrations.transformers.gates import gate_of

on_transformers.register()
PATHS = [
    "mixtral",
    "gpt_oss",
    "nemotron_h",
    "muse_spark",
]  # fused, transposed and interleaved, without a gate, composed


def experts_of(family, **given):
    return next(iter(hf_families.experts_of(hf_families.tiny_model(family, **given)).values()))


def case(experts, tokens=17, seed=0):
    """x ``(T, H)``, indices ``(T, 2)`` int64, gate weights."""
    torch.manual_seed(seed)
    index = torch.rand(tokens, experts.num_experts).argsort(1)[:, :2]
    return torch.randn(tokens, hf_families.HIDDEN), index, torch.rand(tokens, 2)


def run(experts, implementation, x, index, gates):
    """Output and gradients of x, gate weights and parameters."""
    experts.config._experts_implementation = {"": implementation}
    x, gates = x.detach().requires_grad_(), gates.detach().requires_grad_()
    experts.zero_grad()
    y = experts(x, index, gates)
    torch.manual_seed(3)
    y.backward(torch.randn(y.shape).bfloat16().to(y.dtype))  # the same numbers in every dtype
    zero = torch.zeros(())
    return y.detach(), x.grad, gates.grad, *(zero if p.grad is None else p.grad.clone() for p in experts.parameters())


def assert_same(found, wanted, tolerance=1e-5):
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == other.dtype
        assert (one - other).abs().max() <= tolerance * other.abs().max() if one.numel() else True


@pytest.mark.parametrize("family", PATHS)
@pytest.mark.parametrize("which", ["some", "all of a token", "all"])
def test_ids_of_num_experts_take_no_expert(family, which):
    experts = experts_of(family)
    x, index, gates = case(experts)
    given = index.clone()
    index[{"some": (slice(None, None, 3), 0), "all of a token": 4, "all": slice(None)}[which]] = experts.num_experts
    found = run(experts, "dmoe", x, index, gates)
    # Transformers' own compute the first expert there, with no weight, as its expert parallelism hands them over
    kept = index != experts.num_experts
    wanted = run(experts, "eager", x, torch.where(kept, given, 0), gates * kept)
    assert_same([*found[:2], *found[3:]], [*wanted[:2], *wanted[3:]])
    assert (found[2] - wanted[2] * kept).abs().max() <= 1e-5 * wanted[2].abs().max()
    if which == "all":
        assert all(not tensor.any() for tensor in found)


@pytest.mark.parametrize("family", PATHS)
def test_no_tokens(family):
    experts = experts_of(family)
    x, index, gates = case(experts, tokens=0)
    y, grad, *others = run(experts, "dmoe", x, index, gates)
    assert y.shape == grad.shape == (0, hf_families.HIDDEN)
    assert not any(tensor.any() for tensor in others)


@pytest.mark.parametrize("family", PATHS)
@pytest.mark.parametrize(
    ("of_x", "of_weights", "of_gates"),
    [
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.float16, torch.float16, torch.float32),
        (torch.float64, torch.float64, torch.float64),
    ],
)
def test_x_is_cast_to_the_weights_and_the_result_back(family, of_x, of_weights, of_gates):
    experts = experts_of(family).to(of_weights)
    x, index, gates = case(experts)
    found = run(experts, "dmoe", x.to(of_x), index, gates.to(of_gates))
    assert [tensor.dtype for tensor in found[:3]] == [of_x, of_x, of_gates]
    exact = run(copy.deepcopy(experts).double(), "eager", x.to(of_x).double(), index, gates.to(of_gates).double())
    eps = max(torch.finfo(dtype).eps for dtype in (of_x, of_weights))
    for one, other in zip(found, exact, strict=True):
        assert (one.double() - other).abs().max() <= 8 * max(eps, 1e-7) * other.abs().max()


@pytest.mark.parametrize("family", PATHS)
@pytest.mark.parametrize("of_weights", [torch.float32, torch.bfloat16])
def test_under_autocast_products_run_in_its_dtype(family, of_weights):
    experts = experts_of(family).to(of_weights)
    x, index, gates = case(experts)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(experts, "dmoe", x, index, gates)
    low = run(copy.deepcopy(experts).bfloat16(), "dmoe", x, index, gates)
    assert found[0].dtype == torch.float32
    assert (found[0] - low[0]).abs().max() <= 0.02 * low[0].abs().max()
    exact = run(copy.deepcopy(experts).float(), "dmoe", x, index, gates)
    assert (found[0] - exact[0]).abs().max() > 1e-4 * exact[0].abs().max(), "not in float32"


def allocated(call):
    """Bytes of every allocation of a call, those inside operations too."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = profile.profiler.kineto_results.events()
    return [event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0]


@pytest.mark.parametrize("family", [*PATHS, "aria", "openai_privacy_filter"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_call_copies_no_weights(family, dtype):
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    experts = experts_of(family, **dict.fromkeys(names, 64)).to(dtype)
    x, index, gates = case(experts, tokens=1)
    experts.config._experts_implementation = {"": "dmoe"}
    with torch.no_grad():
        experts(x, index, gates)  # the gate is known from here on
        sizes = allocated(lambda: experts(x, index, gates))
    every = experts.down_proj.numel() * experts.down_proj.element_size()
    assert 0 < max(sizes) <= every / 8, f"{max(sizes)} bytes at once; the smaller projection of all 64 has {every}"


@pytest.mark.parametrize(("family", "most"), [("mixtral", 0.6), ("gpt_oss", 0.6), ("muse_spark", 0.6)])
def test_saved_for_backward_is_less_than_grouped_mm_saves(family, most):
    experts = experts_of(family)
    x, index, gates = case(experts, tokens=256)
    saved = {}
    for implementation in ("grouped_mm", "dmoe"):
        experts.config._experts_implementation = {"": implementation}
        with saved_bytes(exclude=list(experts.parameters())) as count:
            experts(x.requires_grad_(), index, gates.requires_grad_())
        saved[implementation] = count.total
    assert saved["dmoe"] <= most * saved["grouped_mm"], saved


def test_a_weight_that_is_no_plain_tensor_is_named():
    class Quantised(torch.Tensor):
        def __tensor_flatten__(self):
            return [], None

    experts = experts_of("mixtral")
    experts.config._experts_implementation = {"": "dmoe"}
    experts.down_proj = nn.Parameter(experts.down_proj.detach().as_subclass(Quantised))
    with pytest.raises(TypeError, match=r"MixtralExperts.down_proj: expected a plain tensor, got Quantised; load"):
        experts(*case(experts))


@pytest.mark.parametrize(
    ("family", "activation"),
    [
        ("mixtral", "silu"),
        ("gemma4", "gelu_tanh"),
        ("nemotron_h", "relu_squared"),
        ("beam", "silu"),
        ("gpt_oss", "clamped_swiglu(7.0,1.702,1.0)"),
        ("deepseek_v4", "clamped_swiglu(10.0,1.0,0.0)"),
        ("inkling2", "softcapped_swiglu(4.0,25.0)"),
    ],
)
def test_gates_are_known_by_what_they_compute(family, activation):
    experts = experts_of(family)
    gate = gate_of(experts)
    assert (gate.activation, gate.interleaved) == (activation, family == "gpt_oss")
    renamed = copy.deepcopy(experts)
    renamed.__class__ = type("Other", (type(experts),), {})  # as PEFT's wrapper and parametrizations do
    assert gate_of(renamed) == gate


def test_a_changed_number_is_another_gate():
    experts = experts_of("gpt_oss")
    before = gate_of(experts)
    experts.limit, experts.alpha = 3.5, 1.25
    assert before.activation == "clamped_swiglu(7.0,1.702,1.0)"
    assert gate_of(experts).activation == "clamped_swiglu(3.5,1.25,1.0)"
    assert_same(run(experts, "dmoe", *case(experts)), run(experts, "eager", *case(experts)))


class _Scaled(nn.Module):
    """silu by its first number, until it is trained."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return nn.functional.silu(x) * self.scale


class _Dropped(nn.Module):
    def forward(self, x):
        return nn.functional.dropout(nn.functional.silu(x), 0.5, self.training)


@pytest.mark.parametrize("act", [_Scaled(), torch.tanh, nn.Softplus(), nn.functional.elu])
def test_other_gates_are_computed_as_they_are(act):
    experts = experts_of("mixtral")
    del experts.act_fn
    experts.act_fn = act
    assert gate_of(experts) is None
    assert_same(run(experts, "dmoe", *case(experts)), run(experts, "eager", *case(experts)))
    if isinstance(act, _Scaled):
        assert act.scale.grad.abs() > 0


@pytest.mark.parametrize("family", [*PATHS, "aria", "openai_privacy_filter"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_piece_by_piece_is_the_same(family, dtype, monkeypatch):
    """With biases, transposed and interleaved weights, without a gate: what a gate that nobody knows would meet."""
    experts = experts_of(family).to(dtype)
    x, index, gates = case(experts)
    index[::3, 0] = experts.num_experts
    fused = run(experts, "dmoe", x.to(dtype), index, gates)
    monkeypatch.setattr(dmoe_side, "gate_of", lambda module: None)
    for one, other in zip(run(experts, "dmoe", x.to(dtype), index, gates), fused, strict=True):
        assert one.dtype == other.dtype
        assert (one - other).abs().max() <= (1e-5 if dtype == torch.float32 else 0.02) * other.abs().max()


@pytest.mark.parametrize("kind", [nn.Parameter, nn.Buffer])
def test_a_gate_with_a_number_that_may_change_is_computed_as_it_is(kind):
    experts = experts_of("mixtral")
    experts.scale = kind(torch.ones(()))
    plain = type(experts)._apply_gate
    experts._apply_gate = types.MethodType(lambda self, pre: plain(self, pre) * self.scale, experts)
    assert gate_of(experts) is None
    experts.scale.data.fill_(2.0)
    assert_same(run(experts, "dmoe", *case(experts)), run(experts, "grouped_mm", *case(experts)))


def test_a_gate_that_draws_numbers_is_none_of_ours_in_training():
    experts = experts_of("mixtral")
    experts.act_fn = _Dropped()
    assert gate_of(experts.eval()).activation == "silu"
    assert gate_of(experts.train()) is None
    state = torch.get_rng_state()
    gate_of(copy.deepcopy(experts))
    assert torch.equal(torch.get_rng_state(), state)


def test_an_activation_that_somebody_looks_at_is_called():
    experts = experts_of("mixtral")
    experts.config._experts_implementation = {"": "dmoe"}
    seen = []
    experts(*case(experts))
    handle = experts.act_fn.register_forward_hook(lambda module, args, y: seen.append(y.shape))
    experts(*case(experts))
    handle.remove()
    experts(*case(experts))
    assert seen == [(34, 24)]
