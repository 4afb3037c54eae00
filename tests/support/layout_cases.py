"""Tiny MoE layers as each system's files have them, made by hand: names, shapes and the order of ranks by its formula.

Nothing here knows the converter's tables. A layer is a dict of whole float64 arrays: ``router (E, H)``,
``up (E, F, H)``, ``gate (E, F, H)`` where experts are gated, ``down (E, H, F)``, ``up_bias (E, F)``,
``down_bias (E, H)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

E, F, H = 4, 6, 8
Layer = dict[str, Tensor]
State = dict[str, Any]


def drawn(seed: int, *, gated: bool = False, biased: bool = True, dtype: torch.dtype = torch.float64) -> Layer:
    """A layer whose numbers are all different."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    layer = {"router": draw(E, H), "up": draw(E, F, H), "down": draw(E, H, F)}
    if gated:
        layer["gate"] = draw(E, F, H)
    if biased:
        layer |= {"up_bias": draw(E, F), "down_bias": draw(E, H)}
    return layer


def rest(prefixes: list[str]) -> State:
    """What a model has besides."""
    return {"embedding.weight": torch.arange(10.0), **{f"{p}norm.weight": torch.ones(H) for p in ("a.", "b.")}}


def mine(layer: Layer, rank: int, ranks: int) -> range:
    """The experts of a rank, rank after rank."""
    each = max(1, E // ranks)
    return range(rank * each, (rank + 1) * each)


def tutel_ffn(layer: Layer, prefix: str, rank: int, ranks: int) -> State:
    if ranks <= E:
        experts, part, of_bias = list(mine(layer, rank, ranks)), slice(None), slice(None)
    else:
        sharing = ranks // E
        experts, place = [rank // sharing], rank % sharing
        part = slice(place * F // sharing, (place + 1) * F // sharing)
        of_bias = slice(place * H // sharing, (place + 1) * H // sharing)
    state = {
        f"{prefix}gates.0.wg.weight": layer["router"].float(),
        f"{prefix}_num_global_experts": torch.tensor(E),
        f"{prefix}experts.batched_fc1_w": layer["up"][experts, part],
        f"{prefix}experts.batched_fc2_w": layer["down"][experts].mT[:, part],
    }
    if "up_bias" in layer:
        state[f"{prefix}experts.batched_fc1_bias"] = layer["up_bias"][experts, part]
        state[f"{prefix}experts.batched_fc2_bias"] = layer["down_bias"][experts, of_bias]
    return state


def tutel_one_bias(layer: Layer, prefix: str, rank: int, ranks: int) -> State:
    """``has_fc2_bias=False``."""
    state = tutel_ffn(layer, prefix, rank, ranks)
    del state[f"{prefix}experts.batched_fc2_bias"]
    layer["down_bias"] = torch.zeros_like(layer["down_bias"])
    return state


def tutel_old(layer: Layer, prefix: str, rank: int, ranks: int) -> State:
    state = tutel_ffn(layer, prefix, rank, ranks)
    del state[f"{prefix}_num_global_experts"]
    for name in ("batched_fc1_bias", "batched_fc2_bias"):
        state[f"{prefix}experts.{name}"] = state[f"{prefix}experts.{name}"].unsqueeze(1)
    return state


def tutel_llama(layer: Layer, prefix: str, rank: int, ranks: int) -> State:
    experts = list(mine(layer, rank, ranks))
    return {
        f"{prefix}gates.0.wg.weight": layer["router"].float(),
        f"{prefix}_num_global_experts": torch.tensor(E),
        f"{prefix}experts.W_fc1": layer["gate"][experts].mT.reshape(-1),
        f"{prefix}experts.W_fc2": layer["up"][experts].mT.reshape(-1),
        f"{prefix}experts.W_fc3": layer["down"][experts].mT.reshape(-1),
    }


def fairseq(layer: Layer, prefix: str, rank: int, ranks: int) -> State:
    experts = mine(layer, rank, ranks) if ranks <= E else [rank % E]
    state = {f"{prefix}gate.wg.weight": layer["router"].float()}
    for local, e in enumerate(experts):
        state |= {
            f"{prefix}experts.{local}.fc1.weight": layer["up"][e],
            f"{prefix}experts.{local}.fc1.bias": layer["up_bias"][e],
            f"{prefix}experts.{local}.fc2.weight": layer["down"][e],
            f"{prefix}experts.{local}.fc2.bias": layer["down_bias"][e],
        }
    return state


def _megablocks_part(rank: int, ranks: int) -> tuple[list[int], slice]:
    if ranks <= E:
        return list(mine({}, rank, ranks)), slice(None)
    sharing = ranks // E
    place = rank // E
    return [rank % E], slice(place * F // sharing, (place + 1) * F // sharing)


def megablocks(layer: Layer, prefix: str, rank: int, ranks: int) -> State:
    experts, part = _megablocks_part(rank, ranks)
    halves = [("w1", layer["gate"]), ("v1", layer["up"])] if "gate" in layer else [("w1", layer["up"])]
    state = {f"{prefix}router.layer.weight": layer["router"].float()}
    state |= {f"{prefix}experts.mlp.{name}": value[experts, part].reshape(-1, H) for name, value in halves}
    state[f"{prefix}experts.mlp.w2"] = layer["down"][experts].mT[:, part].reshape(-1, H)
    if "up_bias" in layer:
        state[f"{prefix}experts.bias"] = layer["down_bias"][0]
    return state


def megablocks_with_capacity(layer: Layer, prefix: str, rank: int, ranks: int) -> State:
    experts = list(mine(layer, rank, ranks))
    return {
        f"{prefix}router.layer.weight": layer["router"].float(),
        f"{prefix}experts.mlp.w1": layer["up"][experts].mT.contiguous(),
        f"{prefix}experts.mlp.w2": layer["down"][experts].mT.contiguous(),
    }


def _fc1(layer: Layer, e: int) -> Tensor:
    return torch.cat([layer["gate"][e], layer["up"][e]]) if "gate" in layer else layer["up"][e]


def sequential(layer: Layer, prefix: str, rank: int, ranks: int) -> State:
    state = {f"{prefix}router.weight": layer["router"].float()}
    for local, e in enumerate(mine(layer, rank, ranks)):
        name = f"{prefix}experts.local_experts.{local}.linear_fc"
        state |= {f"{name}1.weight": _fc1(layer, e), f"{name}2.weight": layer["down"][e]}
        if "up_bias" in layer:
            state |= {f"{name}1.bias": layer["up_bias"][e], f"{name}2.bias": layer["down_bias"][e]}
    return state


def te(layer: Layer, prefix: str, rank: int, ranks: int) -> State:
    state = {f"{prefix}router.weight": layer["router"].float()}
    for local, e in enumerate(mine(layer, rank, ranks)):
        state[f"{prefix}experts.linear_fc1.weight{local}"] = _fc1(layer, e)
        state[f"{prefix}experts.linear_fc2.weight{local}"] = layer["down"][e]
    return state


def grouped(layer: Layer, prefix: str, rank: int, ranks: int) -> State:
    experts = list(mine(layer, rank, ranks))
    up = torch.stack([_fc1(layer, e) for e in experts])
    return {
        f"{prefix}router.weight": layer["router"].float(),
        f"{prefix}experts.weight1": up.mT.contiguous().view(H, -1),
        f"{prefix}experts.weight2": layer["down"][experts].mT.reshape(-1, H),
    }


def deepspeed(layer: Layer, prefix: str, rank: int, ranks: int) -> State:
    state = {f"{prefix}deepspeed_moe.gate.wg.weight": layer["router"].float()}
    for local, e in enumerate(mine(layer, rank, ranks)):
        name = f"{prefix}deepspeed_moe.experts.deepspeed_experts.{local}."
        if "gate" in layer:
            state |= {f"{name}w1.weight": layer["gate"][e], f"{name}w3.weight": layer["up"][e]}
            state[f"{name}w2.weight"] = layer["down"][e]
            continue
        for kind, own in (("up", "dense_h_to_4h"), ("down", "dense_4h_to_h")):
            state |= {f"{name}{own}.weight": layer[kind][e], f"{name}{own}.bias": layer[f"{kind}_bias"][e]}
    return state


def output(layer: Mapping[str, Tensor], x: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    """Every token through its best expert, weighed by its probability; ``x`` is (T, H) float64."""
    p = torch.softmax(x @ layer["router"].float().double().t(), -1)
    y = torch.empty_like(x)
    for t in range(len(x)):
        e = int(p[t].argmax())
        inner = layer["up"][e] @ x[t]
        inner = inner + layer["up_bias"][e] if "up_bias" in layer else inner
        hidden = act(layer["gate"][e] @ x[t]) * inner if "gate" in layer else act(inner)
        found = layer["down"][e] @ hidden
        y[t] = p[t, e] * (found + layer["down_bias"][e] if "down_bias" in layer else found)
    return y
