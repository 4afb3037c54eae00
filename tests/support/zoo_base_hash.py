"""Cases of BASE layers (fairseq) and of hash layers (ParlAI's random table, MoEBERT's balanced one)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from zoo import Case, config_of, copy_mlps, numbers, route, sizes_of

from dmoe import MoE, MoEConfig
from dmoe.routing import Hash

# fairseq's auction is an approximation, and stops early; dmoe's assignment is the optimum.
OF_THE_AUCTION = {
    "auction_expert_of_token": "the auction's choice, which is not always optimal",
    "auction_raw_order": "the order in which the auction found an expert's tokens",
    "auction_is_optimal": "says something of the auction",
    "score_range": "says something of the scores",
}


def run_base(case: Case) -> None:
    """A case of the assignment alone, or of whole layers."""
    if "scores" in case.inputs:
        _assignment(case)
    else:
        _base_layer(case)


def _base(experts: int, **fields: Any) -> MoEConfig:
    return config_of(experts, router="base", causal=False, top_k=1, **fields)


def _assignment(case: Case) -> None:
    settings, outputs, scores = case.settings, case.outputs, case.given("scores")
    tokens, experts = scores.shape
    assert (settings["tokens"], settings["experts"]) == (tokens, experts)
    found = {}
    for name, training in (("optimal", True), ("greedy", False)):
        _, routing = route(_base(experts), scores, training)
        found[name] = routing.expert_indices.squeeze(1)
        outputs.matches(f"{name}_score", _score(scores, found[name]))
    counts = torch.bincount(found["optimal"], minlength=experts)
    assert counts.tolist() == [settings["tokens_per_expert"]] * experts
    outputs.matches("greedy_expert_of_token", found["greedy"])
    unique = outputs["optimal_score_minus_next_best"] > 0
    if unique:
        outputs.matches("optimal_expert_of_token", found["optimal"])
    else:
        outputs.leave_out({"optimal_expert_of_token": "one of several optima"})
    assert _score(scores, found["optimal"]) >= outputs["auction_score"] - 1e-6
    outputs.leave_out(OF_THE_AUCTION)


def _score(scores: Tensor, expert: Tensor) -> Tensor:
    return scores.double().gather(1, expert.unsqueeze(1)).sum()


def _base_layer(case: Case) -> None:
    """Every rank assigns its own tokens; all experts are here, so that one process takes the ranks in turn.

    An expert is f(x) = x + ff(LN(x)) there, and y = a f(x) + (1 - a) x = x + a ff(LN(x)): the routing sees x, the
    experts LN(x), whose affine part their up projection takes in.
    """
    settings, outputs = case.settings, case.outputs
    assert (settings["sublayers"], settings["shuffle"]) == (1, False)
    assert settings["training_is"] == "input requires grad"
    x, centroids = case.given("x").requires_grad_(), case.given("centroids")
    experts = [_folded(expert) for expert in case.inputs["experts"]]
    ranks, tokens, hidden = x.shape
    assert (settings["ranks"], settings["tokens_per_rank"], settings["experts"]) == (ranks, tokens, len(experts))
    config = _base(len(experts), bias="expert", activation=settings["activation"], **sizes_of(experts, "ff1_weight"))
    layer = MoE(config)
    initial = layer.router.weight.detach()
    outputs.matches("init_centroid_gram", initial @ initial.t())
    copy_mlps(layer, experts, ("ff1", "ff2"))
    with torch.no_grad():
        layer.router.weight.copy_(centroids)

    def of_ranks() -> tuple[Tensor, Tensor]:
        y, chosen = [], []
        for own in x:
            routing = layer.router(own)
            y.append(own + layer.experts(F.layer_norm(own, (hidden,)), routing.plan, routing.gate_weights))
            chosen.append(routing.expert_indices.squeeze(1))
        return torch.stack(y), torch.stack(chosen)

    y, chosen = of_ranks()
    outputs.matches("y_train", y)
    outputs.matches("train_expert_of_token", chosen)
    scores = torch.stack([_score(own @ centroids.t(), expert) for own, expert in zip(x.detach(), chosen, strict=True)])
    outputs.matches("train_score", scores)
    outputs.matches("train_optimal_score", scores)
    y.square().sum().backward()
    outputs.matches("grad_x_of_sum_squares", x.grad)
    # A rank has the gradient of its own expert's centroid alone.
    of_rank = torch.diag_embed(layer.router.weight.grad.t()).permute(1, 2, 0)
    outputs.matches("grad_centroids_per_rank", of_rank)
    layer.eval()
    y, chosen = of_ranks()
    outputs.matches("y_eval", y)
    outputs.matches("eval_expert_of_token", chosen)


def _folded(expert: Mapping[str, Any]) -> dict[str, Any]:
    """An expert whose up projection takes in the scale and shift of its LayerNorm."""
    scale, shift, up = (numbers(expert[name]) for name in ("norm_weight", "norm_bias", "ff1_weight"))
    bias = numbers(expert["ff1_bias"]) + up @ shift
    down = {name: expert[name] for name in ("ff2_weight", "ff2_bias")}
    return {"ff1_weight": (up * scale).tolist(), "ff1_bias": bias.tolist(), **down}


def run_random_hash(case: Case) -> None:
    """A case of ParlAI's hash layer."""
    settings, outputs = case.settings, case.outputs
    drawn = re.fullmatch(r"python random\.seed\((\d+)\), then random\.randrange\(0, hash_size\) .*", settings["table"])
    family = Hash(vocab_size=settings["dict_size"], seed=int(drawn[1]))
    table = family.experts_of_ids(settings["hash_size"]).squeeze(1)
    outputs.matches("hash_table", table)
    outputs.matches("bins_used", torch.bincount(table, minlength=settings["hash_size"]))
    layer = _hash_layer(case, family, settings["activation"])
    outputs.matches("in_state_dict", any("table" in name for name in layer.state_dict()))


def run_balanced_hash(case: Case) -> None:
    """A case of MoEBERT's balanced hash."""
    settings, outputs, frequencies = case.settings, case.outputs, case.inputs["token_frequency"]
    experts = settings["num_experts"]
    assert (case.inputs["num_buckets"], settings["vocab"]) == (experts, len(frequencies))
    assert settings["balance_loss"] == 0
    table = Hash(frequencies=frequencies).experts_of_ids(experts).squeeze(1)
    # Ids that never occur in the data are drawn at random there and here: take theirs, which tokens below have.
    drawn = outputs["random_entries"]
    assert drawn == [token for token, count in enumerate(frequencies) if count == 0]
    table[drawn] = torch.tensor(outputs["hash_table"])[drawn]
    outputs.matches("hash_table", table)
    loads = torch.zeros(experts, dtype=torch.int64).index_add(0, table, torch.tensor(frequencies))
    outputs.matches("bucket_load", loads)
    layer = _hash_layer(case, Hash(table=table.tolist()), settings.get("activation", "relu"))
    outputs.matches("balance_loss", 0 if layer.take_aux_loss() is None else 1)
    load = layer.router(case.given("x").flatten(0, -2), token_ids=torch.tensor(case.inputs["token_ids"]).flatten())
    outputs.matches("gate_load", load.plan.tokens_per_expert)


def _hash_layer(case: Case, family: Hash, activation: str) -> MoE:
    """The layer whose experts these are, after a training forward that was compared."""
    x, token_ids, experts = case.given("x"), torch.tensor(case.inputs["token_ids"]), case.inputs["experts"]
    assert case.settings["gate_weight"] == "none (1)"
    sizes = {"bias": "expert", "activation": activation, **sizes_of(experts)}
    layer = MoE(config_of(len(experts), router=family, top_k=1, **sizes))
    copy_mlps(layer, experts)
    case.outputs.matches("y", layer(x, token_ids=token_ids))
    routing = layer.router(x.flatten(0, -2), token_ids=token_ids.flatten())
    case.outputs.matches("expert_of_token", routing.expert_indices.view_as(token_ids))
    return layer
