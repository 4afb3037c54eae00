"""``MoE``: DeepSpeed's arguments, results and state, on dmoe's router and experts."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from dmoe.compat._layers import LinearGate, RoutedLayer, first_choice_loss
from dmoe.compat.deepspeed.experts import DeepSpeedExperts
from dmoe.compat.deepspeed.groups import expert_parallel_group
from dmoe.config import DropOrder, MoEConfig
from dmoe.dense_ffn import RECOGNISED, DenseFFN, UnrecognisedFFNError, read_ffn
from dmoe.expert_slice import ExpertSlice
from dmoe.losses import gshard_loss
from dmoe.residual import weighted_sum
from dmoe.routing import Routing, TopK

_POLICIES = (None, "None", "Jitter", "RSample")


class MOELayer(RoutedLayer):
    """Gate and experts, which ``MoE`` calls ``deepspeed_moe``.

    Args:
        config: of the layer.
        expert: the module that the experts are copies of.
        ffn: what it computes.
        ep_size: ranks that share the experts, when :meth:`join` tells them.

    Attributes:
        gate: the router; its weight is ``gate.wg.weight``.
        l_aux, exp_counts: of the last forward.
    """

    exp_counts: Tensor | None = None

    def __init__(self, config: MoEConfig, expert: nn.Module, ffn: DenseFFN, ep_size: int) -> None:
        weight = ffn.down_proj()
        gate = LinearGate(config, device=weight.device, dtype=weight.dtype)
        super().__init__(config, router_module=gate, device="meta", dtype=weight.dtype)
        self.num_local_experts, self.ep_size = config.num_experts // ep_size, ep_size
        owned = ExpertSlice(range(self.num_local_experts), config.num_experts) if ep_size > 1 else None
        del self._modules["router"], self._modules["experts"]
        self.gate = gate
        self.experts = DeepSpeedExperts(config, expert, ffn, owned=owned, group_name=f"ep_size_{ep_size}")

    @property
    def router(self) -> nn.Module:
        """The gate."""
        return self.gate

    @property
    def ep_group(self) -> Any:
        """The ranks that share the experts; None where nobody has told them."""
        return getattr(self.dispatcher, "group", None)

    def forward(self, hidden_states: Tensor, used_token: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """``(..., H)`` to the same shape; see :meth:`MoE.forward`."""
        config = self.config
        if self.ep_size > 1 and self.ep_group is None:
            raise RuntimeError(
                f"MoE: expected set_deepspeed_parallelism() to be called before the first forward with ep_size = "
                f"{self.ep_size}, or ep_group to be given"
            )
        if hidden_states.dim() < 1 or hidden_states.shape[-1] != config.hidden_size:
            raise ValueError(
                f"MoE: hidden_states: expected shape (..., hidden_size = {config.hidden_size}), got "
                f"{tuple(hidden_states.shape)}"
            )
        tokens = hidden_states.reshape(-1, config.hidden_size).contiguous()
        mask = None if used_token is None or config.top_k > 1 else used_token.reshape(-1) != 0
        if mask is not None and mask.shape[0] != tokens.shape[0]:
            raise ValueError(
                f"MoE: used_token: expected one number for each of {tokens.shape[0]} tokens, got "
                f"{tuple(used_token.shape)}"  # type: ignore[union-attr]
            )
        y, routing = self.route_and_run(tokens, self.gate, mask)
        self.l_aux, self.exp_counts = _loss(routing), routing.plan.tokens_per_expert.long()
        return y.view(hidden_states.shape)


def _loss(routing: Routing) -> Tensor:
    """``E * sum_e f_e P_e``: f of the first choices for one or two of them, else of all k, over k."""
    assert routing.expert_indices is not None
    top_k = routing.expert_indices.shape[1]
    if top_k <= 2:
        return first_choice_loss(routing)
    assert routing.router_probs is not None
    return gshard_loss(routing.router_probs, routing.plan.tokens_per_expert) / top_k


class MoE(nn.Module):
    """``deepspeed.moe.layer.MoE``: ``output, l_aux, exp_counts = moe(hidden_states)``.

    The numbers are DeepSpeed's: capacities rounded in float32, random token selection also in evaluation, a sampled
    second expert also in evaluation, weights renormalised after the drop. What differs: any number of tokens works,
    ties go to the lowest expert, and all experts are one operation: there is no module of a single one to be hooked.

    Args:
        hidden_size: H.
        expert: a feed-forward block, ``fc2(act(fc1(x)))`` or gated, under any names; see :func:`dmoe.replace_ffn` for
            what is recognised. All experts begin equal to it.
        num_experts: E.
        ep_size: ranks that share the experts: :meth:`set_deepspeed_parallelism` makes their groups.
        k: experts of each token.
        capacity_factor, eval_capacity_factor: an expert takes ``ceil(k * factor * T / E)`` tokens.
        min_capacity: and at least so many.
        use_residual: PR-MoE: ``expert`` itself becomes :attr:`mlp`, beside the others; see :class:`dmoe.ResidualMoE`.
        noisy_gate_policy: ``Jitter``: the gate's input times U(0.99, 1.01); ``RSample``: with k = 1 the expert is drawn
            from the softmax. Both in training alone.
        drop_tokens: False drops nothing, whatever the capacity.
        use_rts: with k = 1 a full expert keeps random tokens; False: the first ones.
        use_tutel: nothing: it chose another implementation of the same numbers.
        enable_expert_tensor_parallelism: False.
        top2_2nd_expert_sampling: with k = 2 the second expert is drawn from the softmax of the others.
        ep_group: the ranks that share the experts, instead of those that :meth:`set_deepspeed_parallelism` makes.

    Attributes:
        deepspeed_moe: gate and experts; a :class:`dmoe.MoE`, for :func:`dmoe.moe_layers` and metrics.
        mlp, coefficient: with ``use_residual``.

    Raises:
        ValueError: an expert of another form, or arguments that do not fit.
    """

    def __init__(
        self,
        hidden_size: int,
        expert: nn.Module,
        num_experts: int = 1,
        ep_size: int = 1,
        k: int = 1,
        capacity_factor: float = 1.0,
        eval_capacity_factor: float = 1.0,
        min_capacity: int = 4,
        use_residual: bool = False,
        noisy_gate_policy: str | None = None,
        drop_tokens: bool = True,
        use_rts: bool = True,
        use_tutel: bool = False,
        enable_expert_tensor_parallelism: bool = False,
        top2_2nd_expert_sampling: bool = True,
        *,
        ep_group: Any = None,
    ) -> None:
        super().__init__()
        if ep_size < 1 or num_experts % ep_size:
            raise ValueError(f"MoE: num_experts: expected a multiple of ep_size = {ep_size}, got {num_experts}")
        if noisy_gate_policy not in _POLICIES:
            raise ValueError(f"MoE: noisy_gate_policy: expected one of {_POLICIES}, got {noisy_gate_policy!r}")
        if enable_expert_tensor_parallelism:
            raise ValueError(
                "MoE: enable_expert_tensor_parallelism: expected False, got True: build dmoe.MoE(..., ep_group=..., "
                "expert_tp_group=group), which cuts each expert over the ranks of a group"
            )
        ffn = _read_expert(expert, hidden_size)
        capacity: dict[str, Any] = {}
        if drop_tokens:
            capacity = _capacity(capacity_factor, eval_capacity_factor, min_capacity)
        sampled = k == 2 and top2_2nd_expert_sampling
        orders: dict[int, DropOrder] = {1: "random" if use_rts else "choice_major", 2: "choice_major"}
        config = MoEConfig(
            hidden_size=hidden_size,
            ffn_hidden_size=ffn.ffn_hidden_size,
            num_experts=num_experts,
            top_k=k,
            activation=ffn.activation,  # type: ignore[arg-type]
            gated=ffn.gated,
            bias="expert" if ffn.has_bias else "none",
            activation_dropout=ffn.activation_dropout,
            expert_dropout=ffn.output_dropout,
            router=TopK(
                second_expert="sampling" if sampled else "all",
                logit_noise="gumbel" if k == 1 and noisy_gate_policy == "RSample" else "none",
                noise_in_eval=sampled,
                masked_tokens="unrouted",
            ),
            input_jitter=0.01 if noisy_gate_policy == "Jitter" else 0.0,
            gate_normalization=1.0 if k > 1 else None,
            normalize_when="after_drop",
            drop_order=orders.get(k, "gate_weight"),
            load_balancing_coefficient=0.0,  # l_aux is the caller's
            expert_grad_scale="sum",  # as DeepSpeed's all-to-all leaves them, for its engine to divide
            **capacity,
        )
        self.use_residual, self.ep_size, self.num_experts = use_residual, ep_size, num_experts
        self.enable_expert_tensor_parallelism = enable_expert_tensor_parallelism
        self.expert_group_name, self.num_local_experts = f"ep_size_{ep_size}", num_experts // ep_size
        self.deepspeed_moe = MOELayer(config, expert, ffn, ep_size)
        self._group_given = ep_group is not None
        if use_residual:
            weight = ffn.down_proj()
            self.mlp = expert
            self.coefficient = nn.Linear(hidden_size, 2, device=weight.device, dtype=weight.dtype)
        if ep_group is not None:
            self._join(ep_group)

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Make, or find, the group of ranks that share the experts; DeepSpeed's engine calls it. Every rank has to.

        Nothing happens with ``ep_size=1``, or where ``ep_group`` was given.

        Args:
            use_data_before_expert_parallel_: ranks ``W / ep_size`` apart instead of consecutive ones.

        Raises:
            RuntimeError: ``torch.distributed`` is not initialised.
            ValueError: ranks that cannot be divided so, or a second call with another layout.
        """
        if self.ep_size > 1 and not self._group_given:
            self._join(expert_parallel_group(self.ep_size, use_data_before_expert_parallel_))

    def _join(self, group: Any) -> None:
        before = self.deepspeed_moe.ep_group
        if before is None:
            size = group.size()
            if size != self.ep_size:
                raise ValueError(f"MoE: ep_group: expected a group of ep_size = {self.ep_size} ranks, got {size}")
            if self.ep_size > 1:
                self.deepspeed_moe.join(group)
        elif dist.get_process_group_ranks(before) != dist.get_process_group_ranks(group):
            raise ValueError(
                f"set_deepspeed_parallelism: expected the ranks {dist.get_process_group_ranks(before)} that the layer "
                f"has, got {dist.get_process_group_ranks(group)}: a layer keeps its group"
            )

    def forward(self, hidden_states: Tensor, used_token: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Every token through its experts.

        Args:
            hidden_states: ``(..., H)`` floating point.
            used_token: with k = 1, a number for each token: where it is 0 the token takes no expert, and counts in the
                loss's mean probability alone. Not looked at otherwise, as in DeepSpeed.

        Returns:
            The output in the input's shape; the balance loss, without a coefficient and with its gradient, in
            evaluation too; and how many tokens each expert was given before any drop, ``(E,)`` int64.
        """
        y = self.deepspeed_moe(hidden_states, used_token)
        if self.use_residual:
            dense = self.mlp(hidden_states)
            dense = dense[0] if isinstance(dense, tuple) else dense  # what is behind it is a bias, not looked at there
            y = weighted_sum(y, dense, self.coefficient(hidden_states))
        l_aux, exp_counts = self.deepspeed_moe.l_aux, self.deepspeed_moe.exp_counts
        assert l_aux is not None
        assert exp_counts is not None
        return y, l_aux, exp_counts

    def extra_repr(self) -> str:
        """For ``print(model)``."""
        return f"num_experts={self.num_experts}, ep_size={self.ep_size}, use_residual={self.use_residual}"


def _read_expert(expert: nn.Module, hidden_size: int) -> DenseFFN:
    """What an expert computes, or an error that says what may be one."""
    what = f"MoE: expert: {type(expert).__name__}"
    if isinstance(expert, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
        raise ValueError(f"{what} is a whole transformer layer, where a feed-forward block was expected")
    try:
        ffn = read_ffn(expert)
    except UnrecognisedFFNError as error:
        raise ValueError(
            f"{what} is not recognised as a feed-forward block: it {error}. Recognised: {RECOGNISED}. Experts of "
            "another form have no counterpart in dmoe"
        ) from error
    if ffn.activation is None:
        raise ValueError(
            f"{what}: expected the activation silu, gelu (erf or tanh), relu, its square or sigmoid, got another one, "
            "or none"
        )
    if ffn.gate is not None and (ffn.gate.bias is None) != (ffn.up.bias is None):
        raise ValueError(f"{what}: expected a bias in both of the projections that are multiplied, or in none")
    if ffn.hidden_size != hidden_size:
        raise ValueError(f"MoE: hidden_size: expected the expert's {ffn.hidden_size}, got {hidden_size}")
    return ffn


def _capacity(factor: float, eval_factor: float, min_capacity: int) -> dict[str, Any]:
    for name, value in (("capacity_factor", factor), ("eval_capacity_factor", eval_factor)):
        if not value > 0:
            raise ValueError(
                f"MoE: {name}: expected a positive number, got {value}; drop_tokens=False is what drops nothing"
            )
    return {
        "capacity_factor": float(factor),
        "eval_capacity_factor": float(eval_factor),
        "min_capacity": min_capacity,
        "capacity_formula": "ceil_float32",
    }
