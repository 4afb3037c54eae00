"""What DeepSpeed's engine trains in the tests, and the plain loop on the same batches of all ranks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import dmoe
from dmoe.compat.deepspeed import MoE as CompatMoE

H, F, E, K, TOKENS, STEPS = 8, 12, 4, 2, 16, 6
SGD = {"type": "SGD", "params": {"lr": 0.2, "momentum": 0.9}}
ADAMW = {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}}


@dataclass(frozen=True)
class Case:
    """A run of six steps.

    Attributes:
        zero: DeepSpeed's ``zero_optimization``.
        ep: ranks that share experts; 0 is all.
        accumulate: micro-batches of a step.
        clip: the largest norm.
        optimizer: DeepSpeed's.
        config: more of DeepSpeed's.
        aux: how the auxiliary loss is added.
        dtype: that the engine computes in.
        own: what the optimizer is: the engine's, or one that is given.
        resume: whether another engine, of other values, goes on in the middle with what the first one saved.
        load: what another case saved, at whose third step this one begins.
        weights: whether weights are all that is loaded, and no step follows.
        overflow: the step in which an expert of the last rank has an infinite gradient.
        compat: whether the layers are those of ``dmoe.compat.deepspeed``.
    """

    zero: dict[str, Any] = field(default_factory=lambda: {"stage": 0})
    ep: int = 0
    accumulate: int = 1
    clip: float = 0.0
    optimizer: dict[str, Any] = field(default_factory=lambda: SGD)
    config: dict[str, Any] = field(default_factory=dict)
    aux: str = "explicit"
    dtype: torch.dtype = torch.float32
    own: bool = False
    resume: bool = False
    load: str = ""
    weights: bool = False
    overflow: int = -1
    compat: bool = False


_HALF = {"accumulate": 2, "aux": "attached"}
_BF16 = {**_HALF, "dtype": torch.bfloat16, "config": {"bf16": {"enabled": True}}, "clip": 0.5}
_FP16 = {
    **_HALF,
    "dtype": torch.float16,
    "config": {"fp16": {"enabled": True, "initial_scale_power": 10, "hysteresis": 1, "loss_scale_window": 1000}},
    "overflow": 2,
}
_UNIVERSAL = {"checkpoint": {"load_universal": True}}
_FULL = {"accumulate": 2, "clip": 0.05}

CASES: dict[int, dict[str, Case]] = {  # by the number of ranks, in the order in which they need each other's files
    2: {
        **{f"ZeRO {stage}": Case({"stage": stage}, **_FULL) for stage in range(4)},
        **{f"ZeRO {stage}, saved": Case({"stage": stage}, resume=True) for stage in range(4)},
        **{f"ZeRO {stage}, attached": Case({"stage": stage}, **_FULL, aux="attached") for stage in (0, 2)},
        **{f"ZeRO {stage}, not shared": Case({"stage": stage}, ep=1, resume=True) for stage in (0, 3)},
        **{f"offload {stage}": Case({"stage": stage, "offload_optimizer": {"device": "cpu"}}) for stage in (1, 2)},
        "small buckets": Case({"stage": 2, "overlap_comm": True, "reduce_bucket_size": 200}, **_FULL),
        "own optimizer": Case({"stage": 2}, own=True),
        "universal": Case({"stage": 2}, optimizer=ADAMW, resume=True),
        "layers of DeepSpeed's names": Case({"stage": 2}, compat=True, clip=0.05, resume=True),
        **{f"bf16, ZeRO {stage}": Case({"stage": stage}, **_BF16) for stage in (0, 2)},
        "bf16, sums in float32": Case(
            {"stage": 1}, **{**_BF16, "config": {**_BF16["config"], "data_types": {"grad_accum_dtype": "fp32"}}}
        ),
        **{f"fp16, ZeRO {stage}": Case({"stage": stage}, **_FP16) for stage in (2, 3)},
    },
    4: {
        **{f"ZeRO {stage}, replicas": Case({"stage": stage}, ep=2, **_FULL) for stage in range(4)},
        "universal of 2 ranks": Case({"stage": 1}, ep=2, optimizer=ADAMW, config=_UNIVERSAL, load="2/universal"),
        "universal": Case({"stage": 2}, ep=2, optimizer=ADAMW, resume=True),
    },
    1: {
        "ZeRO 2": Case({"stage": 2}, **_FULL),
        "files of 2 ranks": Case({"stage": 0}, load="2/ZeRO 0, not shared"),
        "weights of 2 ranks": Case({"stage": 1}, load="2/ZeRO 2, saved", weights=True),
        "universal of 4 ranks": Case({"stage": 2}, optimizer=ADAMW, config=_UNIVERSAL, load="4/universal"),
    },
}


class Model(nn.Module):
    """Two mixtures, one of them gated, with a shared expert and a selection bias; and what every rank has."""

    def __init__(self, *, ep_group: Any = None, loss_group: Any = None, aux: str = "explicit") -> None:
        super().__init__()
        common = {"hidden_size": H, "ffn_hidden_size": F, "num_experts": E, "top_k": K, "aux_loss": aux}
        common |= {"load_balancing_coefficient": 0.05, "load_balancing_over": "global", "bias": "expert"}
        common |= {"ep_group": ep_group, "dtensor": False, "loss_group": loss_group}
        self.first = nn.Linear(H, H)
        self.moe1 = dmoe.MoE(gated=False, activation="gelu", **common)
        self.moe2 = dmoe.MoE(shared_ffn_hidden_size=F, router_bias=True, selection_bias=True, **common)
        self.last = nn.Linear(H, H)

    def forward(self, x):
        x = x + self.moe1(self.first(x))
        return self.last(x + self.moe2(x))


class CompatModel(nn.Module):
    """The same with layers of DeepSpeed's arguments and results."""

    def __init__(self, ep_size: int = 1) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(H, H), nn.Linear(H, H)
        expert = nn.Sequential(nn.Linear(H, F), nn.GELU(), nn.Linear(F, H))
        self.moe1, self.moe2 = (CompatMoE(H, expert, E, ep_size, k=1, drop_tokens=False) for _ in range(2))

    def forward(self, x):
        x = x + self.moe1(self.first(x))[0]
        return self.last(x + self.moe2(x)[0])


def build(case: Case, world: int = 1, seed: int = 7, **groups: Any) -> nn.Module:
    """The model on ``world`` ranks, alike on all of them but for its experts."""
    torch.manual_seed(seed)
    if case.compat:
        return CompatModel(case.ep or world)
    return Model(aux=case.aux, **groups)


def batch(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and targets of a micro-batch of all ranks."""
    generator = torch.Generator().manual_seed(100 + number)
    x, y = (torch.randn(TOKENS, H, generator=generator) for _ in range(2))
    return x, y


def loss_of(case: Case, model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Of a micro-batch, with the auxiliary loss where the loop adds it."""
    loss = nn.functional.mse_loss(model(x.to(case.dtype)).float(), y)
    return loss + dmoe.aux_loss(model) if case.aux == "explicit" else loss


def plain_loop(case: Case, seed: int = 7) -> dict[str, Any]:
    """Losses, norms and parameters of every step: one process, no framework, float32."""
    plain = Case(optimizer=case.optimizer, compat=case.compat)
    model = build(plain, seed=seed)
    options = {name: value for name, value in case.optimizer["params"].items() if name != "torch_adam"}
    optimizer = getattr(torch.optim, case.optimizer["type"])(model.parameters(), **options)
    losses, norms, states = [], [], [_copy(model)]
    for step in range(STEPS):
        optimizer.zero_grad()
        total = 0.0
        for micro in range(case.accumulate):
            loss = loss_of(plain, model, *batch(step * case.accumulate + micro)) / case.accumulate
            loss.backward()
            total += loss.item()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), case.clip or 1e9).item())
        if step != case.overflow:
            optimizer.step()
        dmoe.update_selection_bias(model)
        losses.append(total)
        states.append(_copy(model))
    return {"losses": losses, "norms": norms, "states": states, "model": model}


def _copy(model: nn.Module) -> dict[str, torch.Tensor]:
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor.detach().clone() for name, tensor in named.items()}
