"""A small decoder-only transformer over bytes. Its FFNs are `dmoe.MoE`, or dense for the twin it is compared with."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dmoe
from dmoe import MoE

from .ranks import ALONE, Ranks
from .settings import Settings

VOCABULARY = 256  # every byte is a token


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


class DenseFFN(nn.Module):
    """Gated SiLU: what one expert computes, ``top_k`` times as wide."""

    def __init__(self, hidden: int, ffn: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(hidden, 2 * ffn, bias=False)
        self.down_proj = nn.Linear(ffn, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, S, H) -> (B, S, H)``."""
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    """Pre-norm: each half reads a normalised stream and adds to the plain one."""

    def __init__(self, hidden: int, heads: int, ffn: nn.Module) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(hidden)
        self.attention = Attention(hidden, heads)
        self.ffn_norm = nn.RMSNorm(hidden)
        self.ffn = ffn

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """``(B, S, H) -> (B, S, H)``."""
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.ffn(self.ffn_norm(x))


class ByteLM(nn.Module):
    """Predicts the next byte. The one place where the mixture and its dense twin differ is what a block's FFN is."""

    cos: Tensor
    sin: Tensor

    def __init__(self, settings: Settings, *, dense: bool = False, ranks: Ranks = ALONE) -> None:
        super().__init__()
        s = settings

        def ffn() -> nn.Module:
            if dense:
                return DenseFFN(s.hidden, s.dense_ffn)
            return MoE(
                hidden_size=s.hidden,
                ffn_hidden_size=s.ffn,
                num_experts=s.experts,
                top_k=s.top_k,
                gate_normalization=1.0,  # a token's gate weights sum to 1: the output is as large as one FFN's
                num_moe_layers=s.layers,
                load_balancing_coefficient=s.balance,
                **ranks.moe_options(),
            )

        self.embedding = nn.Embedding(VOCABULARY, s.hidden)
        self.blocks = nn.ModuleList(Block(s.hidden, s.heads, ffn()) for _ in range(s.layers))
        self.norm = nn.RMSNorm(s.hidden)
        self.head = nn.Linear(s.hidden, VOCABULARY, bias=False)
        cos, sin = _rotary_table(s.seq_len, s.hidden // s.heads)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self._initialise(s, ranks)

    def _initialise(self, settings: Settings, ranks: Ranks) -> None:
        """One rule for both twins: normal, with the variance of 1 / inputs; what ends a residual branch starts small.

        Experts hold their weights as ``nn.Linear`` does, inputs last, so the rule reads the same for them. Each rank
        draws all of them and keeps its own: the values do not depend on how many ranks there are.
        """
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.ndim < 2:
                    continue
                std = parameter.shape[-1] ** -0.5
                if name.endswith(("attention.out.weight", "down_proj", "down_proj.weight")):
                    std /= math.sqrt(2 * settings.layers)
                std = 1.0 if parameter is self.embedding.weight else std
                if dmoe.is_expert_param(parameter):
                    whole = torch.empty(settings.experts, *parameter.shape[1:]).normal_(std=std)
                    here = parameter.to_local() if hasattr(parameter, "to_local") else parameter
                    here.copy_(whole[ranks.experts(settings)])
                else:
                    parameter.normal_(std=std)

    def forward(self, tokens: Tensor) -> Tensor:
        """``(B, S)`` int64 bytes to ``(B, S, 256)`` logits; S is at most ``seq_len``."""
        S = tokens.shape[1]
        cos, sin = self.cos[:S], self.sin[:S]
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.head(self.norm(x))

    @property
    def moe_layers(self) -> list[MoE]:
        """The mixture layers from input to output; empty in the dense twin."""
        return [module for module in self.modules() if isinstance(module, MoE)]


def count_parameters(model: ByteLM, settings: Settings) -> dict[str, int]:
    """Numbers of parameters: all, those that one token uses, and those of the FFNs and routers among the latter.

    On all ranks together: experts that live elsewhere count.
    """

    def size(parameter: Tensor) -> int:
        here = parameter.shape[0] if dmoe.is_expert_param(parameter) else 1
        return parameter.numel() // here * (settings.experts if dmoe.is_expert_param(parameter) else 1)

    total = sum(map(size, model.parameters()))
    routers = experts = ffn = 0
    for module in model.modules():
        if isinstance(module, MoE):
            weights = {name: size(parameter) for name, parameter in module.named_parameters()}
            router = sum(number for name, number in weights.items() if name.startswith("router"))
            routers += router
            experts += sum(weights.values()) - router
        elif isinstance(module, DenseFFN):
            ffn += sum(parameter.numel() for parameter in module.parameters())
    active_experts = experts * settings.top_k // settings.experts
    return {
        "total": total,
        "active": total - experts + active_experts,
        "active_ffn": ffn + active_experts,
        "router": routers,
    }


def _rotary_table(length: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``(length, head_dim / 2)`` of Su et al. 2021, eq. 34, with base 10000."""
    frequency = 10_000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    return angle.cos().float(), angle.sin().float()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)
