"""The branch's gates as a router of dmoe's: what its flags are in dmoe's words, and what it logs.

One linear without bias, g = softmax(logits). The first expert is the best; the second follows the policy. A capacity
counts first choices before second ones, tokens in order (or by their gate, batch-prioritised). Lepikhin et al. 2021
(GShard), as fairseq's ``moe`` branch has it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import dmoe
from dmoe.integrations.fairseq_moe.flags import MoEFlags
from dmoe.integrations.fairseq_moe.statistics import gate_statistics


def gate_fields(flags: MoEFlags) -> dict[str, Any]:
    """Fields of :class:`dmoe.MoEConfig` for what the flags say about the gate.

    Padding takes no expert, and counts in the mean probabilities and in the number of tokens, as on the branch.
    """
    two = not flags.moe_top1_expert
    fraction = flags.moe_eval_capacity_token_fraction or 0.0
    by_gate = bool(flags.moe_batch_prioritized_routing) and two
    return {
        "top_k": 2 if two else 1,
        "router": dmoe.routing.TopK(
            second_expert=flags.moe_second_expert_policy if two else "all",
            noise_in_eval=flags.moe_random_second_expert_in_eval,
            masked_tokens="unrouted",
        ),
        "router_dtype": "input",
        "gate_normalization": 1.0 if two else None,
        "normalize_when": "before_drop" if flags.moe_normalize_gate_prob_before_dropping else "after_drop",
        "capacity_factor": None if flags.moe_dropless else 1.0,
        "eval_capacity_fraction": fraction if fraction > 0 and not flags.moe_dropless else None,
        "capacity_formula": "ceil_per_choice",
        "drop_order": "batch_prioritized" if by_gate else "choice_major",
        "losses": {"load_balancing": 1.0},  # the criterion has the weight
        "load_balancing_choices": "first",
    }


class Gate(dmoe.routing.TopKRouter):
    """The router of these fields, which keeps its last routing for the layer, and what the branch logs of it.

    Args:
        config: of the layer.
        flags: what ``--moe-*`` said.
        device, dtype: of the linear.

    Attributes:
        routing: of the last forward, until the layer takes it.
        statistics: of the last forward, see :mod:`dmoe.integrations.fairseq_moe.statistics`.
    """

    def __init__(
        self,
        config: dmoe.MoEConfig,
        flags: MoEFlags,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(config, device=device, dtype=dtype)
        self.softmax_in_float32 = flags.moe_gating_use_fp32
        self.routing: dmoe.Routing | None = None
        self.statistics: Tensor | None = None

    def logits(self, x: Tensor) -> Tensor:
        """Router logits ``(T, E)``; the matmul stays in the model's dtype."""
        logits = super().logits(x)
        return logits.float() if self.softmax_in_float32 else logits

    def forward(self, x: Tensor, **about: Any) -> dmoe.Routing:
        """Route ``(T, H)``; see :class:`dmoe.routing.Router`."""
        self.routing = routing = super().forward(x, **about)
        assert routing.expert_indices is not None
        self.statistics = gate_statistics(
            routing.expert_indices if routing.chosen_indices is None else routing.chosen_indices,
            routing.expert_indices,
            routing.plan.token_to_rows,
            self.config.num_experts,
        )
        return routing
