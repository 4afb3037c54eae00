"""`dmoe.models.MoEGPT` over bytes. Its FFNs are `dmoe.MoE`, or dense for the twin it is compared with."""

from __future__ import annotations

import math

import torch

import dmoe
from dmoe.models import DenseFFN, MoEGPT, MoEGPTConfig

from .layers import VOCABULARY, experts_of_a_token, moe_configs
from .ranks import ALONE, Ranks
from .settings import Settings

__all__ = ["ByteLM", "DenseFFN", "count_parameters", "gpt_config"]


class ByteLM(MoEGPT):
    """Predicts the next byte. The one place where the mixture and its dense twin differ is what a block's FFN is."""

    def __init__(self, settings: Settings, *, dense: bool = False, ranks: Ranks = ALONE) -> None:
        super().__init__(gpt_config(settings, dense=dense, ranks=ranks), **ranks.of_layer())
        self._initialise(settings, ranks)

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
                std *= settings.router_init if layer is not None and "router" in name else 1.0
                if layer is not None and dmoe.is_expert_param(parameter):
                    experts = layer.config.num_experts
                    whole = torch.empty(experts, *parameter.shape[1:]).normal_(std=std)
                    local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
                    local.copy_(whole[ranks.experts(experts)])
                else:
                    parameter.normal_(std=std)


def gpt_config(settings: Settings, *, dense: bool = False, ranks: Ranks = ALONE) -> MoEGPTConfig:
    """The model of a run: rotary positions and RMSNorm, queries and keys normalised, which lets the rate be high.

    Raises:
        UsageError: there is no such preset, or these sizes are none that it can have.
    """
    s = settings
    moe = {} if dense else dict(enumerate(moe_configs(s, **ranks.of_config(s.preset))))
    return MoEGPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=s.hidden,
        num_layers=s.layers,
        num_heads=s.heads,
        ffn_hidden_size=s.dense_ffn,
        max_positions=s.seq_len,
        norm="rms",
        norm_eps=None,
        positions="rotary",
        qk_norm=True,
        bias=False,
        tied_head=False,
        activation="silu",
        gated=True,
        moe=moe,
        residual=dict.fromkeys(moe, s.ffn) if s.residual else {},
    )


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
