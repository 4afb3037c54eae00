"""``experts=`` of Megatron's own MoE layer: its router and its dispatcher stay, the experts are dmoe's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from dmoe import device_tile_rows, plan_token_choice
from dmoe.integrations.megatron import versions
from dmoe.integrations.megatron.flat_biases import names_in_states
from dmoe.integrations.megatron.loading import refuse_other_layouts
from dmoe.integrations.megatron.parameters import (
    announce_main_grads,
    build_moe,
    check_main_grads,
    mark_experts,
    refuse_optimizers_of_matrices,
)
from dmoe.integrations.megatron.refusals import refuse
from dmoe.integrations.megatron.sharded import Place, experts_sharded_state_dict, without_extra_states
from dmoe.integrations.megatron.translate import experts_config


class DmoeExperts(MegatronModule):
    """The experts of one expert-parallel rank, for tokens that Megatron has sorted by expert.

    Args:
        num_local_experts: experts of this rank.
        config: ``TransformerConfig``.
        submodules: accepted as Megatron passes it.
        pg_collection: Megatron's process groups.
        name: accepted as Megatron passes it.
        options: fields of :class:`dmoe.MoEConfig` that Megatron has no name for.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: Any,
        submodules: Any = None,
        pg_collection: Any = None,
        name: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(config=config)
        versions.release()
        self.num_local_experts, self.pg_collection = num_local_experts, pg_collection
        self.experts = build_moe(config, experts_config(config, options), pg_collection, with_router=False).experts
        refuse_other_layouts(self, "dmoe_experts", "experts.", lambda: names_in_states(self))
        self.register_load_state_dict_post_hook(_after_loading)

    def forward(
        self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor, **buffers: Any
    ) -> tuple[Tensor, None]:
        """Tokens through the expert that each stands with.

        Args:
            permuted_local_hidden_states: ``(N, H)``, expert after expert.
            tokens_per_expert: ``(num_local_experts,)`` integers that sum to N, on any device.
            permuted_probs: ``(N,)``, what each token's activation is multiplied by.
            **buffers: Megatron's buffers for results, of which none may be given.

        Returns:
            ``(N, H)`` in the same order, and None: a bias is added here.

        Raises:
            ValueError: training with an optimizer of matrices.
        """
        if buffers:
            refuse("moe_ncclep_zero_copy", True, "dmoe's experts write to memory of their own", "leave it out")
        if self.training:
            refuse_optimizers_of_matrices(self.experts)
        to_main_grads = self.experts.config.accumulate_main_grad and torch.is_grad_enabled()
        if to_main_grads:
            check_main_grads(self.experts)
        x, home = permuted_local_hidden_states, permuted_local_hidden_states.device
        counts = torch.as_tensor(tokens_per_expert)
        if counts.device != home:
            counts = counts.pin_memory().to(home, non_blocking=True) if home.type == "cuda" else counts.to(home)
        numbers = torch.arange(self.num_local_experts, device=home)
        expert = torch.repeat_interleave(numbers, counts, output_size=len(x)).unsqueeze(1)  # the host waits for nothing
        tile_rows = device_tile_rows(home, len(x), self.num_local_experts)
        plan = plan_token_choice(expert, self.num_local_experts, tile_rows=tile_rows)
        y = self.experts(x, plan, permuted_probs.reshape(-1, 1))
        if to_main_grads and y.requires_grad:
            y.register_hook(lambda grad: announce_main_grads(self.experts))
        return y, None

    def backward_dw(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is left to do: weight gradients come with the others."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """What a distributed checkpoint holds of these experts: under the names and in the layout of Megatron's own."""
        place = Place.of(self.pg_collection)
        keys = (f"{prefix}experts.", f"{prefix}experts.")
        return experts_sharded_state_dict(self.experts, *keys, sharded_offsets, place, metadata)

    def _apply(self, fn: Any, recurse: bool = True) -> DmoeExperts:
        super()._apply(fn, recurse)
        self._mark()
        return self

    def _mark(self) -> None:
        groups = self.pg_collection
        mark_experts(self.experts, self.config, groups.ep.size(), groups.expt_tp.size())


def _after_loading(experts: DmoeExperts, incompatible_keys: Any) -> None:
    without_extra_states(experts, incompatible_keys)
    experts._mark()  # dmoe's experts have set marks of their own
