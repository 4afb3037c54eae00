"""The layer: hidden -> router -> plan -> experts -> output. Read this first.

    hidden (T, H) --> router --> plan, gate_weights --> [dispatch] --> experts --> [combine] --> output (T, H)
                        |                     |          other ranks, only with expert parallelism
                        +--> losses           +--> metrics

Every step is a file with that step's name: ``routing/``, ``plan.py``, ``parallel/dispatch.py``, ``experts.py``,
``losses.py``, ``metrics.py``.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dmoe.buffers import Float32Buffers
from dmoe.config import MoEConfig
from dmoe.experts import Experts, SharedExpert
from dmoe.losses import attach_loss, load_balancing_loss, router_z_loss, sequence_load_balancing_loss
from dmoe.metrics import RoutingMetrics, routing_entropy
from dmoe.parallel import AllToAllDispatcher, Dispatched, as_group, check_agreement
from dmoe.parallel.build import build_dispatcher, owned_experts
from dmoe.parallel.overlap import run_overlapped
from dmoe.parallel.statistics import LoadOfRanks
from dmoe.routing import Routing, build_router
from dmoe.sums import add_to_tokens

_Results: TypeAlias = tuple[Tensor, tuple[Dispatched, ...], Tensor | None]  # y, what was dispatched, kept per expert


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
        loss_group: the ranks whose tokens are one batch for ``load_balancing_over="global"``; None is ``ep_group``.
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
        if config is not None and not isinstance(config, MoEConfig):
            raise TypeError(f"MoE: config: expected a MoEConfig, got {type(config).__name__}; give fields as keywords")
        if config is not None and fields:
            raise TypeError(
                f"MoE: expected a config or its fields, got a config and {sorted(fields)}; use dataclasses.replace"
            )
        routes = isinstance(router_module, nn.Module) and hasattr(router_module, "update_selection_bias")
        if router_module is not None and not routes:
            raise TypeError(
                f"MoE: router_module: expected a module with dmoe.routing.Router's methods, got {router_module!r:.80}"
            )
        self.config = config = config or MoEConfig(**fields)
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dispatcher = build_dispatcher(config, ep_group, expert_tp_group, ep_levels)
        if ep_group is None and isinstance(self.dispatcher, AllToAllDispatcher):  # all ranks of a mesh of levels
            ep_group = self.dispatcher.group
        self.bias_ranks = None if loss_group is None else LoadOfRanks(as_group(loss_group, "loss_group"))
        loss_group = ep_group if loss_group is None else loss_group
        self.load_of_ranks = None if loss_group is None else LoadOfRanks(as_group(loss_group, "loss_group"))
        self.router = build_router(config, **where) if router_module is None else router_module
        owned = owned_experts(config, self.dispatcher, ep_group, device=device, dtensor=dtensor)
        self.experts = Experts(config, owned=owned, **where)
        if shared_expert is not None and config.shared_ffn_hidden_size:
            raise ValueError(
                "MoE: shared_expert: expected None with shared_ffn_hidden_size, which builds one, got "
                f"{type(shared_expert).__name__}"
            )
        own = SharedExpert(config, **where) if config.shared_ffn_hidden_size else None
        self.shared_expert: Callable[[Tensor], Tensor] | None = shared_expert if own is None else own
        self.attach_losses = attach_losses
        self.output_bias = nn.Parameter(torch.zeros(config.hidden_size, **where)) if config.bias == "output" else None
        self.register_float32("aux_loss_scale", 1.0, device=device, persistent=False)
        self.last_metrics: RoutingMetrics | None = None
        self._aux_loss: Tensor | None = None
        self._warned_unread = False
        self._ranks_agree = ep_group is None

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fresh values of what this module itself owns (its children reset their own), as after ``to_empty``."""
        self.aux_loss_scale.fill_(1.0)
        if self.output_bias is not None:
            self.output_bias.zero_()

    def forward(
        self,
        x: Tensor,
        *,
        token_mask: Tensor | None = None,
        token_ids: Tensor | None = None,
        expert_indices: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """Send every token through its experts.

        Args:
            x: ``(..., H)`` floating point; any leading dimensions, any strides.
            token_mask: bool with x's leading dimensions; tokens that are False take no expert, count in no loss and
                may hold anything: they are read as zeros, and so is what comes out (but for biases).
            token_ids: integers with x's leading dimensions, for routers that look at them.
            expert_indices: ``(..., K)`` integers: replay this routing; gate weights come from the live scores.

        Returns:
            ``(..., H)`` in x's dtype (autocast's under autocast); with ``return_bias``, a pair of that and the bias.

        Raises:
            ValueError, TypeError: x, mask, ids or indices of another shape, type or device than the layer expects.
            ValueError: on every rank, in the first forward with ``ep_group``: ranks whose layers differ.
        """
        self._check(x, token_mask, token_ids, expert_indices)
        if not self._ranks_agree:
            self._check_ranks(x.dtype)
        tokens = x.reshape(-1, x.shape[-1]).contiguous()  # once: router and experts save the same memory
        if token_mask is not None:
            token_mask = token_mask.reshape(-1)
            tokens = tokens.masked_fill(~token_mask.unsqueeze(1), 0)  # 0 * NaN would reach the router's gradient
        routing = self.router(
            tokens,
            token_mask=token_mask,
            token_ids=None if token_ids is None else token_ids.reshape(-1),
            expert_indices=None if expert_indices is None else expert_indices.reshape(-1, self.config.top_k),
        )
        in_chunks = self.config.overlap_degree > 1 and isinstance(self.dispatcher, AllToAllDispatcher)
        y, arrived, kept = (self._in_chunks if in_chunks else self._at_once)(tokens, routing)
        y = self._with_aux_loss(y.view(*x.shape[:-1], y.shape[-1]), routing, math.prod(x.shape[:-2]))
        self.last_metrics = _metrics(routing, arrived, kept)
        if self.output_bias is None:
            return y
        return (y, self.output_bias) if self.config.return_bias else add_to_tokens(y, self.output_bias.to(y.dtype))

    def _at_once(self, tokens: Tensor, routing: Routing) -> _Results:
        """Dispatch, experts, combine; while tokens travel, the shared expert; while gradients do, those of weights."""
        going = self.dispatcher.start_dispatch(tokens, routing.expert_indices, routing.gate_weights, routing.plan)
        moved = isinstance(self.dispatcher, AllToAllDispatcher)
        weights = self.experts.weights_ahead() if moved else None
        shared = None if self.shared_expert is None else self.shared_expert(tokens)
        arrived = self.dispatcher.finish_dispatch(going)
        residual = None if moved else shared  # where nothing moved the experts' own sum takes in the shared one
        y = self.experts(arrived.x, arrived.plan, arrived.gate_weights, residual, weights)
        y = self.dispatcher.combine(y, arrived)
        y = y + shared if moved and shared is not None else y
        return y, (arrived,), arrived.kept_per_expert

    def _in_chunks(self, tokens: Tensor, routing: Routing) -> _Results:
        """The same in chunks of experts, one of which travels while another computes."""
        degree, shared = self.config.overlap_degree, []
        assert isinstance(self.dispatcher, AllToAllDispatcher)
        weights = self.experts.in_parts(degree)

        def on_the_way(chunk: int) -> None:
            weights[chunk] = weights[chunk].deferred()
            if self.shared_expert is not None and chunk == 0:
                shared.append(self.shared_expert(tokens))

        def experts(chunk: int, arrived: Dispatched) -> Tensor:
            return self.experts(arrived.x, arrived.plan, arrived.gate_weights, weights=weights[chunk])

        done = run_overlapped(
            self.dispatcher,
            experts,
            tokens,
            routing.expert_indices,
            routing.gate_weights,
            routing.plan,
            degree=degree,
            on_the_way=on_the_way,
        )
        return done.y + shared[0] if shared else done.y, done.chunks, done.kept_per_expert

    def router_losses(self, routing: Routing, num_sequences: int = 1) -> Tensor | None:
        """Sum of this layer's auxiliary losses times their coefficients, a scalar; None when there is none.

        ``num_sequences``: equally long ones that the tokens are, for ``load_balancing_over="sequence"``.
        """
        config, total = self.config, None
        if routing.router_probs is not None and config.load_balancing_coefficient:
            first = routing.first_choices_per_expert
            counts = routing.plan.tokens_per_expert if first is None else first
            balance = self._balance(routing, counts, num_sequences)
            total = balance * (config.load_balancing_coefficient / config.num_moe_layers)
        if routing.log_z is not None:
            z_loss = router_z_loss(routing.log_z, routing.token_mask)
            z_loss = z_loss * (config.router_z_loss_coefficient / config.num_moe_layers)
            total = z_loss if total is None else total + z_loss
        return total

    def _balance(self, routing: Routing, counts: Tensor, num_sequences: int) -> Tensor:
        probs, mask, over = routing.router_probs, routing.token_mask, self.config.load_balancing_over
        assert probs is not None
        if over == "sequence" and routing.expert_indices is not None:
            chosen = routing.expert_indices[:, : 1 if self.config.load_balancing_choices == "first" else None]
            return sequence_load_balancing_loss(probs, chosen, num_sequences, mask)
        if over == "global" and self.load_of_ranks is not None:
            counts, tokens = self.load_of_ranks.sum(counts, len(probs) if mask is None else mask.sum())
            return load_balancing_loss(probs, counts, mask, num_tokens=tokens)
        return load_balancing_loss(probs, counts, mask)

    def take_aux_loss(self) -> Tensor | None:
        """The losses of the last training forward, once: reading them clears them. :func:`dmoe.aux_loss` calls this.

        Raises:
            RuntimeError: the loss has no graph, as under reentrant activation checkpointing.
        """
        loss, self._aux_loss = self._aux_loss, None
        if loss is not None and torch.is_grad_enabled() and not loss.requires_grad and self._is_trained():
            raise RuntimeError(
                "aux_loss: the loss of this MoE layer has no graph, because its forward ran under no_grad, as "
                "under reentrant activation checkpointing. Either use checkpoint(..., use_reentrant=False), or build "
                "the layer with aux_loss='attached'."
            )
        return loss

    def update_selection_bias(self) -> None:
        """Move the router's selection bias, if it has one; call it after the optimizer step, on every rank.

        The load is that of all ranks that train the layer, so that their biases stay equal: those of ``loss_group``, or
        that :func:`dmoe.parallel.data_parallel` was told, or of ``ep_group`` (and ``expert_tp_group``).
        """
        load = getattr(self.router, "load_since_update", None)
        if load is not None:
            ep = self.dispatcher.groups if isinstance(self.dispatcher, AllToAllDispatcher) else ()
            for group in ep if self.bias_ranks is None else (self.bias_ranks.group,):
                dist.all_reduce(load, group=group)
        self.router.update_selection_bias()  # type: ignore[operator]  # every router has one: routing.Router

    def _with_aux_loss(self, y: Tensor, routing: Routing, num_sequences: int) -> Tensor:
        """Record the losses for the caller, or hang them on the output."""
        if not self.training:
            self._aux_loss = None
            return y
        if self.attach_losses is not None:
            return self.attach_losses(y, routing)
        loss = self.router_losses(routing, num_sequences)
        if loss is None:
            return y
        if self.config.aux_loss == "attached":
            return attach_loss(y, loss, self.aux_loss_scale) if loss.requires_grad else y
        if torch.compiler.is_compiling():
            self._aux_loss = loss
        elif not _inside_backward():  # a checkpoint's second forward: the first one's loss is in use already
            lost = self._aux_loss is not None and self._aux_loss.requires_grad
            if lost and not self._warned_unread:
                self._warned_unread = True
                warnings.warn(
                    "dmoe: a MoE layer ran a second training forward before the auxiliary loss of the first was read, "
                    "and that loss is lost. Add dmoe.aux_loss(model) to the task's loss, set aux_loss='attached', or "
                    "set the coefficients to 0.",
                    stacklevel=3,
                )
            self._aux_loss = loss
        return y

    def __getstate__(self) -> dict[str, Any]:
        """Without the last forward's loss and metrics: a copy or a file must not carry a graph along."""
        return {**self.__dict__, "_aux_loss": None, "last_metrics": None}

    def _is_trained(self) -> bool:
        return any(parameter.requires_grad for parameter in self.router.parameters())

    def _check_ranks(self, dtype: torch.dtype) -> None:
        """Ask the other ranks, once, whether they run the same layer."""
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "MoE: expected one forward before a CUDA graph is captured: the first one asks the other ranks whether "
                "they run the same layer"
            )
        assert isinstance(self.dispatcher, AllToAllDispatcher)
        options = {field.name: getattr(self.config, field.name) for field in dataclasses.fields(self.config)}
        weights = {"dtype of x": dtype, "dtype of the experts": self.experts.down_proj.dtype}
        hints = {"seed": "call torch.manual_seed with one value on all ranks before the layer is built"}
        levels = self.dispatcher.two_level
        hops = {"ep_levels": None if levels is None else (levels.num_nodes, levels.ranks_per_node)}
        groups = {
            "ranks of expert_tp_group": self.dispatcher.num_ranks // self.dispatcher.world_size,
            "ranks of loss_group": None
            if self.load_of_ranks is None
            else dist.get_world_size(self.load_of_ranks.group),
            "frozen parameters": [name for name, parameter in self.named_parameters() if not parameter.requires_grad],
        }
        fields = {**options, **weights, **hops, **groups, "seed": self.experts.seed}
        check_agreement("MoE", fields, self.dispatcher.groups, hints)
        self._ranks_agree = True

    def _check(
        self, x: Tensor, token_mask: Tensor | None, token_ids: Tensor | None, expert_indices: Tensor | None
    ) -> None:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"MoE: x: expected a floating-point tensor, got {got}")
        if x.dim() < 1 or x.shape[-1] != self.config.hidden_size:
            raise ValueError(
                f"MoE: x: expected shape (..., hidden_size = {self.config.hidden_size}), got {tuple(x.shape)}"
            )
        home = self.experts.down_proj.device
        if x.device != home:
            raise ValueError(f"MoE: expected x on the weights' device {home}, got {x.device}")
        leading = tuple(x.shape[:-1])
        expected = {
            "token_mask": (token_mask, leading),
            "token_ids": (token_ids, leading),
            "expert_indices": (expert_indices, (*leading, self.config.top_k)),
        }
        for name, (tensor, shape) in expected.items():
            if tensor is None:
                continue
            if not isinstance(tensor, Tensor):
                raise TypeError(f"MoE: {name}: expected a tensor, got {type(tensor).__name__}")
            if tuple(tensor.shape) != shape or tensor.device != x.device:
                raise ValueError(
                    f"MoE: {name}: expected shape {shape} on {x.device}, got {tuple(tensor.shape)} on {tensor.device}"
                )
            allowed = (torch.bool,) if name == "token_mask" else (torch.int32, torch.int64)
            if tensor.dtype not in allowed:
                kinds = " or ".join(map(str, allowed))
                raise TypeError(f"MoE: {name}: expected {kinds}, got {tensor.dtype}")


def _inside_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


@torch.no_grad()
def _metrics(routing: Routing, arrived: tuple[Dispatched, ...], kept: Tensor | None) -> RoutingMetrics:
    probs = routing.router_probs
    if probs is None:
        experts = routing.plan.num_experts
        entropy = routing.gate_weights.new_full((), math.log(experts))
    else:
        entropy = routing_entropy(probs.detach(), routing.token_mask)
    kept = routing.plan.kept_per_expert if kept is None else kept
    metrics = RoutingMetrics(routing.plan.tokens_per_expert, kept, entropy)
    traffic = [each.traffic for each in arrived if each.traffic is not None]
    if not traffic:
        return metrics
    naive = [each.naive_bytes_sent for each in traffic]
    total = None if None in naive else sum(number for number in naive if number is not None)
    return dataclasses.replace(metrics, bytes_sent=sum(each.bytes_sent for each in traffic), naive_bytes_sent=total)
