"""The router's losses with Megatron's meaning: over Megatron's groups, scaled and logged as its own router does."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dmoe import Routing
from dmoe.integrations.megatron import versions
from dmoe.integrations.megatron.translate import coefficients

NAMES = {
    "aux_loss": "load_balancing_loss",
    "seq_aux_loss": "seq_load_balancing_loss",
    "global_aux_loss": "global_load_balancing_loss",
}


class RouterLosses:
    """Computes the losses of one layer and hangs them on its output.

    Every loss is ``c * E / (K * n^2) * sum_e(P_e * N_e)``: ``P_e`` sums this rank's probabilities, ``N_e`` counts the
    tokens of a group of ranks that would choose expert e by these probabilities alone, and n is the group's tokens.

    Args:
        config: Megatron's ``TransformerConfig``.
        pg_collection: Megatron's groups: ``tp_cp``, and ``tp_dp_cp`` for the global loss.
        is_mtp_layer: whether the layer predicts further tokens.

    Attributes:
        layer_number: from 1, over all pipeline stages; None logs nothing.
    """

    def __init__(self, config: Any, pg_collection: Any, *, is_mtp_layer: bool = False) -> None:
        self.config, self.is_mtp_layer = config, is_mtp_layer
        self.tp_cp, self.tp_dp_cp = pg_collection.tp_cp, getattr(pg_collection, "tp_dp_cp", None)
        self.coefficients = coefficients(config)
        self.layer_number: int | None = None
        self._global_counts: Tensor | None = None
        self._global_steps = 0

    def __deepcopy__(self, memo: Any) -> RouterLosses:
        copy = RouterLosses.__new__(RouterLosses)
        copy.__dict__.update(self.__dict__, _global_counts=None, _global_steps=0)
        return copy

    def reset_global(self) -> None:
        """Forget the counts of the last global batch."""
        self._global_counts, self._global_steps = None, 0

    def attach(self, y: Tensor, routing: Routing) -> Tensor:
        """``y``, whose backward also sends the losses' gradients; nothing happens without gradients.

        Args:
            y: the output, ``(S, B, H)``.
            routing: of the ``S * B`` tokens, sequence position by sequence position.
        """
        if not torch.is_grad_enabled():  # Megatron's activation checkpoints run this again with gradients
            return y
        if routing.log_z is not None:
            y = self._z_loss(y, routing.log_z, routing.token_mask)
        if self.coefficients and routing.router_probs is not None:
            probs, chosen = self._probabilities(routing)
            num_sequences = y.shape[1] if y.dim() > 2 else 1
            for kind, coefficient in self.coefficients.items():
                y = self._balance(y, kind, coefficient, probs, chosen, num_sequences, routing.token_mask is not None)
        return y

    def _probabilities(self, routing: Routing) -> tuple[Tensor, Tensor]:
        """Probabilities ``(T, E)``, and 1 where one is among a token's K largest; 0 for tokens that do not count."""
        probs, mask = routing.router_probs, routing.token_mask
        indices = routing.expert_indices if routing.counted_choices is None else routing.counted_choices
        assert probs is not None
        assert indices is not None
        if mask is not None:
            probs = probs.masked_fill(~mask.unsqueeze(1), 0)
        chosen = probs.new_zeros(probs.shape[0], probs.shape[1] + 1, dtype=torch.float32)
        return probs, chosen.scatter_(1, indices.long(), 1.0)[:, :-1]

    def _balance(
        self, y: Tensor, kind: str, coefficient: float, probs: Tensor, chosen: Tensor, num_sequences: int, masked: bool
    ) -> Tensor:
        config, top_k, num_experts = self.config, self.config.moe_router_topk, probs.shape[1]
        group: Any = self.tp_dp_cp if kind == "global_aux_loss" else self.tp_cp
        sequences = num_sequences if kind == "seq_aux_loss" else 1
        if sequences > 1:  # position by position: a sequence's experts stand side by side
            probs, chosen = (each.reshape(-1, sequences * num_experts) for each in (probs, chosen))
        local = chosen.sum(0)
        counts = local.clone()
        if group.size() > 1:
            dist.all_reduce(counts, group=group)
        if masked:
            here, everywhere = local.sum() / (top_k * sequences), counts.sum() / (top_k * sequences)
            everywhere = torch.where(everywhere > 0, everywhere, 1)
        else:
            here = len(probs)
            everywhere = here * group.size()
        if kind == "global_aux_loss":
            counts = self._mean_over_micro_batches(counts)
        total = (probs.sum(0) * counts).sum()
        loss = total * (num_experts * coefficient / (top_k * sequences)) / (everywhere * everywhere)
        loss = loss * versions.mtp_share(config, self.is_mtp_layer)
        self._log(NAMES[kind], loss / coefficient, summed_over=group, holds_data_ranks=kind == "global_aux_loss")
        tokens = here * sequences
        if kind == "seq_aux_loss":
            tokens = versions.tokens_of_sequences(tokens, sequences)
        return self._attached(y, loss, tokens)

    def _mean_over_micro_batches(self, counts: Tensor) -> Tensor:
        before = self._global_counts
        self._global_counts = counts if before is None else before + counts
        self._global_steps += 1
        return self._global_counts / self._global_steps

    def _z_loss(self, y: Tensor, log_z: Tensor, mask: Tensor | None) -> Tensor:
        coefficient = self.config.moe_z_loss_coeff / self.tp_cp.size()
        squares = log_z.float().square()
        if mask is None:
            tokens: Any = len(log_z)
            loss = squares.mean() * coefficient
        else:
            tokens = mask.sum()
            loss = squares.masked_fill(~mask, 0).sum() / tokens.clamp(min=1) * coefficient
        logged = loss * versions.mtp_share(self.config, self.is_mtp_layer) / coefficient
        self._log("z_loss", logged, averaged_over=self.tp_dp_cp)
        return self._attached(y, loss, tokens)

    def _attached(self, y: Tensor, loss: Tensor, tokens: Any) -> Tensor:
        from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

        if self.config.calculate_per_token_loss:  # all gradients are divided by the global batch's tokens
            loss = loss * versions.tokens_in_loss(tokens, self.tp_cp.size())
        return MoEAuxLossAutoScaler.apply(y, loss)

    def _log(self, name: str, loss: Tensor, **groups: Any) -> None:
        config = self.config
        num_layers = config.num_layers + (config.mtp_num_layers or 0)
        number = versions.layer_in_logs(self.layer_number, config.num_layers, self.is_mtp_layer)
        versions.log_loss(name, loss, number, num_layers, **groups)
