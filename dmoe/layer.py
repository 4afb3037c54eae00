"""The layer: hidden -> router -> plan -> experts -> output. Read this first.

    hidden (T, H) --> router --> plan, gate_weights --> [dispatch] --> experts --> [combine] --> output (T, H)
                        |                     |          other ranks, only with expert parallelism
                        +--> losses           +--> metrics

Every step is a file with that step's name: ``inputs.py``, ``routing/``, ``plan.py``, ``parallel/dispatch.py``,
``experts.py`` (``functional.py``), ``losses.py`` (handed over by ``auxiliary.py``), ``metrics.py``. In inference on the
CPU all of them are one operation where nobody looks in between: ``direct.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dmoe import direct
from dmoe.auxiliary import AuxiliaryLosses
from dmoe.buffers import Float32Buffers
from dmoe.config import MoEConfig
from dmoe.experts import Experts
from dmoe.inputs import check_copied, check_inputs, check_parts, config_of, flatten_inputs, jittered
from dmoe.metrics import RoutingMetrics, metrics_of
from dmoe.parallel import AllToAllDispatcher, Dispatched
from dmoe.parallel.agreement import check_layers
from dmoe.parallel.build import owned_experts, ranks_of_layer
from dmoe.parallel.overlap import run_in_chunks
from dmoe.parallel.slots import run_by_slots
from dmoe.parallel.statistics import LoadOfRanks, move_selection_bias
from dmoe.routing import Routing, build_router
from dmoe.shared_expert import SharedExpert
from dmoe.sums import add_to_tokens


class MoE(Float32Buffers):
    """A Mixture-of-Experts feed-forward layer, dropless unless a capacity is given.

    ``MoE(hidden_size=512, ffn_hidden_size=1024, num_experts=16, top_k=2)``, or ``MoE(config)``. In training add
    ``dmoe.aux_loss(model)`` to the task's loss (or choose ``aux_loss="attached"``).

    Args:
        config: a :class:`dmoe.MoEConfig`; or leave it out and give its fields as keywords.
        ep_group: expert parallelism: a ``torch.distributed`` process group, or a ``DeviceMesh`` of one dimension, over
            whose W ranks the experts are spread in blocks of E / W. Router and shared expert are on every rank; each
            rank brings tokens of its own, any number of them. Capacities and losses are counted over these.
            With more ranks than experts (W = E * S) S ranks in a row share an expert, each with a slice of its F.
        expert_tp_group: tensor parallelism of each expert: the ranks, or a mesh of one dimension, that hold slices of
            the same experts' F. They form a grid with ``ep_group``, ranks of which are next to each other in a mesh
            ``("ep", "expert_tp")``; each has tokens of its own.
        ep_levels: two hops, inside a node and between nodes: a ``DeviceMesh`` of (nodes, ranks of a node), or the two
            groups as a :class:`dmoe.parallel.TwoLevel` beside ``ep_group``.
        loss_group: the ranks whose tokens are one batch for ``load_balancing_over="global"``, and whose load moves the
            selection bias; None is ``ep_group``.
        dtensor: whether the experts' parameters are ``DTensor`` on the mesh of ``ep_group``, as
            ``torch.distributed.checkpoint`` and FSDP2 need to know which part of them is here. False keeps plain
            tensors, for frameworks that know by themselves. Experts of different widths are always plain.
        router_module: a module of your own that keeps the protocol :class:`dmoe.routing.Router`, instead of the one
            that the config describes. Its choices have to be ``(T, top_k)``.
        shared_expert: what every token takes beside its experts, instead of a shared expert of this layer's own: a
            function of ``(T, H)`` to ``(T, H)`` in the same dtype, called while tokens travel. A module is registered.
        attach_losses: what a framework does with the routing of each training forward, instead of this layer's own
            losses: called with the output in x's shape and the :class:`dmoe.Routing`, it returns the output.
        device, dtype: of the parameters, as in ``nn.Linear``.
        **fields: fields of :class:`dmoe.MoEConfig`, instead of ``config``.

    With ``ep_group`` every rank seeds PyTorch's default generator alike before it builds the layer (or all load the
    same values afterwards): then the initial values are those of the layer on one rank. The constructor talks to
    nobody (but where ``ep_levels`` is a mesh of some of the run's ranks, whose group has to be made); the first forward
    asks whether all ranks run the same layer. From then on each call of one rank's forward, and of its backward, needs
    the same call on all of them.

    Attributes:
        last_metrics: :class:`dmoe.metrics.RoutingMetrics` of the last forward, or None.

    Limits: one layer object called twice before its loss is read keeps the second loss only (not so with
    ``aux_loss="attached"``); ``torch.func`` transforms and forward-mode differentiation are not supported; second
    derivatives need ``backend="reference"``.
    """

    aux_loss_scale: Tensor
    attached_losses: Tensor
    router: Any
    _in_one_operation = False

    def __init__(
        self,
        config: MoEConfig | None = None,
        *,
        ep_group: Any = None,
        expert_tp_group: Any = None,
        ep_levels: Any = None,
        loss_group: Any = None,
        dtensor: bool = True,
        router_module: nn.Module | None = None,
        shared_expert: Callable[[Tensor], Tensor] | None = None,
        attach_losses: Callable[[Tensor, Routing], Tensor] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **fields: Any,
    ) -> None:
        super().__init__()
        self.config = config = config_of(config, fields)
        check_parts(config, router_module, shared_expert)
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        ranks = ranks_of_layer(config, ep_group, expert_tp_group, ep_levels, loss_group)
        self.dispatcher, self.bias_ranks = ranks.dispatcher, ranks.of_bias
        self.auxiliary = AuxiliaryLosses(config, ranks.of_loss, attach_losses)
        self.router = build_router(config, router_module, ranks=ranks.of_tokens, **where)
        owned = owned_experts(config, ranks, device=device, dtensor=dtensor)
        self.experts = Experts(config, owned=owned, **where)
        own = SharedExpert(config, **where) if config.shared_ffn_hidden_size else None
        self.shared_expert: Callable[[Tensor], Tensor] | None = shared_expert if own is None else own
        self.output_bias = nn.Parameter(torch.zeros(config.hidden_size, **where)) if config.bias == "output" else None
        self.register_float32("aux_loss_scale", 1.0, device=device, persistent=False)
        self.register_float32("attached_losses", 0.0, 2, device=device, persistent=False)
        self.last_metrics: RoutingMetrics | None = None
        self._ranks_agree = ranks.ep_group is None
        self._in_one_operation = direct.knows(config, self.router)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fresh values of what this module itself owns (its children reset their own), as after ``to_empty``."""
        self.aux_loss_scale.fill_(1.0)
        self.attached_losses.zero_()
        if self.output_bias is not None:
            self.output_bias.zero_()

    def forward(
        self,
        x: Tensor,
        *,
        token_mask: Tensor | None = None,
        token_ids: Tensor | None = None,
        expert_indices: Tensor | None = None,
        return_routing: bool = False,
    ) -> Tensor | tuple[Any, ...]:
        """Send every token through its experts.

        Args:
            x: ``(..., H)`` floating point; any leading dimensions, any strides.
            token_mask: bool with x's leading dimensions; tokens that are False take no expert, count in no loss and
                may hold anything: they are read as zeros, and so is what comes out (but for biases). With
                ``TopK(masked_tokens="unrouted")`` they take no expert, and that is all.
            token_ids: integers with x's leading dimensions, for routers that look at them.
            expert_indices: ``(..., K)`` integers: replay this routing; gate weights come from the live scores.
            return_routing: hand back the :class:`dmoe.routing.Routing` too, for models that report their choices, or
                compute losses of their own from its ``router_logits`` (Transformers' ``output_router_logits``).

        Returns:
            ``(..., H)`` in x's dtype (autocast's under autocast); with ``return_bias`` or ``return_routing`` a tuple of
            that, the bias, and the routing.

        Raises:
            ValueError, TypeError: x, mask, ids or indices of another shape, type or device than the layer expects.
            ValueError: on every rank, in the first forward with ``ep_group``: ranks whose layers differ; and in any
                forward, but not in the static mode, ranks that differ in training and evaluation, or in autograd.
        """
        check_inputs(self.config, x, token_mask, token_ids, expert_indices)
        about = {"token_mask": token_mask, "token_ids": token_ids, "expert_indices": expert_indices}
        done = None
        if self._in_one_operation and token_mask is None and expert_indices is None and not return_routing:
            done = direct.run_directly(self, x)
        if done is None:
            y, routing = self._in_steps(x, about)
        else:
            (y, self.last_metrics), routing = done, None
        beside: tuple[Any, ...] = (routing,) if return_routing else ()
        if self.output_bias is not None and self.config.return_bias:
            beside = (self.output_bias, *beside)
        elif self.output_bias is not None:
            y = add_to_tokens(y, self.output_bias.to(y.dtype))
        return (y, *beside) if beside else y

    def _in_steps(self, x: Tensor, about: dict[str, Tensor | None]) -> tuple[Tensor, Routing]:
        """The output in x's shape, and the routing; ``about`` is what :meth:`forward` was told of the tokens."""
        if not self._ranks_agree:
            check_layers(self, x.dtype)
            self._ranks_agree = True
        tokens, told = flatten_inputs(self.router, x, **about)
        if self.training and self.config.input_jitter_on == "layer":
            tokens = jittered(tokens, self.config.input_jitter)
        routing = self.router(tokens, **told)
        if isinstance(self.dispatcher, AllToAllDispatcher):
            self.dispatcher.mode = "training" if self.training else "evaluation"
        y, arrived, kept = self._through_experts(tokens, routing)
        y = self.auxiliary.hand_over(
            y,
            (*x.shape[:-1], y.shape[-1]),
            routing,
            self.float32("aux_loss_scale", x.device),
            self.float32("attached_losses", x.device),
            training=self.training,
            num_sequences=math.prod(x.shape[:-2]),
        )
        self.last_metrics = metrics_of(routing, arrived, kept)
        return y, routing

    def _through_experts(
        self, tokens: Tensor, routing: Routing
    ) -> tuple[Tensor, tuple[Dispatched, ...], Tensor | None]:
        """Dispatch, experts, combine; while tokens travel, the shared expert; while gradients do, those of weights.

        Returns y, what was dispatched, and what the dispatch kept for each expert where that is less than planned.
        """
        dispatcher, experts, degree = self.dispatcher, self.experts, self.config.overlap_degree
        if isinstance(dispatcher, AllToAllDispatcher) and self.config.batch_invariant:
            assert routing.expert_indices is not None  # of the only family that promises it
            choices = routing.expert_indices, routing.gate_weights
            y, arrived = run_by_slots(dispatcher, self._on_arrived, self.shared_expert, tokens, *choices)
            return y, (arrived,), arrived.kept_per_expert
        if isinstance(dispatcher, AllToAllDispatcher) and degree > 1:
            done = run_in_chunks(dispatcher, experts, self.shared_expert, tokens, routing, degree=degree)
            return done.y, done.chunks, done.kept_per_expert
        going = dispatcher.start_dispatch(tokens, routing.expert_indices, routing.gate_weights, routing.plan)
        moved = isinstance(dispatcher, AllToAllDispatcher)
        ahead = moved and isinstance(experts, Experts)  # not what an adapter or FSDP1 put in its place
        weights = experts.weights_ahead(going.copies) if ahead else None
        shared = None if self.shared_expert is None else self.shared_expert(tokens)
        arrived = dispatcher.finish_dispatch(going)
        residual = None if moved else shared  # where nothing moved the experts' own sum takes in the shared one
        y = self._on_arrived(arrived, residual, weights)
        y = dispatcher.combine(y, arrived)
        y = y + shared if moved and shared is not None else y
        return y, (arrived,), arrived.kept_per_expert

    def _on_arrived(self, arrived: Dispatched, *residual_and_weights: Any) -> Tensor:
        """The experts here, and the copies of others that this rank hosts, on the tokens that came."""
        copied = {} if arrived.copies is None else {"copies": arrived.copies, "copies_plan": arrived.copies_plan}
        y: Tensor = self.experts(arrived.x, arrived.plan, arrived.gate_weights, *residual_and_weights, **copied)
        return y

    def router_losses(self, routing: Routing, num_sequences: int = 1) -> Tensor | None:
        """Sum of this layer's auxiliary losses times their coefficients, a scalar; None when there is none.

        ``num_sequences``: equally long ones that the tokens are, for ``load_balancing_over="sequence"``.
        """
        return self.auxiliary.total(routing, num_sequences)

    def take_aux_loss(self) -> Tensor | None:
        """The losses of the last training forward, once: reading them clears them. :func:`dmoe.aux_loss` calls this.

        Raises:
            RuntimeError: the loss has no graph, as under reentrant activation checkpointing.
        """
        return self.auxiliary.take(trained=any(parameter.requires_grad for parameter in self.router.parameters()))

    @torch.no_grad()
    def take_attached_loss(self) -> Tensor | None:
        """Mean of the losses that backwards have attached since the last call; None without ``aux_loss="attached"``."""
        if self.config.aux_loss != "attached":
            return None
        total, count = self.attached_losses.unbind()
        mean = total / count.clamp(min=1)
        self.attached_losses.zero_()
        return mean

    def attach_aux_loss(self) -> None:
        """Go on as if built with ``aux_loss="attached"``: see :func:`dmoe.attach_aux_losses`."""
        self.config = replace(self.config, aux_loss="attached")
        self.auxiliary.config = self.config

    def update_selection_bias(self, group: dist.ProcessGroup | None = None) -> None:
        """Move the router's selection bias, if it has one; call it after the optimizer step, on every rank.

        Args:
            group: all ranks that train the layer, whose loads add up, so that their biases stay equal. None: those of
                ``loss_group``, or that :mod:`dmoe.parallel`'s ``data_parallel`` or ``fully_shard_experts`` was told, or
                of ``ep_group`` (and ``expert_tp_group``) if that is all there are.

        Raises:
            ValueError: None, and there are ranks of which nobody said whether they train the layer.
        """
        told = self.bias_ranks if group is None else LoadOfRanks(group)
        ep_groups = self.dispatcher.groups if isinstance(self.dispatcher, AllToAllDispatcher) else ()
        move_selection_bias(self.router, told, ep_groups)

    def spread_experts(
        self,
        ep_group: Any,
        *,
        expert_tp_group: Any = None,
        ep_levels: Any = None,
        loss_group: Any = None,
        dtensor: bool = True,
    ) -> None:
        """Keep this rank's part of the experts, of a layer that was built, or loaded, with all of them.

        From then on it is the layer that these groups would have built, with the values that it has now. Parameters of
        experts become new ones, so make optimizers and wrappers afterwards. :func:`dmoe.parallel.parallelize` does this
        to all layers of a model.

        Args:
            ep_group, expert_tp_group, ep_levels, loss_group, dtensor: as :class:`dmoe.MoE` takes them. The same values
                have to lie on every rank; a layer on the meta device serves, and is filled afterwards.

        Raises:
            ValueError: experts that are spread already, held as codes, or with adapters; and what the constructor says.
        """
        if not isinstance(self.experts, Experts):  # of a layer in dmoe.compat, or what an adapter put there
            raise ValueError(f"MoE.spread_experts: expected experts of dmoe.MoE, got {type(self.experts).__name__}")
        ranks = ranks_of_layer(self.config, ep_group, expert_tp_group, ep_levels, loss_group)
        device = next(self.experts.parameters()).device
        owned = owned_experts(self.config, ranks, device=device, dtensor=dtensor)
        if owned is None:
            raise ValueError("MoE.spread_experts: ep_group: expected the ranks that are to share the experts, got None")
        self.experts.keep(owned)
        self.dispatcher, self.bias_ranks = ranks.dispatcher, ranks.of_bias or self.bias_ranks
        self.auxiliary.ranks = ranks.of_loss
        if hasattr(self.router, "ranks"):  # whose choices do not depend on others' tokens knows of none
            self.router.ranks = ranks.of_tokens
        self.ask_ranks_again()

    def ask_ranks_again(self) -> None:
        """Let the next forward compare the layer with those of other ranks once more, as parts of it have changed."""
        self._ranks_agree = not isinstance(self.dispatcher, AllToAllDispatcher)

    def _replicate_for_data_parallel(self) -> MoE:
        """What ``nn.DataParallel`` calls for each device, in each forward."""
        if self.training and torch.is_grad_enabled():
            check_copied(self.config, keeps_loss=self.auxiliary.is_kept)
        return super()._replicate_for_data_parallel()

    def __getstate__(self) -> dict[str, Any]:
        """Without the last forward's metrics: a copy or a file must not carry its tensors along."""
        return {**super().__getstate__(), "last_metrics": None}
