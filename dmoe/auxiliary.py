"""The auxiliary losses of one layer: computed from its routing, then kept for the caller or hung on the output."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dmoe.config import MoEConfig
from dmoe.losses import (
    BALANCE_LOSSES,
    NOISE_LOSSES,
    attach_loss,
    load_balancing_loss,
    router_z_loss,
    sequence_load_balancing_loss,
)
from dmoe.ops.histogram import histogram
from dmoe.outputs import as_output
from dmoe.parallel.statistics import LoadOfRanks
from dmoe.routing import Routing

_UNREAD = (
    "dmoe: a MoE layer ran a second training forward before the auxiliary loss of the first was read, and that loss is "
    "lost. Add dmoe.aux_loss(model) to the task's loss, set aux_loss='attached', or set the coefficients to 0."
)


class AuxiliaryLosses:
    """Computes a layer's losses, and hands them over. A copy, or a file, is without the loss that waits here.

    Args:
        config: coefficients, what is to be balanced, and how losses are handed over.
        ranks: whose tokens are one batch for ``load_balancing_over="global"``; None is this rank alone.
        attach: what a framework does with each training forward's routing instead; see :class:`dmoe.MoE`.
    """

    def __init__(
        self,
        config: MoEConfig,
        ranks: LoadOfRanks | None = None,
        attach: Callable[[Tensor, Routing], Tensor] | None = None,
    ) -> None:
        self.config, self.ranks, self.attach = config, ranks, attach
        self._kept: Tensor | None = None
        self._warned_unread = False

    def __getstate__(self) -> dict[str, Any]:
        """Without the last forward's loss, which would carry its graph along."""
        return {**self.__dict__, "_kept": None}

    def hand_over(
        self,
        y: Tensor,
        shape: Sequence[int],
        routing: Routing,
        scale: Tensor,
        record: Tensor,
        *,
        training: bool,
        num_sequences: int,
    ) -> Tensor:
        """Keep the losses of a forward for the caller, or hang them on its output.

        Args:
            y: the results of all tokens, ``(T, H)``.
            shape: of the layer's output.
            routing: of this forward.
            scale: what an attached loss is multiplied by.
            record: where attached losses are noted: ``(2,)``, their sum and how many.
            training: whether the layer is in training mode; without it there are no losses.
            num_sequences: see :meth:`total`.

        Returns:
            The output, which is no view.
        """
        if not training:  # what waits here is of training, and somebody may still read it
            return as_output(y, shape)
        if self.attach is not None:
            return self.attach(as_output(y, shape), routing)
        loss = self.total(routing, num_sequences)
        explicit = self.config.aux_loss == "explicit"
        if loss is not None and explicit:
            self._keep(loss)
        # Backward takes the youngest node first. That has to be the output: FSDP2 gathers the parameters there, and a
        # checkpoint, whose second forward begins at whatever comes first, needs them.
        y = as_output(y, shape)
        return y if loss is None or explicit or not loss.requires_grad else attach_loss(y, loss, scale, record)

    def _keep(self, loss: Tensor) -> None:
        """For the caller, who takes it."""
        if torch.compiler.is_compiling():
            if self._kept is not None:  # which compiles anew, once
                from torch._dynamo.comptime import comptime  # there by now; importing dmoe does not import it

                comptime(_tell_while_compiling)
            self._kept = loss
        elif not _inside_backward():  # a checkpoint's second forward: the first one's loss is in use already
            self._warn_of_unread()
            self._kept = loss

    @property
    def is_kept(self) -> bool:
        """Whether training forwards leave a loss here that the caller has to read."""
        return self.config.aux_loss == "explicit" and self.attach is None and bool(self.config.coefficients)

    @property
    def is_unread(self) -> bool:
        """Whether a training forward's loss waits here: nobody has read it since."""
        return self._kept is not None and self._kept.requires_grad

    def take(self, trained: bool) -> Tensor | None:
        """The loss that was kept, once. ``trained``: whether it has to have a graph.

        Raises:
            RuntimeError: it has none, as under reentrant activation checkpointing.
        """
        loss, self._kept = self._kept, None
        if loss is not None and torch.is_grad_enabled() and not loss.requires_grad and trained:
            raise RuntimeError(
                "aux_loss: the loss of this MoE layer has no graph, because its forward ran under no_grad, as "
                "under reentrant activation checkpointing. Either use checkpoint(..., use_reentrant=False), or build "
                "the layer with aux_loss='attached'."
            )
        return loss

    def total(self, routing: Routing, num_sequences: int = 1) -> Tensor | None:
        """Sum of the losses times their coefficients, a scalar; None when there is none.

        ``num_sequences``: equally long ones that the tokens are, for ``load_balancing_over="sequence"``.
        """
        total = None
        for name, coefficient in self.config.coefficients:
            loss = self._term(name, routing, num_sequences)
            if loss is not None:
                loss = loss * (coefficient / self.config.num_moe_layers)
                total = loss if total is None else total + loss
        return total

    def terms(self, routing: Routing, num_sequences: int = 1) -> dict[str, Tensor]:
        """Each loss of :meth:`total` by its name, without its coefficient: scalars."""
        losses = {name: self._term(name, routing, num_sequences) for name, _ in self.config.coefficients}
        return {name: loss for name, loss in losses.items() if loss is not None}

    def _term(self, name: str, routing: Routing, num_sequences: int) -> Tensor | None:
        """One loss without its coefficient; None where the router has nothing that it could be of."""
        if name in routing.losses:
            return routing.losses[name]
        if name == "z":
            return None if routing.log_z is None else router_z_loss(routing.log_z, routing.token_mask)
        if name in NOISE_LOSSES:  # the family's checks saw to it: there is no noise now
            return None
        if name not in BALANCE_LOSSES:
            known = ", ".join((*BALANCE_LOSSES, "z", *NOISE_LOSSES, *routing.losses))
            raise ValueError(f"MoE: losses: expected names of losses that this router has ({known}), got {name!r}")
        return None if routing.router_probs is None else self._balance(name, routing, num_sequences)

    def _balance(self, over: str, routing: Routing, num_sequences: int) -> Tensor:
        probs, mask, groups = routing.router_probs, routing.token_mask, self.config.token_groups
        assert probs is not None
        if over == "load_balancing" and groups != 1:
            over, num_sequences = "sequence", num_sequences if groups == "sequence" else int(groups)
        if over == "sequence" and routing.expert_indices is not None:
            chosen = routing.expert_indices if routing.counted_choices is None else routing.counted_choices
            chosen = chosen[:, : 1 if self.config.load_balancing_choices == "first" else None]
            return sequence_load_balancing_loss(probs, chosen, num_sequences, mask)
        if over == "global" and self.ranks is None and dist.is_available() and dist.is_initialized():
            world = dist.get_world_size()
            if world > 1:
                raise ValueError(
                    f"MoE: load_balancing_over: 'global' expected loss_group, or ep_group, with {world} ranks, to know "
                    "whose tokens are one batch, got neither"
                )
        counts = _counts(routing)
        if over == "global" and self.ranks is not None:
            counts, tokens = self.ranks.sum(counts, len(probs) if mask is None else mask.sum())
            return load_balancing_loss(probs, counts, mask, num_tokens=tokens)
        return load_balancing_loss(probs, counts, mask)

    def _warn_of_unread(self) -> None:
        if self.is_unread and not self._warned_unread:
            self._warned_unread = True
            warnings.warn(_UNREAD, stacklevel=6)


def _counts(routing: Routing) -> Tensor:
    """Assignments of each expert that the balance losses see, ``(E,)``."""
    if routing.first_choices_per_expert is not None:
        return routing.first_choices_per_expert
    if routing.counted_choices is None:
        return routing.plan.tokens_per_expert
    return histogram(routing.counted_choices.reshape(-1), routing.plan.num_experts + 1)[:-1]


def _tell_while_compiling(_: Any) -> None:
    warnings.warn(_UNREAD, stacklevel=2)


def _inside_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
