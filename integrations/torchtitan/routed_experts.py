"""``MoE.routed_experts`` of torchtitan on dmoe: tokens to their experts, the experts, and the weighted sum back.

::

    x, choices, scores --> [ranks of "ep"] --> experts, weighted and summed per token --> [back] --> y

torchtitan's ``RoutedExperts`` sorts one row for each choice, sends it, computes in bfloat16 whatever the dtype, sends
it back, weighs it and adds it up. Here a token travels once to each rank that holds any of its experts, rows are never
sorted in memory of their own, and experts compute in the dtype of their weights.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any, Literal

import spmd_types as spmd
import torch
from torch import Tensor
from torchtitan.models.common.moe import RoutedExperts
from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher, LocalTokenDispatcher

from dmoe import plan_token_choice, run_experts
from dmoe.functional import moe_mlp
from dmoe.integrations.torchtitan.expert_weights import Held, check_experts, held_experts
from dmoe.parallel import AllToAllDispatcher
from dmoe.parallel.wire import check_wire_dtype

_OWN = (LocalTokenDispatcher, AllToAllTokenDispatcher)  # what dmoe's exchange stands for


class DmoeRoutedExperts(RoutedExperts):
    """torchtitan's ``RoutedExperts``, with its parameters, names and sharding, computed by dmoe.

    Args:
        config: of torchtitan's, and

            - ``exchange``: who moves tokens between the ranks of the mesh "ep": ``dmoe``; or ``torchtitan``, whose
              ``token_dispatcher`` brings rows and takes them back. Under ``torch.compile``, where torchtitan wants one
              graph for each block, and with DeepEP, HybridEP or MinimalAsyncEP in the config, it is torchtitan's
              whatever this says.
            - ``wire_dtype``, ``wire_backward``: tokens (and gradients) that travel as fp8 or int8; see
              :class:`dmoe.parallel.AllToAllDispatcher`.
            - ``recompute_pre_activation``: save the experts' input only; see :class:`dmoe.MoEConfig`.

    Attributes:
        exchange: dmoe's dispatcher over the ranks of "ep"; None on one of them, or where torchtitan moves tokens.

    Raises:
        ValueError: from the config: an option that is none, experts that compute in a way of their own, or a
            ``wire_dtype`` where torchtitan moves the tokens.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(RoutedExperts.Config):
        """See the class."""

        exchange: Literal["dmoe", "torchtitan"] = "dmoe"
        wire_dtype: str | None = None
        wire_backward: bool = False
        recompute_pre_activation: bool = False

        def __post_init__(self) -> None:
            check_experts(self.inner_experts)
            check_wire_dtype(self.wire_dtype, self.wire_backward)
            if self.exchange not in ("dmoe", "torchtitan"):
                raise ValueError(f"DmoeRoutedExperts: exchange: expected dmoe or torchtitan, got {self.exchange!r}")
            if not isinstance(self.recompute_pre_activation, bool):
                raise TypeError(
                    "DmoeRoutedExperts: recompute_pre_activation: expected True or False, got "
                    f"{self.recompute_pre_activation!r}"
                )
            if self.wire_dtype is not None and not self.moves_tokens:
                raise ValueError(
                    "DmoeRoutedExperts: wire_dtype: expected None where torchtitan's "
                    f"{self.token_dispatcher._owner.__name__} moves the tokens, got {self.wire_dtype!r}"
                )

        @property
        def moves_tokens(self) -> bool:
            """Whether dmoe moves tokens between ranks, outside of ``torch.compile``."""
            return self.exchange == "dmoe" and self.token_dispatcher._owner in _OWN

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.exchange: AllToAllDispatcher | None = None
        self._moves_tokens, self._recompute = config.moves_tokens, config.recompute_pre_activation
        self._wire: dict[str, Any] = {"wire_dtype": config.wire_dtype, "wire_backward": config.wire_backward}
        self._ep, self._bias_shares = 1, 1

    def parallelize(self, parallel_dims: Any) -> None:
        """torchtitan's sharding of the parameters; and the ranks of its mesh "ep" for the exchange.

        Args:
            parallel_dims: torchtitan's ``ParallelDims``.

        Raises:
            ValueError: experts that cannot be divided evenly over the ranks of "ep".
        """
        super().parallelize(parallel_dims)
        mesh = parallel_dims.get_optional_mesh("ep")
        if mesh is None:
            self._bias_shares = parallel_dims.tp
            return
        self._ep, experts = mesh.size(), self.inner_experts.num_experts
        if experts % self._ep:
            raise ValueError(
                "DmoeRoutedExperts: expert_parallel_degree: expected a divisor of the "
                f"{experts} experts, got {self._ep}"
            )
        if self._moves_tokens:
            self.exchange = AllToAllDispatcher(mesh.get_group(), experts, **self._wire)

    def forward(
        self,
        x_BLD: Tensor,
        topk_scores_BLK: Tensor,
        topk_expert_ids_BLK: Tensor,
        num_local_tokens_per_expert_E: Tensor,
    ) -> Tensor:
        """Every token through its experts, weighted by its scores and summed.

        Args:
            x_BLD: this rank's tokens, ``(B, L, H)`` floating point.
            topk_scores_BLK: ``(B, L, K)`` float32.
            topk_expert_ids_BLK: ``(B, L, K)`` int64 in [0, E).
            num_local_tokens_per_expert_E: ``(E,)`` integer, read by torchtitan's dispatchers alone.

        Returns:
            ``(B, L, H)`` in x's dtype; where experts are cut over "tp", this rank's part of the sum.

        Raises:
            ValueError: a ``wire_dtype`` under ``torch.compile``, where tokens travel as torchtitan sends them.
        """
        with spmd.no_typecheck() if spmd.is_type_checking() else contextlib.nullcontext():
            held = held_experts(self.inner_experts, self._bias_shares)
            tokens = x_BLD.reshape(-1, x_BLD.shape[-1]).to(held.weights.dtype)
            ids, scores = topk_expert_ids_BLK.flatten(0, 1), topk_scores_BLK.flatten(0, 1)
            if self._ep == 1:
                y = moe_mlp(tokens, ids, scores, held.weights, **self._how(held))
            elif self.exchange is not None and not torch.compiler.is_compiling():
                arrived = self.exchange.dispatch(tokens, ids, scores)
                y = run_experts(arrived.x, arrived.plan, arrived.gate_weights, held.weights, **self._how(held))
                y = self.exchange.combine(y, arrived)
            else:
                y = self._by_rows(held, tokens, ids, scores, num_local_tokens_per_expert_E)
            return y.view(x_BLD.shape).to(x_BLD.dtype)

    def _how(self, held: Held) -> dict[str, Any]:
        return {"activation": held.activation, "recompute": self._recompute}

    def _by_rows(self, held: Held, tokens: Tensor, ids: Tensor, scores: Tensor, counts: Tensor) -> Tensor:
        """torchtitan moves a row for each choice, in the order of the experts here, and weighs what it brings back."""
        if self._wire["wire_dtype"] is not None:
            raise ValueError(
                "DmoeRoutedExperts: wire_dtype: expected None under torch.compile, where torchtitan moves the tokens, "
                f"got {self._wire['wire_dtype']!r}"
            )
        rows, per_expert, metadata = self.token_dispatcher.dispatch(tokens, scores, ids, counts)
        ends = per_expert.cumsum(0)
        # Room that some dispatchers leave behind the rows is beyond the last end: that takes no expert.
        places = torch.arange(rows.shape[0], device=rows.device)
        owners = torch.searchsorted(ends, places, right=True)
        plan = plan_token_choice(owners.unsqueeze(1), held.weights.num_experts)
        ones = torch.ones(rows.shape[0], 1, dtype=torch.float32, device=rows.device)
        y = run_experts(rows, plan, ones, held.weights, **self._how(held))
        return self.token_dispatcher.combine(y, metadata, tokens)
