"""Tutel's moe_layer: numbers recorded from it, and a plain loop over experts as the oracle."""

from __future__ import annotations

import copy
import re
import warnings

import pytest
import torch
from compat_cases import close, drawn, golden, goldens
from torch import nn

import dmoe
from dmoe.compat import tutel as tutel_moe

F = nn.functional
H, WIDTH = 6, 10
ACTIVATIONS = {"relu": None, "gelu (erf)": lambda x: F.gelu(x)}
ROUTING = ("batch_prioritized_routing", "normalize_gate", "is_postscore", "is_gshard_loss")


def ffn(experts, width=WIDTH, **options):
    return {"type": "ffn", "num_experts_per_device": experts, "hidden_size_per_expert": width, **options}


def layer_of(gate, experts, hidden=H, **options):
    return tutel_moe.moe_layer(gate_type=gate, model_dim=hidden, experts=experts, **options)


def expert_state(inputs):
    """A recorded case's expert weights under Tutel's names."""
    names = {"batched_fc1_w": "fc1_weight", "batched_fc2_w": "fc2_weight", "batched_fc1_bias": "fc1_bias",
             "batched_fc2_bias": "fc2_bias"}  # fmt: skip
    return {f"experts.{theirs}": inputs[name] for theirs, name in names.items() if name in inputs}


@pytest.mark.parametrize("name", goldens("tutel_layer_"))
def test_recorded_layers(name):
    settings, inputs, outputs = golden(name)
    experts, width, hidden = inputs["fc1_weight"].shape
    activation = ACTIVATIONS[settings["activation"]]
    options = ffn(experts, width, activation_fn=activation, has_fc2_bias="fc2_bias" in inputs)
    layer = layer_of(settings["gate"], options, hidden, **{key: settings[key] for key in ROUTING})
    state = {"_num_global_experts": torch.tensor(experts), **expert_state(inputs)}
    state["gates.0.wg.weight"] = inputs["gate_weight"]
    assert list(layer.state_dict()) == list(state)
    layer.load_state_dict(state)
    assert all(torch.equal(value, state[key]) for key, value in layer.state_dict().items())

    x = inputs["x"].requires_grad_()
    with drawn(gaussian=inputs.get("unit_noise")):
        y = layer.train(settings["training"])(x)
    close(y, outputs["y"])
    assert y.l_aux is layer.l_aux
    close(y.l_aux, outputs["l_aux"])
    if not settings["batch_prioritized_routing"]:  # where Tutel's is no count
        assert layer.dispatch_count.tolist() == outputs["dispatch_count_reported"]
    if "gate_logits" in outputs:
        close(layer.gates[0].logits(x), outputs["gate_logits"])
    close(torch.autograd.grad(y.sum() + y.l_aux, x)[0], outputs["grad_x_of_ysum_plus_laux"])


def generated(formulas):
    """Weights that a case gives as formulas of integers, ``[p][d] = ..., shape [P, D]``."""
    found = {}
    for name in ("proj_weight", "proj_bias", "sim_matrix"):
        indices, formula, shape = re.fullmatch(r"((?:\[\w\])+) = (.*), shape \[(.*)\]", formulas[name]).groups()
        sizes = [int(size) for size in shape.split(",")]
        axes = torch.meshgrid(*(torch.arange(size) for size in sizes), indexing="ij")
        letters = dict(zip(re.findall(r"\w", indices), axes, strict=True)) | {"s": formulas["s"]}
        found[name] = eval(formula.replace("mod", "%"), {}, letters).float()
    return found


@pytest.mark.parametrize("name", goldens("gmoe_block_"))
def test_recorded_blocks_of_gmoe(name):
    settings, inputs, outputs = golden(name)
    experts, width, hidden = inputs["fc1_weight"].shape
    gate = {"type": settings["router"], "k": settings["k"], "capacity_factor": settings["capacity_factor"],
            "gate_noise": settings["gate_noise"], "fp32_gate": settings["fp32_gate"]}  # fmt: skip
    options = ffn(experts, width, activation_fn=ACTIVATIONS[settings["activation"]])
    layer = layer_of(gate, options, hidden, **{key: settings[key] for key in ROUTING})
    close(layer.gates[0].temperature, [settings["temperature_at_init"]])
    weights = generated(inputs["generated_weights"])
    close(torch.stack([value.sum() for value in weights.values()]), inputs["generated_weights"]["sums_for_checking"])
    state = {
        "_num_global_experts": torch.tensor(experts),
        **expert_state(inputs),
        "gates.0.temperature": torch.tensor([float(inputs["temperature_param"])]),
        "gates.0.sim_matrix": weights["sim_matrix"],
        "gates.0.cosine_projector.weight": weights["proj_weight"],
        "gates.0.cosine_projector.bias": weights["proj_bias"],
    }
    assert list(layer.state_dict()) == list(state)
    layer.load_state_dict(state)

    x, training = inputs["x"].requires_grad_(), settings["training"]
    with drawn(gaussian=inputs["unit_noise"] if training else None):
        y = layer.train(training)(x)
    close(y, outputs["y"])
    close(y.l_aux, outputs["l_aux"])
    weight = settings["aux_loss_weight"]
    close(torch.autograd.grad(y.sum() + weight * y.l_aux, x)[0], outputs["grad_x_of_ysum_plus_weighted_aux"], 5e-5)
    if "gate_logits" in outputs:
        close(layer.gates[0].logits(x), outputs["gate_logits"])


# The two in which Tutel drops tokens where it promises not to: see below.
DYNAMIC = ["tutel_k1_cf0_dynamic_bpr", "tutel_k2_cf0_dynamic_bpr"]
GATES = [name for name in goldens("tutel_k") if name not in DYNAMIC]


def telling_layer(settings, num_experts, loss=True):
    """A layer whose input is its logits, and whose output is the matrix of combine weights."""
    gate = {"type": "top", **{key: settings[key] for key in ("k", "capacity_factor", "gate_noise")}}
    options = {key: settings[key] for key in ROUTING if key in settings}
    layer = layer_of(gate, ffn(num_experts, 3), num_experts, is_gshard_loss=settings["loss"] == "gshard",
                     a2a_ffn_overlap_degree=settings["alignment"], **options)  # fmt: skip
    for parameter in layer.experts.parameters():
        nn.init.zeros_(parameter)
    layer.experts.batched_fc2_bias.data.copy_(torch.eye(num_experts))
    layer.gates[0].wg.weight.data.copy_(torch.eye(num_experts))
    return layer


@pytest.mark.parametrize("name", GATES)
def test_recorded_gates(name):
    settings, inputs, outputs = golden(name)
    logits = inputs["logits"].requires_grad_()
    layer = telling_layer(settings, logits.shape[1]).train("unit_noise" in inputs)
    with drawn(gaussian=inputs.get("unit_noise")):
        y = layer(logits)
    expected = torch.zeros_like(logits)
    for token, choices in enumerate(zip(outputs["expert"], outputs["location"], outputs["gate"], strict=True)):
        for expert, location, weight in zip(*choices, strict=True):
            expected[token, expert] = weight if location < outputs["capacity"] else 0
    close(y, expected)
    assert [column.nonzero().flatten().tolist() for column in y.t()] == outputs["kept"]
    close(y.l_aux, outputs["l_aux"])
    if not settings["batch_prioritized_routing"]:
        assert layer.dispatch_count.tolist() == outputs["dispatch_count"]
    if "grad_logits_of_l_aux" in outputs:
        close(torch.autograd.grad(y.l_aux, logits)[0], outputs["grad_logits_of_l_aux"])
    capacity = layer.gates[0].config.capacity_for(len(logits))
    if settings["capacity_factor"] > 0:
        assert capacity == outputs["capacity"]


@pytest.mark.parametrize("name", DYNAMIC)
def test_a_factor_of_0_drops_nothing(name):
    """Tutel takes the last token's place for the busiest expert's count, and drops some under batch priority."""
    settings, inputs, outputs = golden(name)
    assert outputs["num_dropped"] > 0
    layer = telling_layer(settings, inputs["logits"].shape[1])
    y = layer(inputs["logits"])
    assert int((y != 0).sum()) == len(y) * settings["k"] == int(layer.dispatch_count.sum())


@pytest.mark.parametrize("name", goldens("tutel_cosine_"))
def test_recorded_cosine_gates(name):
    settings, inputs, outputs = golden(name)
    experts, hidden = settings["num_experts"], inputs["x"].shape[1]
    gate = {"type": "cosine_top", **{key: settings[key] for key in ("proj_dim", "init_t", "fp32_gate")}}
    cosine = layer_of(gate, ffn(experts, 3), hidden).gates[0]
    close(cosine.temperature, [outputs["temperature_at_init"]])
    cosine.load_state_dict({
        "temperature": torch.tensor([float(settings["temperature_param"])]),
        "cosine_projector.weight": inputs["proj_weight"],
        "cosine_projector.bias": inputs["proj_bias"],
        "sim_matrix": inputs["sim_matrix"],
    })  # fmt: skip
    logits = cosine.logits(inputs["x"])
    close(logits, outputs["logits"])
    wanted = (cosine.temperature, cosine.sim_matrix)
    temperature, matrix = torch.autograd.grad(logits.square().sum(), wanted)
    close(temperature, [outputs["grad_temperature_of_sum_squares"]])
    close(matrix, outputs["grad_sim_matrix_of_sum_squares"])


def test_every_recorded_case_is_looked_at():
    left = {
        "tutel_linear_gate",
        "tutel_capacity_table",
    }  # the linear is in the layers, the table in tests of the config
    assert set(goldens("tutel_")) == {*goldens("tutel_layer_", "tutel_cosine_"), *GATES, *DYNAMIC, *left}


def plain(layer, x, k, normalize, act, llama):
    """The formula with every token at all its experts, by a loop over these, and the balance loss."""
    experts, (gate,) = dict(layer.experts.named_parameters()), layer.gates
    probs = torch.softmax(x @ gate.wg.weight.t(), -1)
    chosen = probs.topk(k).indices
    weights = probs * torch.zeros_like(probs).scatter(1, chosen, 1)
    if normalize and k > 1:
        weights = weights / weights.sum(1, keepdim=True)
    results = []
    for e in range(probs.shape[1]):
        if llama:
            first, second = (experts[name].view(-1, H, WIDTH)[e] for name in ("W_fc1", "W_fc2"))
            results.append((act(x @ first) * (x @ second)) @ experts["W_fc3"].view(-1, WIDTH, H)[e])
            continue
        hidden = x @ experts["batched_fc1_w"][e].t()
        hidden = hidden + experts["batched_fc1_bias"][e] if "batched_fc1_bias" in experts else hidden
        out = act(hidden) @ experts["batched_fc2_w"][e]
        results.append(out + experts["batched_fc2_bias"][e] if "batched_fc2_bias" in experts else out)
    y = sum(weights[:, e, None] * out for e, out in enumerate(results))
    first = torch.zeros_like(probs).scatter(1, chosen[:, :1], 1)
    return y, probs.shape[1] * (first.mean(0) * probs.mean(0)).sum()


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize(
    ("experts", "act"),
    [
        (ffn(4), F.relu),
        (ffn(4, activation_fn=F.silu, has_fc1_bias=False), F.silu),
        (ffn(4, activation_fn=lambda x: F.gelu(x, approximate="tanh"), has_fc2_bias=False),
         lambda x: F.gelu(x, approximate="tanh")),
        (ffn(4, has_fc1_bias=False, has_fc2_bias=False), F.relu),
        ({**ffn(4), "type": "llama_ffn"}, F.silu),
        ({**ffn(4, activation_fn=F.gelu), "type": "llama_ffn"}, F.gelu),
    ],
)  # fmt: skip
def test_every_form_of_experts_and_its_gradients(experts, act, k):
    torch.manual_seed(0)
    normalize = k != 3
    gate = {"type": "top", "k": k, "capacity_factor": 0}
    layer = layer_of(gate, experts, normalize_gate=normalize).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(3, 3, H, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    expected, loss = plain(layer, x.view(9, H), k, normalize, act, experts["type"] == "llama_ffn")
    torch.testing.assert_close(y, expected.view(3, 3, H))
    torch.testing.assert_close(y.l_aux, loss)
    wanted = [x, *layer.parameters()]
    upstream = torch.randn_like(y)
    for got, exact in zip(
        torch.autograd.grad((y * upstream).sum() + y.l_aux, wanted),
        torch.autograd.grad((expected * upstream.view(9, H)).sum() + loss, wanted),
        strict=True,
    ):
        torch.testing.assert_close(got, exact)


def test_a_forward_may_change_what_the_gate_asks_for():
    torch.manual_seed(0)
    x = torch.randn(12, H)
    layer = layer_of({"type": "top", "k": 2, "capacity_factor": 1.0}, ffn(4))
    before = layer(x)
    for changes in ({"top_k": 1}, {"capacity_factor": 0.5}, {"top_k": 3, "capacity_factor": -0.4}):
        options = {"k": 2, "capacity_factor": 1.0, **changes}
        options["k"] = options.pop("top_k", 2)
        other = layer_of({"type": "top", **options}, ffn(4))
        other.load_state_dict(layer.state_dict())
        expected = other(x)
        assert torch.equal(layer(x, **changes), expected)
        assert not torch.equal(expected, before)
        assert torch.equal(layer(x, top_k=0, capacity_factor=0), before)  # 0 is the gate's, as in Tutel
    layer.gates[0].top_k, layer.gates[0].capacity_factor = 3, -0.4
    assert torch.equal(layer(x), expected)
    layer.gates[0].gate_noise = 1.0
    with drawn(gaussian=torch.zeros(12, 4)):
        assert torch.equal(layer(x), expected)


def test_one_gate_of_several():
    torch.manual_seed(0)
    gates = [{"type": "top", "k": 1}, {"type": "cosine_top", "k": 2, "capacity_factor": 0, "proj_dim": 8}]
    layer, x = layer_of(gates, ffn(4)), torch.randn(7, H)
    assert {name.split(".")[1] for name in layer.state_dict() if name.startswith("gates")} == {"0", "1"}
    for index, gate in enumerate(gates):
        other = layer_of(gate, ffn(4))
        other.gates[0].load_state_dict(layer.gates[index].state_dict())
        other.experts.load_state_dict(layer.experts.state_dict())
        assert torch.equal(layer(x, gate_index=index), other(x))
        assert torch.equal(layer.l_aux, other.l_aux)


@pytest.mark.parametrize(("degree", "blocks", "rows"), [(1, 0, 3), (2, 0, 4), (1, 4, 4), (5, 0, 5), (300, 0, 384)])
def test_what_capacities_are_rounded_up_to(degree, blocks, rows):
    layer = layer_of({"type": "top", "k": 1}, ffn(4), a2a_ffn_overlap_degree=degree)
    with torch.no_grad():
        layer(torch.randn(12, H), megablocks_size=blocks)
    config = layer.gates[0].config
    assert -(-3 // config.capacity_multiple_of) * config.capacity_multiple_of == rows
    layer(torch.randn(12, H), megablocks_size=blocks, a2a_ffn_overlap_degree=1)  # with gradients there are no blocks
    assert layer.gates[0].config.capacity_multiple_of == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("fp32_gate", [True, False])
def test_autocast_and_other_dtypes(dtype, fp32_gate):
    layer = layer_of({"type": "top", "k": 2, "fp32_gate": fp32_gate, "capacity_factor": 0}, ffn(4)).to(dtype)
    x, seen = torch.randn(9, H), []
    layer.gates[0].register_forward_hook(lambda module, args, routing: seen.append(routing.router_probs.dtype))
    y = layer(x)
    assert y.dtype == torch.float32  # the input's, whatever the experts'
    assert layer.l_aux.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        cast = layer(x)
    assert cast.dtype == torch.float32
    torch.testing.assert_close(cast, y, rtol=5e-2, atol=5e-2)
    for tokens in (x, x.bfloat16()):  # in the weights' dtype, whatever the tokens'
        assert layer.gates[0].logits(tokens).dtype == (torch.float32 if fp32_gate else dtype)


def test_the_loss_is_the_callers_and_nobody_elses():
    gate = {"type": "top", "k": 2, "gate_noise": 1.0}
    model = nn.ModuleDict({"moe": layer_of(gate, ffn(4), is_gshard_loss=False)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no loss waits to be read
        for _ in range(3):
            y = model["moe"](torch.randn(8, H))
    assert y.l_aux.requires_grad
    assert dmoe.aux_loss(model) == 0
    assert not model["moe"].auxiliary.is_kept  # nn.DataParallel may copy the layer
    assert list(dmoe.reduce_metrics(model)) == ["moe"]
    twin = copy.deepcopy(model)
    assert twin["moe"].l_aux is None
    x = torch.randn(8, H)
    assert torch.equal(twin.eval()["moe"](x), model.eval()["moe"](x))
    assert all(p._tutel_expert and p.expert for p in twin["moe"].experts.parameters())
