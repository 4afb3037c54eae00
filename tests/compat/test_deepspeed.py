"""DeepSpeed's MoE: numbers recorded from it, and plain copies of an expert as the oracle."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from compat_cases import Ffn, close, drawn, golden, goldens
from torch import nn

import dmoe
from dmoe.compat.deepspeed import MoE

F = nn.functional
H, WIDTH = 6, 10


def layer_of(settings, hidden, experts, expert=None, **changes):
    """The layer that a recorded case's settings ask for."""
    names = ("k", "capacity_factor", "eval_capacity_factor", "min_capacity", "use_residual", "noisy_gate_policy",
             "drop_tokens", "use_rts", "top2_2nd_expert_sampling")  # fmt: skip
    given = {name: settings[name] for name in names if name in settings} | changes
    return MoE(hidden, Ffn(hidden, 3) if expert is None else expert, num_experts=experts, **given)


@pytest.mark.parametrize("name", goldens("ds_moe_"))
def test_recorded_layers(name):
    settings, inputs, outputs = golden(name)
    hidden, experts = inputs["x"].shape[-1], inputs["experts"]
    layer = layer_of(settings, hidden, len(experts), Ffn(hidden, len(experts[0]["fc1_weight"])))

    def named(prefix, values):
        return {prefix + name.replace("_", "."): value for name, value in values.items()}

    state = {"deepspeed_moe.gate.wg.weight": inputs["gate_weight"]}
    for n, values in enumerate(experts):
        state |= named(f"deepspeed_moe.experts.deepspeed_experts.{n}.", values)
    if settings["use_residual"]:
        state |= named("mlp.", inputs["mlp"])
        state |= {f"coefficient.{name}": inputs[f"coefficient_{name}"] for name in ("weight", "bias")}
    assert list(layer.state_dict()) == list(state)
    layer.load_state_dict(state)
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())

    layer.train(settings["training"])
    x = inputs["x"].requires_grad_()
    with drawn(uniform=inputs.get("rts_uniform")):
        y, l_aux, exp_counts = layer(x)
    close(y, outputs["y"])
    close(l_aux, outputs["l_aux"])
    assert exp_counts.tolist() == outputs["exp_counts"]
    close(torch.autograd.grad(y.sum() + l_aux, x)[0], outputs["grad_x_of_ysum_plus_laux"])


def telling(layer, num_experts):
    """The same layer, whose expert e gives the e-th unit vector: its output is the matrix of combine weights."""
    for value in layer.deepspeed_moe.experts.parameters():
        nn.init.zeros_(value)
    layer.deepspeed_moe.experts.down_bias.data.copy_(torch.eye(num_experts))
    return layer


# A gate of DeepSpeed alone can do what its layer cannot ask for: a policy of position, and k = 1 by the rule for k.
GATES = [name for name in goldens("ds_top") if "position" not in name and "topk1" not in name]


@pytest.mark.parametrize("name", GATES)
def test_recorded_gates(name):
    settings, inputs, outputs = golden(name)
    tokens, experts = inputs["logits"].shape
    k = settings.get("k", 1 if "top1" in name else 2)
    factor = float(settings["capacity_factor"])
    layer = layer_of(settings, experts, experts, k=k, capacity_factor=factor, eval_capacity_factor=9.0)
    layer = telling(layer, experts)
    layer.deepspeed_moe.gate.wg.weight.data.copy_(torch.eye(experts))  # the input is the logits
    dropped = settings.get("drop_tokens", True)
    noise = {"uniform": inputs.get("rts_uniform") if dropped else None, "gumbel": inputs.get("gumbel")}
    with drawn(**noise):
        y, l_aux, exp_counts = layer(inputs["logits"], used_token=inputs.get("used_token"))
    close(y, outputs["combine_weights"])
    close(l_aux, outputs["l_aux"])
    assert exp_counts.tolist() == outputs["exp_counts"]
    assert [column.nonzero().flatten().tolist() for column in y.t()] == outputs["kept"]
    capacity = layer.deepspeed_moe.config.capacity_for(tokens)
    assert capacity == (outputs["capacity"] if dropped else None)


@pytest.mark.parametrize("name", goldens("ds_jitter_"))
def test_recorded_jitter(name):
    settings, inputs, outputs = golden(name)
    (tokens, hidden), experts = inputs["x"].shape, len(inputs["weight"])
    layer = layer_of(settings, hidden, experts).train(settings["training"])
    gate = layer.deepspeed_moe.gate
    gate.wg.weight.data.copy_(inputs["weight"])
    seen = []
    gate.register_forward_hook(lambda module, args, routing: seen.append(routing))
    with drawn(jitter=inputs["jitter"]):
        _, l_aux, exp_counts = layer(inputs["x"])
    (routing,) = seen
    close(torch.log_softmax(torch.tensor(outputs["logits"]), -1), routing.router_probs.log())
    close(l_aux, outputs["l_aux"])
    assert exp_counts.tolist() == outputs["exp_counts"]
    assert layer.deepspeed_moe.config.capacity_for(tokens, settings["training"]) == outputs["capacity"]
    if "expert" in outputs:
        assert routing.expert_indices[:, 0].tolist() == outputs["expert"]
    else:
        weights = torch.zeros(tokens, experts).scatter_(1, routing.expert_indices.long(), routing.gate_weights.detach())
        close(weights, outputs["combine_weights"])
        assert [column.nonzero().flatten().tolist() for column in weights.t()] == outputs["kept"]


def test_recorded_capacities():
    for tokens, experts, factor, minimum, capacity, _ in golden("ds_capacity_table")[2]["rows"]:
        layer = MoE(H, Ffn(H, 1), experts, capacity_factor=factor, min_capacity=minimum)
        assert layer.deepspeed_moe.config.capacity_for(tokens) == min(capacity, tokens)


def test_every_recorded_case_is_looked_at():
    left = {"ds_topk3_position_cf0.6", "ds_topk1_vs_k1_norm"}
    assert set(goldens("ds_")) == {*goldens("ds_moe_", "ds_jitter_"), *GATES, *left, "ds_capacity_table"}


class SwiGlu(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.down, self.gate = nn.Linear(WIDTH, H, bias=bias), nn.Linear(H, WIDTH, bias=bias)
        self.up = nn.Linear(H, WIDTH, bias=bias)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Fused(nn.Module):
    def __init__(self, gate_first):
        super().__init__()
        self.wi, self.wo, self.gate_first = nn.Linear(H, 2 * WIDTH), nn.Linear(WIDTH, H, bias=False), gate_first

    def forward(self, x):
        a, b = self.wi(x).chunk(2, -1)
        return self.wo(F.gelu(a) * b if self.gate_first else a * F.gelu(b))


class Conv1D(nn.Module):
    """Hugging Face's: a linear whose weight is [in, out]."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.weight = nf, nn.Parameter(torch.randn(nx, nf) / nx**0.5)
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


EXPERTS = {
    "fc1, fc2": lambda: Ffn(H, WIDTH),
    "tanh gelu": lambda: Ffn(H, WIDTH, lambda x: F.gelu(x, approximate="tanh")),
    "a bias below": lambda: Ffn(H, WIDTH, bias=(True, False)),
    "a bias above": lambda: Ffn(H, WIDTH, bias=(False, True)),
    "no bias": lambda: Ffn(H, WIDTH, bias=(False, False)),
    "sequential": lambda: nn.Sequential(nn.Linear(H, WIDTH), nn.SiLU(), nn.Linear(WIDTH, H)),
    "swiglu": SwiGlu,
    "swiglu without bias": lambda: SwiGlu(bias=False),
    "fused, gate first": lambda: Fused(True),
    "fused, gate second": lambda: Fused(False),
    "Conv1D": lambda: nn.Sequential(Conv1D(WIDTH, H), nn.GELU(), Conv1D(H, WIDTH)),
}


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("name", EXPERTS)
def test_any_feed_forward_block_and_its_state(name, k):
    """Against copies of the expert, with values of their own, under the names that DeepSpeed gives them."""
    torch.manual_seed(0)
    expert = EXPERTS[name]().double()
    layer = MoE(H, expert, num_experts=4, k=k, drop_tokens=False, top2_2nd_expert_sampling=False)
    copies = nn.ModuleList(copy.deepcopy(expert) for _ in range(4))
    prefix = "deepspeed_moe.experts.deepspeed_experts."
    state = layer.state_dict()
    of_copies = {prefix + name: value for name, value in copies.state_dict().items()}
    assert list(state) == ["deepspeed_moe.gate.wg.weight", *of_copies]
    assert all(torch.equal(state[name], value) for name, value in of_copies.items())  # all begin equal to it
    assert not any(a is b for a in layer.parameters() for b in expert.parameters())

    for value in copies.parameters():
        nn.init.normal_(value)
    wg = torch.randn(4, H, dtype=torch.float64, requires_grad=True)
    layer.load_state_dict({"deepspeed_moe.gate.wg.weight": wg.detach(), **of_copies})
    assert all(torch.equal(layer.state_dict()[name], value) for name, value in of_copies.items())

    x = torch.randn(9, H, dtype=torch.float64)
    y, l_aux, counts = layer(x)
    probs = torch.softmax(x @ wg.t(), -1)
    chosen = probs.topk(k).indices
    mask = torch.zeros_like(probs).scatter(1, chosen, 1)
    weights = probs * mask
    weights = weights if k == 1 else weights / weights.sum(1, keepdim=True)
    expected = sum(weights[:, e, None] * each(x) for e, each in enumerate(copies))
    shares = mask if k > 2 else torch.zeros_like(probs).scatter(1, chosen[:, :1], 1)
    loss = 4 * (shares.mean(0) * probs.mean(0)).sum() / (k if k > 2 else 1)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(l_aux, loss)
    assert torch.equal(counts, mask.sum(0).long())

    (y.square().sum() + l_aux).backward()
    (expected.square().sum() + loss).backward()
    gate, experts = layer.deepspeed_moe.gate, layer.deepspeed_moe.experts
    torch.testing.assert_close(gate.wg.weight.grad, wg.grad)
    for entry in experts.entries:
        for n, each in enumerate(copies):
            grad = entry.theirs(getattr(experts, entry.parameter).grad[n])
            torch.testing.assert_close(grad, each.get_parameter(entry.name).grad, msg=f"{n}.{entry.name}")


def test_the_residual_block_is_the_expert_itself():
    expert = Ffn(H, WIDTH)
    layer = MoE(H, expert, num_experts=4, use_residual=True)
    assert layer.mlp is expert
    x = torch.randn(2, 5, H)
    share = torch.softmax(layer.coefficient(x), -1)
    with drawn(uniform=torch.ones(10, 4)):
        routed = layer.deepspeed_moe(x)
    with drawn(uniform=torch.ones(10, 4)):
        y, _, _ = layer(x)
    torch.testing.assert_close(y, share[..., :1] * routed + share[..., 1:] * expert(x))
    expert.forward = lambda x: (x, "a bias")  # of which the first part is taken, as in DeepSpeed
    with drawn(uniform=torch.ones(10, 4)):
        torch.testing.assert_close(layer(x)[0], share[..., :1] * routed + share[..., 1:] * x)


def test_dropouts_of_the_expert_are_those_of_its_copies():
    expert = nn.Sequential(nn.Linear(H, WIDTH), nn.ReLU(), nn.Dropout(0.2), nn.Linear(WIDTH, H), nn.Dropout(0.3))
    config = MoE(H, expert, num_experts=2).deepspeed_moe.config
    assert (config.activation_dropout, config.expert_dropout) == pytest.approx((0.2, 0.3))


def test_what_is_drawn_and_when():
    x = torch.randn(7, H)
    full = {"capacity_factor": 9.0, "eval_capacity_factor": 9.0}
    numbers = torch.rand(7, 4)
    for training, options, wanted in (
        (True, {"k": 1, "noisy_gate_policy": "RSample", "use_rts": False}, {"gumbel": numbers}),
        (False, {"k": 1, "noisy_gate_policy": "RSample", "use_rts": False}, {}),
        (True, {"k": 2, "noisy_gate_policy": "RSample", "top2_2nd_expert_sampling": False}, {}),
        (False, {"k": 1}, {"uniform": numbers}),
        (False, {"k": 2}, {"gumbel": numbers}),
        (True, {"k": 3}, {}),
        (True, {"k": 1, "drop_tokens": False}, {}),
        (False, {"k": 3, "noisy_gate_policy": "Jitter"}, {}),
    ):
        layer = MoE(H, Ffn(H, WIDTH), num_experts=4, **full, **options).train(training)
        with drawn(**wanted):
            layer(x)


def test_used_tokens_are_looked_at_with_one_choice_alone():
    x, used = torch.randn(2, 4, H), torch.tensor([[1, 0, 1, 1], [0, 0, 1, 1]])
    layer = MoE(H, Ffn(H, WIDTH), num_experts=4, drop_tokens=False).eval()
    y, l_aux, counts = layer(x, used)
    assert (y[used == 0] == 0).all()
    assert counts.sum() == used.sum()
    probs = torch.softmax(layer.deepspeed_moe.gate.wg(x.view(8, H)), -1)
    torch.testing.assert_close(l_aux, 4 * (counts / 8 * probs.mean(0)).sum())
    with pytest.raises(ValueError, match=r"^MoE: used_token: expected one number for each of 8 tokens, got \(4,\)"):
        layer(x, used[0])
    two = MoE(H, Ffn(H, WIDTH), num_experts=4, k=2, drop_tokens=False).eval()
    assert two(x, used)[2].sum() == 16


def test_the_loss_is_the_callers_and_nobody_elses():
    model = nn.ModuleDict({"moe": MoE(H, Ffn(H, WIDTH), num_experts=4)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no loss waits to be read
        for _ in range(3):
            _, l_aux, counts = model["moe"](torch.randn(8, H))
    assert l_aux.requires_grad
    assert dmoe.aux_loss(model) == 0
    assert list(dmoe.reduce_metrics(model)) == ["moe.deepspeed_moe"]
    assert model["moe"].deepspeed_moe.l_aux is l_aux
    assert torch.equal(model["moe"].deepspeed_moe.exp_counts, counts)
    twin = copy.deepcopy(model)
    assert twin["moe"].deepspeed_moe.l_aux is None
    assert torch.equal(twin["moe"].deepspeed_moe.gate.wg.weight, model["moe"].deepspeed_moe.gate.wg.weight)
    assert dmoe.is_expert_param(twin["moe"].deepspeed_moe.experts.up_proj)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_and_other_dtypes(dtype):
    layer = MoE(H, Ffn(H, WIDTH).to(dtype), num_experts=4, k=2, use_residual=True, top2_2nd_expert_sampling=False)
    x = torch.randn(9, H, dtype=dtype)
    y, l_aux, _ = layer(x)
    assert (y.dtype, l_aux.dtype) == (dtype, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        cast, same_loss, _ = layer(x)
    assert cast.dtype == torch.bfloat16
    torch.testing.assert_close(same_loss, l_aux)  # the gate computes in float32
    torch.testing.assert_close(cast.float(), y.float(), rtol=5e-2, atol=5e-2)


def test_one_compiled_graph():
    layer = MoE(H, Ffn(H, WIDTH), num_experts=4, k=2, top2_2nd_expert_sampling=False)
    x = torch.randn(9, H)
    for got, expected in zip(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x), strict=True):
        torch.testing.assert_close(got, expected)
