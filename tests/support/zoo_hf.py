"""Cases of Transformers' Switch and NLLB, and of flaxformer's routers."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from zoo import Case, config_of, copy_mlps, kept_of, losses_of, queue_places, route, sizes_of

from dmoe import MoE, MoEConfig, Routing
from dmoe.losses import sequence_load_balancing_loss
from dmoe.routing import TopK


def run_switch(case: Case) -> None:
    """A case of Switch: router, layer, or the losses of several layers."""
    if "logits_layer0" in case.inputs:
        _losses_of_layers(case)
    else:
        _switch(case)


def _switch(case: Case) -> None:
    settings, outputs, x = case.settings, case.outputs, case.given("x")
    jitter, before = case.given("jitter"), x.clone()
    training, shape, most = settings["training"], x.shape[:-1], settings["router_jitter_noise"]
    assert (jitter is not None) == (training and most > 0)
    assert settings["capacity_counted"] == "per batch row (sequence)"
    if jitter is not None:  # in place there: the experts see it, too
        assert ((jitter - 1).abs() <= most).all()
        x = x * jitter
    config = config_of(
        settings["num_experts"],
        top_k=1,
        capacity=settings["expert_capacity"],
        token_groups="sequence",
        router_bias=settings["router_bias"],
        activation=settings["activation"],
        hidden_size=x.shape[-1],
    )
    if "experts" in case.inputs:
        config = replace(config, **sizes_of(case.inputs["experts"], "wi"))
    layer = MoE(config).train(training)
    with torch.no_grad():
        layer.router.weight.copy_(case.given("router_weight"))
    tokens, sequences = x.flatten(0, -2), shape[0]
    logits = layer.router.logits(tokens)
    routing = layer.router(tokens, num_sequences=sequences)
    kept = routing.plan.token_to_rows >= 0
    outputs.matches("router_logits", logits.view(*shape, -1))
    outputs.matches("expert", routing.expert_indices.view(shape))
    outputs.matches("kept", kept.view(shape).int())
    top = routing.router_probs.gather(1, routing.expert_indices)
    outputs.matches("top_prob", top.view(shape))
    assert torch.equal(routing.gate_weights, torch.where(kept, top, 0))
    # E^2 times the mean over rows and experts of f P is the mean over rows of E sum(f P).
    for name, loss in (("z_loss", "z"), ("aux_loss", "load_balancing")):
        alone = MoE(replace(config, losses={loss: 1.0})).train(training)
        taken = alone.router.route(logits, num_sequences=sequences)
        outputs.matches(name, alone.router_losses(taken, sequences))
    # 4.57.1 has all zeros where a token is dropped, and then takes the first largest of them.
    zeroed = routing.expert_indices.masked_fill(~kept, 0)
    older = sequence_load_balancing_loss(routing.router_probs, zeroed, sequences)
    outputs.matches("aux_loss_as_transformers_4.57.1_model_computes_it", older)
    if "experts" in case.inputs:
        copy_mlps(layer, case.inputs["experts"], ("wi", "wo"))
        outputs.matches("y", layer(x))
    else:
        settings.leave_out({"activation": "a router alone has none"})
    assert torch.equal(case.given("x"), before)
    outputs.leave_out({"caller_input_modified_in_place": "dmoe multiplies a copy"})


def _losses_of_layers(case: Case) -> None:
    """Transformers pools its layers: each sequence goes on where it ended in the layer before."""
    layers = [case.given(f"logits_layer{number}") for number in range(len(case.inputs))]
    sequences, _, experts = layers[0].shape
    config = config_of(experts, top_k=1, token_groups=sequences)
    pooled = torch.cat(layers, 1).flatten(0, 1)
    case.outputs.matches("z_loss", losses_of(config, {"z": 1.0}, pooled))
    case.outputs.matches("aux_loss", losses_of(config, {"load_balancing": 1.0}, pooled))
    apart = [losses_of(config, {"load_balancing": 1.0}, logits.flatten(0, 1)) for logits in layers]
    case.outputs.matches("mean_of_separate_aux", torch.stack(apart).mean())
    coefficients = ("router_z_loss_coef", "router_aux_loss_coef")
    case.settings.leave_out(dict.fromkeys(coefficients, "the losses are recorded without"))


def run_nllb(case: Case) -> None:
    """A case of NLLB: its router, its layer, or how its capacity sticks."""
    if "calls" in case.inputs:
        _sticky(case)
    elif "experts" in case.inputs:
        _nllb_layer(case)
    else:
        _nllb_router(case)


def _nllb(case: Case, experts: int) -> MoEConfig:
    settings = case.settings
    before = settings["normalize_router_prob_before_dropping"]
    policy = settings["second_expert_policy"]
    by_priority = settings.get("batch_prioritized_routing", False)
    return config_of(
        experts,
        top_k=2,
        router=TopK(
            second_expert="random_raw" if policy == "random" and before else policy, noise_in_eval=policy != "all"
        ),
        gate_normalization=1.0,
        normalize_when="before_drop" if before else "after_drop",
        drop_order="batch_prioritized" if by_priority else "choice_major",
        **_nllb_capacity(settings["expert_capacity"], settings.get("moe_eval_capacity_token_fraction", -1)),
    )


def _nllb_capacity(capacity: int | None, fraction: float) -> dict[str, Any]:
    """A number, or twice an even share of first choices; in evaluation a share of the tokens, if it is above 0."""
    of_evaluation = {"eval_capacity_fraction": fraction if fraction > 0 else None}
    if capacity is not None:
        return {"capacity": capacity, **of_evaluation}
    return {"capacity_factor": 1.0, "capacity_formula": "ceil_per_choice", **of_evaluation}


def _nllb_router(case: Case) -> None:
    settings, outputs, logits = case.settings, case.outputs, case.given("logits")
    config, training = _nllb(case, logits.shape[1]), settings["training"]
    padding = case.given("padding_mask")
    case.feed("uniform", case.given("uniform"))
    case.feed("gumbel", case.given("gumbel"))
    mask = None if padding is None else padding == 0
    _, routing = route(config, logits, training, token_mask=mask)
    assert config.capacity_for(len(logits), training) == min(outputs["capacity_used"], 2 * len(logits))
    outputs.matches("kept", kept_of(routing).tokens()[0])
    outputs.matches("combine_weights", kept_of(routing).dense())
    outputs.matches("top1_kept", _first_kept(routing))
    settings.leave_out({"router_ignore_padding_tokens": "says whether the model hands the padding to the router"})


def _first_kept(routing: Routing) -> Tensor:
    """First choices that take a row, ``(T, E)``."""
    kept = routing.plan.token_to_rows[:, :1] >= 0
    chosen = routing.expert_indices[:, :1].masked_fill(~kept, routing.plan.num_experts)
    return torch.nn.functional.one_hot(chosen.squeeze(1), routing.plan.num_experts + 1)[:, :-1]


def _nllb_layer(case: Case) -> None:
    settings, outputs, x = case.settings, case.outputs, case.given("x")
    experts = case.inputs["experts"]
    assert (len(experts), settings["training"]) == (settings["num_experts"], False)
    sizes = {"bias": "expert", "activation": settings["activation"], **sizes_of(experts)}
    layer = MoE(replace(_nllb(case, len(experts)), **sizes)).eval()
    copy_mlps(layer, experts)
    with torch.no_grad():
        layer.router.weight.copy_(case.given("router_weight"))
    outputs.matches("combine_weights", kept_of(layer.router(x.flatten(0, -2))).dense())
    # fairseq's dropout of experts' outputs does not scale what it keeps in training, and so scales here; dmoe's does.
    outputs.matches("y", layer(x) * (1 - settings["moe_token_dropout"]))


def _sticky(case: Case) -> None:
    """Each call by its own tokens; theirs agree until one has changed what the router goes on with."""
    assert case.inputs["calls"] == "(tokens, mode)"
    calls = case.outputs.differs("calls", "transformers' NLLB keeps its first capacity")
    tokens, mode, first = calls[0]
    assert mode == "train"
    experts = math.ceil(tokens / (first / 2))  # the case does not say; the first call does
    for tokens, mode, _ in calls:
        training, fraction = mode == "train", re.fullmatch(r"eval frac ([\d.]+)", mode)
        given = -1.0 if fraction is None else float(fraction[1])
        assert training == (fraction is None)
        config = config_of(experts, top_k=2, **_nllb_capacity(case.settings["expert_capacity_initially"], given))
        own = 2 * -(-tokens // experts) if training else math.ceil(given * tokens)
        assert config.capacity_for(tokens, training) == own
    config = config_of(experts, top_k=2, **_nllb_capacity(case.settings["expert_capacity_initially"], -1))
    assert config.capacity_for(calls[0][0]) == first


def run_flaxformer(case: Case) -> None:
    """A case of flaxformer's routers: ``TokensChoose`` masked or scattered, or ``ExpertsChoose``."""
    settings, outputs, logits = case.settings, case.outputs, case.given("logits")
    groups, size, experts = logits.shape
    assert settings["num_experts"] == experts
    jitter = case.given("jitter")
    assert (jitter is not None) == (settings["jitter_noise"] > 0)
    if jitter is not None:  # of its input, which is the logits here: the router's weights are the identity
        assert ((jitter - 1).abs() <= settings["jitter_noise"]).all()
        logits = logits * jitter
    flat = logits.flatten(0, 1)
    # Padding is a token of zeros; without the option there is none.
    mask = ~(flat == 0).all(1) if settings["ignore_padding_tokens"] else torch.ones(len(flat), dtype=torch.bool)
    # The settings of both kinds are the same; no loss balances what experts choose.
    choose = outputs["auxiliary_loss"] == 0
    config = _flaxformer(case, experts, size, choose)
    _, routing = route(replace(config, token_groups=groups), flat, token_mask=mask)
    kept = kept_of(routing)
    outputs.matches("kept", kept.tokens(groups))
    outputs.matches("combine_weights", kept.dense().view(groups, size, experts))
    if not choose:
        outputs.matches("topk_weight", routing.gate_weights.view(groups, size, -1))
        if "topk_expert" in outputs:
            assert mask.all()
            outputs.matches("topk_expert", routing.expert_indices.view(groups, size, -1))
            places = queue_places(replace(config, token_groups=groups), flat)
            outputs.matches("topk_buffer_index", places.view(groups, size, -1))
    _flaxformer_losses(case, config, logits, mask.view(groups, size), choose)


def _flaxformer(case: Case, experts: int, size: int, choose: bool) -> MoEConfig:
    settings = case.settings
    top_k, capacity = settings["num_selected_experts"], settings["expert_capacity"]
    by_priority = settings["batch_prioritized_routing"]
    if choose:  # by a factor whose rounding up gives this number, whatever the division makes of it
        factor = (capacity - 0.5) * experts / size
        return config_of(experts, router="expert_choice", causal=False, top_k=1, capacity_factor=factor)
    order = "batch_prioritized" if by_priority else "choice_major"
    return config_of(experts, top_k=top_k, capacity=capacity, drop_order=order)


def _flaxformer_losses(case: Case, config: MoEConfig, logits: Tensor, mask: Tensor, choose: bool) -> None:
    """In terms of dmoe's, whose means are over the n tokens of a group that count, and not over all S.

    Balance: f counts all K choices, and both f and P divide by S: K (n / S)^2 times dmoe's. z: padding has the logits
    0, whose logsumexp is ln E: (n z + (S - n) ln(E)^2) / S.
    """
    balance, z = [], []
    for of_group, counted in zip(logits, mask, strict=True):
        experts = of_group.shape[1]
        share = counted.float().mean()
        found = {}
        for name in ("load_balancing", "z"):
            layer, routing = route(replace(config, losses={name: 1.0}), of_group, token_mask=counted)
            found[name] = layer.router_losses(routing)
        balance.append(found["load_balancing"] * config.top_k * share**2)
        z.append(found["z"] * share + (1 - share) * math.log(experts) ** 2)
    case.outputs.matches("router_z_loss", torch.stack(z).mean())
    # Experts that choose are balanced: flaxformer has no loss for them, and dmoe's is 1, a constant.
    case.outputs.matches("auxiliary_loss", 0 if choose else torch.stack(balance).mean())
