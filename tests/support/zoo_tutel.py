"""Tutel's cases, and GMoE's, which are Tutel's layer with a cosine gate: gates, capacities, losses, whole layers."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from zoo import Case, assert_matches, config_of, kept_of, losses_of, numbers, queue_places, route

from dmoe import MoE, MoEConfig, Routing
from dmoe.routing import Cosine, TopK

LEFT_OUT = {
    "fp32_gate": "everything here is float32",
    "expert_dropout": "switched off when the case was recorded",
}
NO_COUNT = {
    "dispatch_count": "under batch priority no count of Tutel's: it reads the last token's row",
    "dispatch_count_reported": "the same",
}
ACTIVATIONS = {"relu": "relu", "gelu (erf)": "gelu"}


def run(case: Case) -> None:
    """A case of Tutel."""
    if "rows" in case.outputs:
        _table(case)
    elif "sim_matrix" in case.inputs:
        _cosine_gate(case)
    elif "fc1_weight" in case.inputs:
        _linear_layer(case)
    elif "weight" in case.inputs:
        _linear_gate(case)
    else:
        _routing(case)


def run_gmoe(case: Case) -> None:
    """A case of GMoE's block: the MoE layer in it."""
    settings, inputs, outputs = case.settings, case.inputs, case.outputs
    assert settings["router"] == "cosine_top"
    weights = _generated(inputs["generated_weights"])
    assert settings["proj_dim"] == len(weights["proj_weight"])
    weight, training = settings["aux_loss_weight"], settings["training"]
    family = Cosine(dim=settings["proj_dim"], **_noise(settings["gate_noise"]))  # at the temperature of both
    layer = _layer(case, settings, settings, family, weight)
    assert_matches("temperature_at_init", settings["temperature_at_init"], layer.router.log_scale)
    _copy_cosine(layer.router, weights, inputs["temperature_param"])

    x = case.given("x").requires_grad_()
    logits = layer.router.logits(x.detach())
    outputs.matches("gate_logits", logits, size=math.exp(inputs["temperature_param"]))  # cosines of 256 summands
    y, loss = _forward(layer, x)
    outputs.matches("y", y)
    outputs.matches("weighted_aux_loss", loss)
    outputs.matches("l_aux", loss / weight)
    (y.sum() + loss).backward()
    outputs.matches("grad_x_of_ysum_plus_weighted_aux", x.grad)
    _choices(case, layer.config, logits, layer.router(x.detach()), training)
    settings.leave_out(LEFT_OUT)


def _routing(case: Case) -> None:
    settings, outputs = case.settings, case.outputs
    logits = case.given("logits").requires_grad_()
    # Whoever has noise configured and is given none is in evaluation, where Tutel still computes its losses.
    training = case.feed("gaussian", case.given("unit_noise")) or not settings["gate_noise"]
    family = TopK(**_noise(settings["gate_noise"]))
    config = _config(logits.shape[1], settings, settings["batch_prioritized_routing"], settings["normalize_gate"])
    config = replace(config, router=family, capacity_multiple_of=settings["alignment"])
    loss = {"gshard": "load_balancing", "load_importance": "load_importance"}[settings["loss"]]
    found = losses_of(config, {loss: 1.0}, logits, training)
    outputs.matches("l_aux", found)
    if "grad_logits_of_l_aux" in outputs:
        found.backward()
        outputs.matches("grad_logits_of_l_aux", logits.grad)
    _, routing = route(config, logits.detach(), training)
    _choices(case, config, logits.detach(), routing, training)
    if config.drop_order == "batch_prioritized":
        outputs.leave_out(NO_COUNT)
    else:
        outputs.matches("dispatch_count", routing.plan.tokens_per_expert)


def _choices(case: Case, config: MoEConfig, logits: Tensor, routing: Routing, training: bool) -> None:
    """Experts, places, gates, capacity and what is kept of a routing."""
    outputs, counts = case.outputs, routing.plan.tokens_per_expert
    outputs.matches("expert", routing.expert_indices)
    outputs.matches("location", queue_places(config, logits, training))
    # Tutel's gates are those before the drop: ours without a capacity.
    free = replace(config, capacity_factor=None, losses={})
    outputs.matches("gate", route(free, logits, training)[1].gate_weights)

    factor, most = config.capacity_factor, config.capacity_for(len(logits), training)
    assert factor is not None
    needed = _aligned(int(counts.max()), config.capacity_multiple_of)
    if factor > 0 or config.drop_order != "batch_prioritized":
        expected = needed if most is None else min(most, needed) if factor < 0 else most
        assert expected == (min(outputs["capacity"], len(logits) * config.top_k) if factor > 0 else outputs["capacity"])
    else:
        theirs = outputs.differs("capacity", "tutel counts its dynamic capacity by the last token")
        assert theirs <= needed
        dropped = (routing.plan.token_rows < 0).sum(), (counts - (needed if most is None else most)).clamp(min=0).sum()
        assert dropped[0] == dropped[1]
        as_told = replace(config, capacity_factor=None, capacity=theirs)
        _, routing = route(as_told, logits, training)
    outputs.matches("kept", kept_of(routing).tokens()[0])
    outputs.matches("num_dropped", int((routing.plan.token_rows < 0).sum()))


def _linear_layer(case: Case) -> None:
    settings, outputs, gate = case.settings, case.outputs, case.settings["gate"]
    assert gate["type"] == "top"
    layer = _layer(case, settings, gate, TopK(**_noise(gate.get("gate_noise", 0))), 1.0)
    with torch.no_grad():
        layer.router.weight.copy_(case.given("gate_weight"))
    x = case.given("x").requires_grad_()
    outputs.matches("gate_logits", layer.router.logits(x))
    y, loss = _forward(layer, x)
    outputs.matches("y", y)
    outputs.matches("l_aux", loss)
    (y.sum() + loss).backward()
    outputs.matches("grad_x_of_ysum_plus_laux", x.grad)
    if layer.config.drop_order == "batch_prioritized":
        outputs.leave_out(NO_COUNT)
    else:
        outputs.matches("dispatch_count_reported", layer.router(x.detach()).plan.tokens_per_expert)
    gate.leave_out(LEFT_OUT)


def _layer(case: Case, settings: Mapping[str, Any], gate: Mapping[str, Any], family: TopK, coefficient: float) -> MoE:
    """Tutel's layer with its experts' weights; fc2's are not transposed there: [E, F, D]."""
    fc1, fc2, bias = case.given("fc1_weight"), case.given("fc2_weight"), case.given("fc2_bias")
    given = case.feed("gaussian", case.given("unit_noise"))
    assert given == bool(gate.get("gate_noise", 0) and settings["training"])
    experts, width, hidden = fc1.shape
    assert settings["num_experts"] == experts
    loss = "load_balancing" if settings["is_gshard_loss"] else "load_importance"
    config = _config(experts, gate, settings["batch_prioritized_routing"], settings["normalize_gate"])
    config = replace(
        config,
        router=family,
        hidden_size=hidden,
        ffn_hidden_size=width,
        bias="expert",
        frozen_down_bias=bias is None,
        activation=ACTIVATIONS[settings["activation"]],
        gate_weight_on="output" if settings["is_postscore"] else "input",
        losses={loss: coefficient},
    )
    layer = MoE(config)
    with torch.no_grad():
        layer.experts.up_proj.copy_(fc1)
        layer.experts.up_bias.copy_(case.given("fc1_bias"))
        layer.experts.down_proj.copy_(fc2.transpose(1, 2))
        layer.experts.down_bias.copy_(torch.zeros(experts, hidden) if bias is None else bias)
    return layer.train(settings["training"])


def _forward(layer: MoE, x: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and the loss, which Tutel has in evaluation too."""
    y = layer(x)
    loss = layer.take_aux_loss() if layer.training else layer.router_losses(layer.router(x))
    assert loss is not None
    return y, loss


def _config(experts: int, gate: Mapping[str, Any], by_priority: bool, normalized: bool) -> MoEConfig:
    top_k = min(gate.get("k", 1), experts)  # Tutel's own limit
    return config_of(
        experts,
        top_k=top_k,
        capacity_factor=gate.get("capacity_factor", 1.0),
        capacity_formula="floor_per_choice",
        gate_normalization=1.0 if normalized and top_k > 1 else None,
        drop_order="batch_prioritized" if by_priority else "choice_major",
        load_balancing_choices="first",
    )


def _aligned(rows: int, alignment: int) -> int:
    """The next multiple."""
    return -(-rows // alignment) * alignment


def _noise(std: float) -> dict[str, Any]:
    return {"logit_noise": "gaussian", "noise_std": std} if std else {}


def _cosine_gate(case: Case) -> None:
    settings, inputs, outputs = case.settings, case.inputs, case.outputs
    x = case.given("x")
    family = Cosine(dim=settings["proj_dim"], temperature=settings["init_t"], max_scale=math.exp(settings["clamp_max"]))
    router = MoE(config_of(settings["num_experts"], router=family, hidden_size=x.shape[1])).router
    outputs.matches("temperature_at_init", router.log_scale)
    weights = {name: numbers(inputs[name]) for name in ("proj_weight", "proj_bias", "sim_matrix")}
    _copy_cosine(router, weights, settings["temperature_param"])
    logits = router.logits(x)
    outputs.matches("logits", logits, size=outputs["logit_scale"])
    logits.square().sum().backward()
    outputs.matches("grad_temperature_of_sum_squares", router.log_scale.grad)
    outputs.matches("grad_sim_matrix_of_sum_squares", router.weight.grad.t())
    with torch.no_grad():  # what a token is multiplied by that points where expert 0 does, whose cosine is 1
        router.projection_bias.copy_(router.weight[0])
        outputs.matches("logit_scale", router.logits(torch.zeros_like(x))[0, 0])
    settings.leave_out(LEFT_OUT)


def _copy_cosine(router: Any, weights: Mapping[str, Tensor], log_scale: float) -> None:
    with torch.no_grad():
        router.projection.copy_(weights["proj_weight"])
        router.projection_bias.copy_(weights["proj_bias"])
        router.weight.copy_(weights["sim_matrix"].t())
        router.log_scale.fill_(log_scale)


def _linear_gate(case: Case) -> None:
    x, weight = case.given("x"), case.given("weight")
    config = config_of(len(weight), top_k=case.settings["k"], hidden_size=x.shape[1])
    router = MoE(config).router
    with torch.no_grad():
        router.weight.copy_(weight)
    case.outputs.matches("logits", router.logits(x))
    case.outputs.matches("has_bias", router.bias is not None)
    case.settings.leave_out(LEFT_OUT)


def _table(case: Case) -> None:
    assert len(case.inputs["columns"]) == 7
    for tokens, experts, top_k, factor, alignment, busiest, capacity in case.outputs["rows"]:
        config = _config(experts, {"k": top_k, "capacity_factor": factor}, False, True)
        most = replace(config, capacity_multiple_of=alignment).capacity_for(tokens)
        needed = _aligned(busiest, alignment)  # which a factor of at most 0 asks for, and dmoe does not name
        limit = tokens * config.top_k
        expected = needed if factor == 0 else min(most, needed) if factor < 0 else most
        assert expected == (capacity if factor <= 0 else min(capacity, limit)), (tokens, experts, top_k, factor)


def _generated(recipe: Mapping[str, Any]) -> dict[str, Tensor]:
    """Weights of a cosine gate by formulas such as ``[p][d] = ((p*37 + d + s) mod 17) / 16, shape [256, 4]``."""
    weights = {}
    for name in ("proj_weight", "proj_bias", "sim_matrix"):
        left, formula, shape = re.fullmatch(r"(.+?) = (.+), shape \[(.+)\]", recipe[name]).groups()
        letters, sizes = re.findall(r"\[(\w)\]", left), [int(size) for size in shape.split(",")]
        places = dict(zip(letters, torch.meshgrid(*map(torch.arange, sizes), indexing="ij"), strict=True))
        assert re.fullmatch(r"[\w\s()*/+-]+", formula)
        known = {"__builtins__": {}, "s": recipe["s"], **places}
        weights[name] = eval(formula.replace("mod", "%"), known).float()
    assert len(weights["proj_weight"]) == recipe["P"]
    assert [weight.sum().item() for weight in weights.values()] == recipe["sums_for_checking"]
    assert [weight.flatten()[-1].item() for weight in weights.values()] == recipe["last_values"]
    return weights
