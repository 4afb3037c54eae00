"""The expert that every token takes."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dmoe.compat.megablocks.layers import common
from dmoe.compat.megablocks.layers.arguments import Arguments


class SharedMLP(nn.Module):
    """One plain expert that every token takes.

    Args:
        args: the shared expert's options, and sizes, bias, activation. With ``nn.Linear`` its parameters have the
            dtype of the others.
    """

    def __init__(self, args: Arguments) -> None:
        super().__init__()
        self.args = args
        self.fc_kwargs: dict[str, Any] = {"bias": args.bias, "device": args.device}
        if args.fc_cls is nn.Linear:
            self.fc_kwargs["dtype"] = common.dtype(args)
        self.fc_kwargs.update(args.fc_kwargs)
        width = args.shared_expert_hidden_size
        self.up_proj = args.fc_cls(args.hidden_size, width, **self.fc_kwargs)
        self.act = args.activation_fn
        self.down_proj = args.fc_cls(width, args.hidden_size, **self.fc_kwargs)
        self.down_proj._is_residual = True  # llm-foundry's initialisation looks for it

    def forward(self, x: Tensor) -> Tensor:
        """``(..., H)`` to ``(..., H)``."""
        assert self.act is not None  # Arguments.check
        return self.down_proj(self.act(self.up_proj(x)))

    def add_experts_sharedexpert(
        self, shared_expert_out: Tensor, expert_out: Tensor | tuple[Tensor, Tensor]
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The sum of both, or ``shared / (K + 1) + expert * K / (K + 1)`` with ``shared_expert_weighted_sum``.

        Args:
            shared_expert_out: ``(..., H)``.
            expert_out: the same, or a pair of it and a bias to be added later: then so is the result, and its bias
                weighs as much as the experts.
        """
        if isinstance(expert_out, tuple):
            out, bias = expert_out
            share = self.args.moe_top_k / (self.args.moe_top_k + 1) if self.args.shared_expert_weighted_sum else 1
            combined = self.add_experts_sharedexpert(shared_expert_out, out)
            assert isinstance(combined, Tensor)
            return combined, bias if share == 1 else bias * share
        if not self.args.shared_expert_weighted_sum:
            return shared_expert_out + expert_out
        terms = self.args.moe_top_k + 1
        return (shared_expert_out / terms).add(expert_out, alpha=self.args.moe_top_k / terms)
