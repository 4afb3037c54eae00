"""PR-MoE's residual layer: a dense block beside a mixture of experts, and how much of each a token takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dmoe.config import MoEConfig


class ResidualMoE(nn.Module):
    """``y = c_0 * moe(x) + c_1 * mlp(x)`` with ``c = softmax(coefficient(x))`` (PR-MoE: Rajbhandari et al. 2022).

    Every token takes the dense block, and the experts correct it: of two experts' work one needs no communication. The
    layers behind :func:`dmoe.replace_ffn` with ``residual=True``, and DeepSpeed's ``MoE(use_residual=True)``.

    Args:
        moe: a :class:`dmoe.MoE`, with any router and any groups; :func:`dmoe.aux_loss`, metrics and checkpoints find it
            inside. Or another module of ``(..., H)`` to the same shape.
        mlp: the dense block, ``(..., H)`` to the same shape.
        hidden_size: H; None is the MoE's.
        device, dtype: of the coefficient; None are those of the MoE's parameters.

    Attributes:
        coefficient: ``nn.Linear(H, 2)``.

    Raises:
        ValueError: a MoE that returns its bias beside its output, or no hidden size.
    """

    def __init__(
        self,
        moe: nn.Module,
        mlp: nn.Module,
        hidden_size: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        config = getattr(moe, "config", None)
        if isinstance(config, MoEConfig):
            if config.return_bias:
                raise ValueError(
                    "ResidualMoE: moe: expected return_bias=False, got True: a bias that is added later would not be "
                    "weighted; with bias='output' alone the layer adds it"
                )
            hidden_size = config.hidden_size if hidden_size is None else hidden_size
        if hidden_size is None:
            raise ValueError(f"ResidualMoE: hidden_size: expected an integer with {type(moe).__name__}, got None")
        like = next(moe.parameters(), torch.empty(0, device=device))
        self.moe, self.mlp = moe, mlp
        self.coefficient = nn.Linear(
            hidden_size,
            2,
            device=like.device if device is None else device,
            dtype=like.dtype if dtype is None else dtype,
        )

    def forward(
        self,
        x: Tensor,
        *,
        token_mask: Tensor | None = None,
        token_ids: Tensor | None = None,
        expert_indices: Tensor | None = None,
    ) -> Tensor:
        """Both blocks, weighted.

        Args:
            x: ``(..., H)`` floating point.
            token_mask, token_ids, expert_indices: as :meth:`dmoe.MoE.forward` takes them. The dense block, too, reads
                masked tokens as zeros.

        Returns:
            ``(..., H)`` in x's dtype (autocast's under autocast).

        Raises:
            ValueError: a block returned a bias beside its output; and what the MoE raises.
        """
        about: dict[str, Any] = {"token_mask": token_mask, "token_ids": token_ids, "expert_indices": expert_indices}
        y = _output_of("moe", self.moe(x, **{name: value for name, value in about.items() if value is not None}))
        if token_mask is not None:  # behind the MoE, which has checked it
            x = x.masked_fill(~token_mask.unsqueeze(-1), 0)
        return weighted_sum(y, _output_of("mlp", self.mlp(x)), self.coefficient(x))


def weighted_sum(y: Tensor, dense: Tensor, logits: Tensor) -> Tensor:
    """``c_0 * y + c_1 * dense`` with ``c = softmax(logits)``, in y's dtype.

    Args:
        y, dense: ``(..., H)``.
        logits: ``(..., 2)``; their softmax is computed in float32 (float64 for float64).
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    coefficients = torch.softmax(logits.to(wide), -1).to(y.dtype)
    return y * coefficients[..., :1] + dense * coefficients[..., 1:]


def _output_of(name: str, returned: Any) -> Tensor:
    """What a block returned, without the None of a bias that it has not."""
    if isinstance(returned, tuple) and len(returned) == 2:
        returned, bias = returned
        if bias is not None:
            raise ValueError(
                f"ResidualMoE: {name}: expected the output, or a pair of it and None, got a pair with a bias, which "
                "would not be weighted"
            )
    if not isinstance(returned, Tensor):
        raise ValueError(f"ResidualMoE: {name}: expected to return a tensor, got {type(returned).__name__}")
    return returned
