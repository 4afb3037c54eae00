"""V-MoE's cases: noisy top-k with groups, priorities and three losses; experts that choose; the table of capacities."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from zoo import Case, config_of, kept_of, losses_of, queue_places, route

from dmoe import MoE, MoEConfig
from dmoe.routing import TopK


def run(case: Case) -> None:
    """A case of ``NoisyTopExpertsPerItemRouter``, or of ``compute_capacity``."""
    if "rows" in case.outputs:
        _table(case)
    else:
        _token_choice(case)


def run_expert_choice(case: Case) -> None:
    """A case of ``NoisyTopItemsPerExpertRouter``."""
    settings, outputs, logits = case.settings, case.outputs, case.given("logits")
    groups, size, experts = logits.shape
    assert settings["noise_std"] == 0
    config = config_of(
        experts,
        router="expert_choice",
        causal=False,
        top_k=1,
        token_groups=groups,
        hidden_size=experts,
        ffn_hidden_size=2 * experts,
        **_capacity(settings),
    )
    assert settings["num_experts"] == experts
    layer, routing = route(config, logits.view(-1, experts))
    kept = kept_of(routing)
    weights = kept.dense().view(groups, size, experts)
    outputs.matches("kept", kept.tokens(groups))
    outputs.matches("combine_weights", weights)
    outputs.matches("capacity", int(routing.plan.tokens_per_expert[0]) // groups)
    _scaled_experts(case, layer, logits)
    chosen = [weights[group][weights[group] > 0] for group in range(groups)]
    outputs.matches("max_selected_gate", torch.stack([gates.max() for gates in chosen]))
    outputs.matches("min_selected_gate", torch.stack([gates.min() for gates in chosen]))
    each = routing.plan.token_offsets.diff().view(groups, size)  # experts that a token has
    outputs.matches("num_experts_per_item_max", each.max(1).values)
    outputs.matches("num_experts_per_item_min", each.min(1).values)
    for name in list(outputs):
        if name.startswith("ratio_processed_items_by_at_least_"):
            least = int(name.removeprefix("ratio_processed_items_by_at_least_").removesuffix("_experts"))
            outputs.matches(name, (each >= least).float().mean(1))
    found = layer.router_losses(routing)
    outputs.matches("auxiliary_loss", 0 if found is None else found)


def _token_choice(case: Case) -> None:
    settings, outputs = case.settings, case.outputs
    training, std = not settings["deterministic"], settings["noise_std"]
    kernel, x = case.given("kernel"), case.given("x")
    leaf = case.given("logits") if kernel is None else kernel
    leaf.requires_grad_()
    by_group = leaf if kernel is None else x @ kernel
    groups, size, experts = by_group.shape
    logits = by_group.view(-1, experts)
    config = _config(case, groups, experts)
    assert case.feed("gaussian", case.given("unit_noise")) == bool(std and training)

    layer, routing = route(config, logits, training)
    kept, capacity = kept_of(routing), config.capacity_for(size, training)
    outputs.matches("kept", kept.tokens(groups))
    outputs.matches("combine_weights", kept.dense().view(groups, size, experts))
    outputs.matches("topk_expert", routing.expert_indices.view(groups, size, -1))
    outputs.matches("topk_buffer_index", queue_places(config, logits, training).view(groups, size, -1))
    # No more rows than choices: a capacity beyond drops as little.
    assert capacity == min(outputs["capacity"], size * config.top_k)
    if "out_scaled_experts" in outputs:
        _scaled_experts(case, layer, by_group.detach())
    _losses(case, config, by_group, training)

    gradient = f"grad_{'logits' if kernel is None else 'kernel'}_of_mean_auxiliary_loss"
    if gradient in outputs:  # of the mean over groups, which is what a layer's loss is
        losses_of(config, _weights(case), logits, training).backward()
        outputs.matches(gradient, leaf.grad)


def _config(case: Case, groups: int, experts: int) -> MoEConfig:
    settings, dispatcher = case.settings, case.settings["dispatcher"]
    assert settings["num_experts"] == experts
    std = settings["noise_std"]
    return config_of(
        experts,
        router=TopK(logit_noise="gaussian", noise_std=std) if std else TopK(),
        top_k=settings["num_selected_experts"],
        drop_order="batch_prioritized" if dispatcher["batch_priority"] else "choice_major",
        load_balancing_choices="first",
        token_groups=groups,
        hidden_size=experts,
        ffn_hidden_size=2 * experts,
        **_capacity(dispatcher),
    )


def _capacity(dispatcher: Any) -> dict[str, Any]:
    if "capacity" in dispatcher:
        return {"capacity": dispatcher["capacity"]}
    return {
        "capacity_factor": dispatcher["capacity_factor"],
        "capacity_formula": dispatcher.get("capacity_ceil_or_round", "ceil"),
        "capacity_multiple_of": dispatcher.get("capacity_multiple_of", 4) or 1,
    }


def _weights(case: Case) -> dict[str, float]:
    """The coefficients of the losses; without noise there is none of the load."""
    settings = case.settings
    weights = {name: settings.get(f"{name}_loss_weight", 0) for name in ("gshard", "importance", "load")}
    if not settings["noise_std"]:
        del weights["load"]
    weights["load_balancing"] = weights.pop("gshard")
    return weights


def _losses(case: Case, config: MoEConfig, by_group: Tensor, training: bool) -> None:
    """V-MoE reports the losses of each group; a layer's are their means."""
    outputs, groups = case.outputs, len(by_group)
    given, logits = case.draws.get("gaussian"), by_group.flatten(0, 1)
    weights, noisy = _weights(case), bool(case.settings["noise_std"])
    asked = {
        "auxiliary_loss": weights,
        "gshard_loss": {"load_balancing": 1.0},
        "importance_loss": {"importance": 1.0},
        "load_loss": {"load": 1.0} if noisy else {},
    }
    assert ("load_loss" in outputs) == (noisy and training)
    alone = replace(config, token_groups=1)
    for name, losses in asked.items():
        found = []
        for group in range(groups):
            if given is not None:
                case.draws["gaussian"] = given[group]
            found.append(losses_of(alone, losses, by_group[group], training))
        if given is not None:
            case.draws["gaussian"] = given
        outputs.matches(name, torch.stack(found))
        together = losses_of(config, losses, logits, training)
        torch.testing.assert_close(together, torch.stack(found).mean(), rtol=1e-5, atol=1e-7)


def _scaled_experts(case: Case, layer: MoE, x: Tensor) -> None:
    """The whole layer with logits for tokens, where expert e multiplies by e + 1: relu(x) - relu(-x) is x."""
    one = torch.eye(x.shape[-1])
    both = torch.cat([one, -one])
    with torch.no_grad():
        layer.router.weight.copy_(one)
        layer.experts.up_proj.copy_(both.expand_as(layer.experts.up_proj))
        for expert in range(len(one)):
            layer.experts.down_proj[expert] = both.t() * (expert + 1)
    case.outputs.matches("out_scaled_experts", layer(x))


def _table(case: Case) -> None:
    """The table has the choices of all tokens, which is the tokens where experts choose."""
    assert len(case.inputs["columns"]) == 5
    for chosen, experts, factor, formula, multiple, capacity in case.outputs["rows"]:
        fields = {"capacity_factor": factor, "capacity_formula": formula, "capacity_multiple_of": multiple or 1}
        for top_k in (k for k in (1, 2) if chosen % k == 0):
            config = config_of(experts, top_k=top_k, **fields)
            assert config.capacity_for(chosen // top_k) == min(capacity, chosen), (chosen, experts, factor, formula)
        config = config_of(experts, router="expert_choice", causal=False, top_k=1, **fields)
        _, routing = route(config, torch.zeros(chosen, experts))
        assert routing.plan.tokens_per_expert.tolist() == [min(capacity, chosen)] * experts
