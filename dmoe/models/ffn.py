"""What stands in a block's FFN: a dense one, a mixture of experts, or both side by side."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dmoe.config import MoEConfig
from dmoe.known_activations import ACTIVATIONS
from dmoe.layer import MoE
from dmoe.models.config import MoEGPTConfig
from dmoe.residual import ResidualMoE


class DenseFFN(nn.Module):
    """``down(act(up(x)))``, or gated ``down(act(gate(x)) * up(x))``: what one expert computes.

    Args:
        hidden_size: H.
        ffn_hidden_size: F.
        gated, activation, bias: as :class:`dmoe.models.MoEGPTConfig` has them.
        device, dtype: of the parameters, ``up_proj.weight (F, H)``, gated ``gate_up_proj.weight (2 F, H)``, the gate
            first, and ``down_proj.weight (H, F)``.
    """

    def __init__(
        self,
        hidden_size: int,
        ffn_hidden_size: int,
        *,
        gated: bool = False,
        activation: str = "gelu_tanh",
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        where: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        self.up_name = "gate_up_proj" if gated else "up_proj"
        self.add_module(self.up_name, nn.Linear(hidden_size, (1 + gated) * ffn_hidden_size, **where))
        self.down_proj = nn.Linear(ffn_hidden_size, hidden_size, **where)
        self.gated, self.activation = gated, activation

    def forward(self, x: Tensor, *, token_mask: Tensor | None = None, token_ids: Tensor | None = None) -> Tensor:
        """``(..., H)`` to the same. Masks and ids are for routers; here they change nothing."""
        act = next(function for name, function in ACTIVATIONS.items() if name == self.activation)
        up = self.get_submodule(self.up_name)(x)
        if self.gated:
            gate, up = up.chunk(2, dim=-1)
            return self.down_proj(act(gate) * up)
        return self.down_proj(act(up))


def build_ffn(config: MoEGPTConfig, layer: int, device: Any = None, dtype: Any = None, **of_moe: Any) -> nn.Module:
    """The FFN of one block, which takes ``(x, token_mask=..., token_ids=...)``.

    Args:
        config: of the model.
        layer: number of the block.
        device, dtype: of the parameters.
        of_moe: what :class:`dmoe.MoE` takes besides its config, as ``ep_group``.
    """
    where: dict[str, Any] = {"device": device, "dtype": dtype}

    def dense(width: int) -> DenseFFN:
        options: dict[str, Any] = {"gated": config.gated, "activation": config.activation, "bias": config.bias}
        return DenseFFN(config.hidden_size, width, **options, **where)

    if layer not in config.moe:
        return dense(config.ffn_hidden_size)
    moe = MoE(config.moe[layer], **of_moe, **where)
    return ResidualMoE(moe, dense(config.residual[layer]), **where) if layer in config.residual else moe


def depends_on_others(config: MoEConfig | None) -> bool:
    """Whether a token's output, in evaluation, may depend on which other tokens the layer sees beside it."""
    return config is not None and (not config.dropless or config.family.experts_choose or config.family.looks_ahead)


def of_each_sequence(ffn: nn.Module, x: Tensor, token_mask: Tensor, token_ids: Tensor) -> Tensor:
    """The FFN of each sequence's unmasked tokens alone, as if no other and no padding were there; else zeros.

    For layers whose experts have a capacity or choose their tokens: how many tokens they are given, masked ones
    included, is what decides there.

    Args:
        ffn: of :func:`build_ffn`.
        x: ``(B, S, H)``.
        token_mask: ``(B, S)`` bool.
        token_ids: ``(B, S)`` integers.

    Returns:
        ``(B, S, H)``.
    """
    rows = []
    for each, counts, ids in zip(x, token_mask, token_ids, strict=True):
        row = torch.zeros_like(each)
        if bool(counts.any()):
            row[counts] = ffn(each[counts].unsqueeze(0), token_ids=ids[counts].unsqueeze(0))[0].to(row.dtype)
        rows.append(row)
    return torch.stack(rows)
