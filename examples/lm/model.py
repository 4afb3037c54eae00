"""A small decoder-only transformer over bytes. Its FFNs are `dmoe.MoE`, or dense for the twin it is compared with."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dmoe
from dmoe import MoE

from .layers import VOCABULARY, DenseFFN, experts_of_a_token, mixture, moe_configs
from .ranks import ALONE, Ranks
from .settings import Settings


class Attention(nn.Module):
    """Causal self-attention with rotary positions; queries and keys are normalised, which lets the rate be high."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.out = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """``(B, S, H) -> (B, S, H)``; ``cos`` and ``sin`` are ``(S, head_dim / 2)`` float32."""
        B, S, H = x.shape
        q, k, v = self.qkv(x).view(B, S, 3, self.heads, H // self.heads).permute(2, 0, 3, 1, 4)
        q, k = (_rotate(F.rms_norm(part.float(), part.shape[-1:]), cos, sin).to(v.dtype) for part in (q, k))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(B, S, H))


class Block(nn.Module):
    """Pre-norm: each half reads a normalised stream and adds to the plain one."""

    def __init__(self, hidden: int, heads: int, ffn: nn.Module) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(hidden)
        self.attention = Attention(hidden, heads)
        self.ffn_norm = nn.RMSNorm(hidden)
        self.ffn = ffn

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, tokens: Tensor) -> Tensor:
        """``(B, S, H) -> (B, S, H)``; ``tokens`` are the ``(B, S)`` bytes, by which hash layers route."""
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.ffn(self.ffn_norm(x), token_ids=tokens)


class ByteLM(nn.Module):
    """Predicts the next byte. The one place where the mixture and its dense twin differ is what a block's FFN is."""

    cos: Tensor
    sin: Tensor

    def __init__(self, settings: Settings, *, dense: bool = False, ranks: Ranks = ALONE) -> None:
        super().__init__()
        s = settings

        ffns: list[nn.Module]
        if dense:
            ffns = [DenseFFN(s.hidden, s.dense_ffn) for _ in range(s.layers)]
        else:
            ffns = [mixture(config, s, **ranks.of_layer()) for config in moe_configs(s, **ranks.of_config(s.preset))]
        self.embedding = nn.Embedding(VOCABULARY, s.hidden)
        self.blocks = nn.ModuleList(Block(s.hidden, s.heads, ffn) for ffn in ffns)
        self.norm = nn.RMSNorm(s.hidden)
        self.head = nn.Linear(s.hidden, VOCABULARY, bias=False)
        cos, sin = _rotary_table(s.seq_len, s.hidden // s.heads)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self._initialise(s, ranks)

    def _initialise(self, settings: Settings, ranks: Ranks) -> None:
        """One rule for both twins: normal, with the variance of 1 / inputs; what ends a residual branch starts small.

        Experts hold their weights as ``nn.Linear`` does, inputs last, so the rule reads the same for them. Each rank
        draws all of them and keeps its own: the values do not depend on how many ranks there are. A preset's layers
        begin as their own system's do.
        """
        here = {id(parameter): layer for layer in self.moe_layers for parameter in layer.parameters()}
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                layer = here.get(id(parameter))
                if parameter.ndim < 2 or (layer is not None and settings.preset is not None):
                    continue
                std = parameter.shape[-1] ** -0.5
                if name.endswith(("attention.out.weight", "down_proj", "down_proj.weight")):
                    std /= math.sqrt(2 * settings.layers)
                std = 1.0 if parameter is self.embedding.weight else std
                if layer is not None and dmoe.is_expert_param(parameter):
                    experts = layer.config.num_experts
                    whole = torch.empty(experts, *parameter.shape[1:]).normal_(std=std)
                    local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
                    local.copy_(whole[ranks.experts(experts)])
                else:
                    parameter.normal_(std=std)

    def forward(self, tokens: Tensor) -> Tensor:
        """``(B, S)`` int64 bytes to ``(B, S, 256)`` logits; S is at most ``seq_len``."""
        S = tokens.shape[1]
        cos, sin = self.cos[:S], self.sin[:S]
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, cos, sin, tokens)
        return self.head(self.norm(x))

    @property
    def moe_layers(self) -> list[MoE]:
        """The mixture layers from input to output; empty in the dense twin."""
        return [module for module in self.modules() if isinstance(module, MoE)]


def count_parameters(model: ByteLM) -> dict[str, int]:
    """Numbers of parameters: all, those that one token uses, and those of the FFNs and routers among the latter.

    On all ranks together: experts that live elsewhere count. A router here is what decides over FFNs: the mean of
    mixture and dense FFN in PR-MoE, too.
    """
    total = sum(parameter.numel() for parameter in model.parameters() if not dmoe.is_expert_param(parameter))
    active, active_ffn, routers = total, 0, 0
    for name, parameter in model.named_parameters():
        if ".ffn." in name and not dmoe.is_expert_param(parameter):
            routes = "router" in name or "coefficient" in name
            routers += parameter.numel() * routes
            active_ffn += parameter.numel() * (not routes)
    for layer in model.moe_layers:
        of_one = sum(part.numel() // part.shape[0] for part in layer.parameters() if dmoe.is_expert_param(part))
        total += of_one * layer.config.num_experts
        at_work = int(of_one * experts_of_a_token(layer.config))
        active, active_ffn = active + at_work, active_ffn + at_work
    return {"total": total, "active": active, "active_ffn": active_ffn, "router": routers}


def _rotary_table(length: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``(length, head_dim / 2)`` of Su et al. 2021, eq. 34, with base 10000."""
    frequency = 10_000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    return angle.cos().float(), angle.sin().float()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)
