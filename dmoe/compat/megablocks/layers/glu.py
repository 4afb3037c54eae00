"""Gated experts: ``act(x @ w1) * (x @ v1)`` before ``w2``."""

from __future__ import annotations

from torch import Tensor, nn

from dmoe.compat._not_offered import attributes_of
from dmoe.compat.megablocks.layers.arguments import Arguments
from dmoe.compat.megablocks.layers.mlp import GroupedMLP, SharedMLP, SparseMLP
from dmoe.compat.megablocks.layers.overrides import steps

__getattr__ = attributes_of(__name__)


class SparseGLU(SparseMLP):
    """Gated experts of :class:`~dmoe.compat.megablocks.dMoE`: w1, w2 and v1 are ``(E * F, H)``."""

    names: tuple[str, ...] = ("w1", "w2", "v1")
    v1: nn.Parameter


@steps("forward")
class GroupedGLU(SparseGLU):
    """:class:`SparseGLU` on rows without padding."""

    forward = GroupedMLP.forward  # type: ignore[assignment]  # GroupedMLP's own departure from SparseMLP


class SharedGLU(SharedMLP):
    """One gated expert that every token takes.

    Args:
        args: as for :class:`SharedMLP`.
    """

    def __init__(self, args: Arguments) -> None:
        super().__init__(args)
        self.gate_proj = args.fc_cls(args.hidden_size, args.shared_expert_hidden_size, **self.fc_kwargs)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., H)`` to ``(..., H)``."""
        assert self.act is not None  # Arguments.check
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))
