"""``mlp=`` of a transformer layer: :class:`dmoe.MoE` with everything that Megatron expects of a MoE layer.

Not a subclass of Megatron's ``MoELayer``: where Megatron asks for that class it goes on to use its dispatcher, its
streams or its CUDA-graph tensors, which are not here. The options that would do so are refused (``refusals.py``).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe import moe_utils
from torch import Tensor

from dmoe import Routing
from dmoe.integrations.megatron import versions
from dmoe.integrations.megatron.flat_biases import names_in_states
from dmoe.integrations.megatron.loading import refuse_other_layouts
from dmoe.integrations.megatron.losses import RouterLosses
from dmoe.integrations.megatron.parameters import (
    announce_main_grads,
    build_moe,
    check_main_grads,
    mark_experts,
    mark_output_bias,
    mark_router,
    refuse_optimizers_of_matrices,
)
from dmoe.integrations.megatron.quantile import QuantileBias
from dmoe.integrations.megatron.refusals import refuse
from dmoe.integrations.megatron.sharded import layer_sharded_state_dict, without_extra_states
from dmoe.integrations.megatron.translate import moe_config


class DmoeLayer(MegatronModule):
    """A MoE layer of dmoe under Megatron's process groups, optimizer, losses and checkpoints.

    Args:
        config: ``TransformerConfig``; what dmoe does not carry is refused.
        submodules: ``MoESubmodules`` of Megatron's own layer, of which ``shared_experts`` is used: Megatron's shared
            expert serves as it is, cut over tensor-parallel ranks, and computes while tokens travel.
        layer_number: from 1, over all pipeline stages; :meth:`set_layer_number` gives it later.
        pg_collection: Megatron's process groups; None takes those of ``parallel_state``.
        is_mtp_layer: whether the layer predicts further tokens.
        name: accepted as Megatron passes it.
        options: fields of :class:`dmoe.MoEConfig` that Megatron has no name for.

    Attributes:
        moe: the :class:`dmoe.MoE`.
        shared_experts: Megatron's ``SharedExpertMLP``, or None.
    """

    def __init__(
        self,
        config: Any,
        submodules: Any = None,
        layer_number: int | None = None,
        pg_collection: Any = None,
        is_mtp_layer: bool = False,
        name: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(config=config)
        versions.release()
        self.pg_collection = groups = moe_utils.get_default_pg_collection() if pg_collection is None else pg_collection
        self.losses = RouterLosses(config, groups, is_mtp_layer=is_mtp_layer)
        shared = config.moe_shared_expert_intermediate_size is not None
        self.moe = build_moe(
            config,
            moe_config(config, options),
            groups,
            shared_expert=self._shared_experts if shared else None,
            attach_losses=self._attach_losses,
        )
        quantile = config.moe_router_load_balancing_type == "quantile_balancing"
        self.quantile = QuantileBias(self.moe.router) if quantile else None
        self.shared_experts = _shared_experts(config, submodules, groups) if shared else None
        self._recomputed = config.recompute_modules if config.recompute_granularity == "selective" else ()
        refuse_other_layouts(self, "dmoe", "", lambda: [f"moe.{name}" for name in names_in_states(self.moe)])
        self.register_load_state_dict_post_hook(_after_loading)
        self.layer_number: int | None = None
        if layer_number is not None:
            self.set_layer_number(layer_number)

    def set_layer_number(self, layer_number: int) -> None:
        """Under which number, from 1, the losses are logged."""
        self.layer_number = self.losses.layer_number = layer_number

    def forward(
        self,
        hidden_states: Tensor,
        intermediate_tensors: Any = None,
        padding_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """Every token through its experts.

        Args:
            hidden_states: ``(S, B, H)``; with sequence or context parallelism this rank's part of the sequences.
            intermediate_tensors: None; Megatron's own layer goes on from these after a CUDA graph.
            padding_mask: bool ``(B, S)``, True for padding, which takes no expert and counts in no loss and no load.

        Returns:
            ``(S, B, H)``, and None: a bias is added here.

        Raises:
            ValueError: training with tensor but without sequence parallelism, or with an optimizer of matrices.
        """
        if intermediate_tensors is not None:
            raise ValueError("DmoeLayer: intermediate_tensors: expected None: CUDA graphs do not cut this layer apart")
        if self.training and self.pg_collection.tp.size() > 1 and not self.config.sequence_parallel:
            ranks = self.pg_collection.tp.size()
            refuse(
                "tensor_model_parallel_size",
                ranks,
                "without sequence parallelism every tensor-parallel rank would train on the same tokens",
                "add --sequence-parallel",
            )
        if self.training:
            refuse_optimizers_of_matrices(self.moe.experts)
        to_main_grads = self.moe.config.accumulate_main_grad and torch.is_grad_enabled()
        if to_main_grads:
            check_main_grads(self.moe.experts)
        mask = None if padding_mask is None else ~padding_mask.transpose(0, 1).bool()
        if self.training and "moe" in (self._recomputed or ()):
            y = tensor_parallel.checkpoint(self._forward, False, hidden_states, mask)
        else:
            y = self._forward(hidden_states, mask)
        if to_main_grads and y.requires_grad:
            y.register_hook(self._announce_main_grads)
        return y, None

    def _forward(self, hidden_states: Tensor, token_mask: Tensor | None) -> Tensor:
        indices = self._balanced(hidden_states) if self.config.moe_router_force_load_balancing else None
        y = self.moe(hidden_states, token_mask=token_mask, expert_indices=indices)
        assert isinstance(y, Tensor)
        return y

    def _balanced(self, hidden_states: Tensor) -> Tensor:
        """Round robin, ``(S, B, K)``: what a benchmark under forced balance routes by."""
        positions, top_k = hidden_states.shape[:-1], self.config.moe_router_topk
        flat = torch.arange(positions.numel() * top_k, device=hidden_states.device) % self.config.num_moe_experts
        return flat.view(*positions, top_k)

    def _attach_losses(self, y: Tensor, routing: Routing) -> Tensor:
        load = self.local_tokens_per_expert
        if load is not None and not self.moe.config.dropless and torch.is_grad_enabled():
            with torch.no_grad():  # Megatron moves the bias by what experts kept; dmoe's router counts what they got
                load += routing.plan.kept_per_expert - routing.plan.tokens_per_expert
        return self.losses.attach(y, routing)

    def _shared_experts(self, tokens: Tensor) -> Tensor:
        assert self.shared_experts is not None
        if self.training and "shared_experts" in (self._recomputed or ()):
            return tensor_parallel.checkpoint(self.shared_experts, False, tokens)
        return self.shared_experts(tokens)

    def _announce_main_grads(self, grad: Tensor) -> None:
        announce_main_grads(self.moe.experts)

    @property
    def expert_bias(self) -> Tensor | None:
        """``(E,)`` float32, added to the scores for the choice alone; Megatron moves it after each global batch."""
        return self.moe.router.selection_bias if self.quantile is None else None

    @property
    def local_tokens_per_expert(self) -> Tensor | None:
        """``(E,)`` float32: this rank's assignments since Megatron last moved the bias."""
        return self.moe.router.load_since_update if self.quantile is None else None

    @property
    def qb_beta(self) -> Tensor | None:
        """``(E,)`` float32, what Megatron moves after each global batch under ``quantile_balancing``: minus its own."""
        return None if self.quantile is None else self.quantile.bias

    @property
    def qb_beta_accum(self) -> Tensor | None:
        """``(E,)`` float32: the biases that micro-batches since then would have been balanced under, added up."""
        return None if self.quantile is None else self.quantile.counted[:-1]

    @property
    def qb_beta_count(self) -> Tensor | None:
        """Scalar float32: how many micro-batches these were."""
        return None if self.quantile is None else self.quantile.counted[-1]

    def reset_global_aux_loss_tracker(self) -> None:
        """Forget the loads of the last global batch; Megatron calls this after each."""
        self.losses.reset_global()

    def backward_dw(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is left to do: weight gradients come with the others."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """What a distributed checkpoint holds of this layer: under the names, and in the layout, of Megatron's own."""
        return layer_sharded_state_dict(self, prefix, sharded_offsets, metadata)

    def _mark(self) -> None:
        groups = self.pg_collection
        mark_router(self.moe.router, self.config)
        mark_output_bias(self.moe, self.config)
        mark_experts(self.moe.experts, self.config, groups.ep.size(), groups.expt_tp.size())

    def _apply(self, fn: Any, recurse: bool = True) -> DmoeLayer:
        super()._apply(fn, recurse)
        self._mark()  # dmoe's experts set marks of their own then
        return self


def _after_loading(layer: DmoeLayer, incompatible_keys: Any) -> None:
    without_extra_states(layer, incompatible_keys)
    layer._mark()  # dmoe's experts have set marks of their own


def _shared_experts(config: Any, submodules: Any, pg_collection: Any) -> Any:
    spec = getattr(submodules, "shared_experts", None)
    if spec is None:
        refuse(
            "moe_shared_expert_intermediate_size",
            config.moe_shared_expert_intermediate_size,
            "the spec of this layer names no shared expert",
            "build the spec with dmoe_block_spec or dmoe_layer_spec",
        )
    if config.moe_shared_expert_overlap:  # dmoe overlaps it by itself; Megatron's way needs Megatron's dispatcher
        config = copy.copy(config)
        config.moe_shared_expert_overlap = False
    return versions.build_shared_expert(spec, config, pg_collection)
