"""Every option of the layer with its default, in one place, validated once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from dmoe.sizes import larger, smaller

Activation = Literal["gelu", "gelu_tanh", "relu", "silu"]
GateWeightOn = Literal["output", "activation", "input"]
Backend = Literal["grouped", "block_sparse", "torch", "reference"]
DropOrder = Literal["token_major", "choice_major", "batch_prioritized", "gate_weight", "normalized_gate_weight"]


@dataclass(frozen=True)
class MoEConfig:
    """Options of :class:`dmoe.MoE`. Sizes count features, coefficients and shares are dimensionless.

    Experts
        hidden_size: H, the last dimension of input and output.
        ffn_hidden_size: F, the inner width of each expert; a list gives every expert its own.
        num_experts: E.
        activation: ``silu``, ``gelu`` (exact), ``gelu_tanh`` or ``relu``.
        gated: ``act(x @ gate) * (x @ up)`` (SwiGLU and its kin, Shazeer 2020) instead of ``act(x @ up)``.
        bias: ``none``; ``expert``: one per expert and projection; ``output``: a single (H,) vector for the whole layer,
            as in MegaBlocks and Megatron.
        return_bias: hand the ``output`` bias back beside the result, ``(y, bias)``, instead of adding it.
        activation_dropout, expert_dropout: dropout probability after the activation, and on an expert's output before
            the combine (fairseq). The masks are counter-based and regenerated in backward: nothing is saved.
        gate_weight_on: what the gate weight multiplies: the expert's ``output`` (Shazeer et al. 2017), its
            ``activation`` (Megatron-Core), or its ``input`` (Llama 4).
        shared_ffn_hidden_size: width of a shared expert that every token takes (DeepSeekMoE); None for none.
        shared_expert_gate: scale the shared expert by ``sigmoid(x @ w)`` per token (Qwen2-MoE).
        init_std: standard deviation of normal initial weights; None for ``nn.Linear``'s uniform.

    Router
        top_k: K, experts per token.
        router: ``top_k``; ``expert_choice``: experts pick tokens (Zhou et al. 2022); ``uniform``: round robin, to
            measure speed under perfect balance.
        causal: the model must not see later tokens. Expert Choice leaks them, so it is refused unless ``causal=False``
            or ``allow_future_leak=True`` says that this is meant.
        score_function: ``softmax`` or ``sigmoid`` (DeepSeek-V3) over the router logits.
        softmax_order: ``before_topk`` (Switch, Megatron's pre-softmax) or ``after_topk`` (Mixtral): over all experts,
            or over the chosen ones only.
        gate_normalization: p of the p-norm that gate weights are divided by; None leaves the scores as they are. With
            K = 1 a normalised weight is always 1 and gives the router no gradient but the losses'.
        normalize_when: ``before_drop`` (a dropped choice keeps its share) or ``after_drop`` (fairseq: the
            survivors share 1).
        gate_scale: factor on the gate weights after normalisation (DeepSeek's routed scaling factor).
        router_bias: learn a bias in the router's linear.
        router_dtype: ``float32``: the router computes in float32 whatever the model's dtype (float64 for float64
            input); ``input``: in the input's dtype.
        input_jitter: in training the router's input is multiplied by U(1 - j, 1 + j) (Switch).
        selection_bias: choose experts by ``score + bias`` and weigh by the score alone; the bias follows the load
            without a loss (DeepSeek-V3), by :meth:`dmoe.MoE.update_selection_bias` after the optimizer step.
        selection_bias_update_rate: how far one update moves it.
        num_groups, top_k_groups: choose only inside the best ``top_k_groups`` of ``num_groups`` groups of experts.
        group_score: a group's rank: the sum of its two best scores (``top2_sum``, DeepSeek-V3) or its best (``max``,
        V2).

    Capacity (None: dropless, the default)
        capacity: the most rows one expert takes.
        capacity_factor: the same relative to an even share ``T * K / E``. For Expert Choice: tokens per expert.
        min_capacity: never fewer than this.
        capacity_formula: ``ceil``: ceil(factor * T * K / E) (DeepSpeed); ``floor``: the same, floored (MegaBlocks);
            ``ceil_per_choice``: K * ceil(factor * T / E) (fairseq, GShard).
        drop_order: who is dropped. ``token_major`` (MegaBlocks): later tokens; ``choice_major`` (GShard, fairseq):
            second choices before first ones; ``batch_prioritized`` (V-MoE): tokens with a small largest score;
            ``gate_weight`` (DeepSpeed's ``probs``): the assignments with the smallest scores;
            ``normalized_gate_weight`` (Megatron-Core's ``probs``): those with the smallest weights, normalised.

    Losses
        load_balancing_coefficient, router_z_loss_coefficient: factors of the two losses; 0 switches one off.
        load_balancing_choices: count all K choices (``all``) or only the ``first`` (GShard, fairseq).
        load_balancing_over: what is to be balanced: the ``local`` batch of a rank (Switch, GShard); each ``sequence``,
            the last of x's leading dimensions (DeepSeek-V3); or the ``global`` batch of all ranks of the layer's
            ``loss_group`` (Megatron-Core's ``global_aux_loss``), whose counts are summed without the host waiting; all
            of these train, or none does, for a rank in evaluation has no loss to count for.
        aux_loss: ``explicit``: the caller adds ``dmoe.aux_loss(model)`` to the task's loss; ``attached``: the gradient
            joins at the layer's output, for training loops that cannot be edited.
        num_moe_layers: the losses are divided by this, so the coefficient means the same at any depth (MegaBlocks).

    Execution
        backend: None lets the tensors' device decide; ``grouped`` says so by name; ``block_sparse`` computes
            block-sparse products, each expert at its own width (multiples of 16; on CUDA what None means for such a
            list of widths); ``torch`` takes PyTorch's own operations alone, on any device, which is also what runs
            where a kernel is missing or not trusted; ``reference`` is plain PyTorch under its own autograd: slow,
            and differentiable twice.
        recompute_pre_activation: save only x for backward, and compute the up projection again there. ``T * K * F``
            numbers less memory (gated: twice that) for a sixth of a training step's products (gated: 22%); on the CPU
            all of forward runs again.
        accumulate_main_grad: backward adds the gradients of the two projections to their ``main_grad``, a float32
            buffer in the parameter's shape (Megatron's ``gradient_accumulation_fusion``), and leaves ``grad`` alone.

    Expert parallelism (no effect without ``ep_group``)
        expert_grad_scale: what backward multiplies the experts' gradients by, which each rank sums over the tokens of
            all W ranks: ``mean``: 1 / W, as if one process averaged the ranks' losses, and as DDP averages the other
            parameters' gradients; ``sum``: 1; ``sqrt_world_size``: 1 / sqrt(W) (fairseq).
        max_rows_received: the static mode, without any wait of the host: the most token rows that a rank receives,
            ``ceil(max_rows_received / W)`` from each rank. What is beyond is dropped and counted, see
            :class:`dmoe.parallel.AllToAllDispatcher`. None: as many as there are.
        wire_dtype: ``fp8`` or ``int8``: tokens travel to their experts as one byte per number and a float32 scale per
            row; results come back in their own dtype. None: so do the tokens.
        wire_backward: the tokens' gradients travel like that, too.
        overlap_degree: into how many chunks each rank's experts are cut, of which one computes while the next one's
            tokens travel. A token that chose experts of several chunks on one rank travels there once for each.
    """

    hidden_size: int
    ffn_hidden_size: int | Sequence[int]
    num_experts: int
    top_k: int = 2

    activation: Activation = "silu"
    gated: bool = True
    bias: Literal["none", "expert", "output"] = "none"
    return_bias: bool = False
    activation_dropout: float = 0.0
    expert_dropout: float = 0.0
    gate_weight_on: GateWeightOn = "output"
    shared_ffn_hidden_size: int | None = None
    shared_expert_gate: bool = False
    init_std: float | None = None

    router: Literal["top_k", "expert_choice", "uniform"] = "top_k"
    causal: bool = True
    allow_future_leak: bool = False
    score_function: Literal["softmax", "sigmoid"] = "softmax"
    softmax_order: Literal["before_topk", "after_topk"] = "before_topk"
    gate_normalization: float | None = None
    normalize_when: Literal["before_drop", "after_drop"] = "before_drop"
    gate_scale: float = 1.0
    router_bias: bool = False
    router_dtype: Literal["float32", "input"] = "float32"
    input_jitter: float = 0.0
    selection_bias: bool = False
    selection_bias_update_rate: float = 1e-3
    num_groups: int = 1
    top_k_groups: int | None = None
    group_score: Literal["top2_sum", "max"] = "top2_sum"

    capacity: int | None = None
    capacity_factor: float | None = None
    min_capacity: int = 0
    capacity_formula: Literal["ceil", "floor", "ceil_per_choice"] = "ceil"
    drop_order: DropOrder = "token_major"

    load_balancing_coefficient: float = 0.01
    router_z_loss_coefficient: float = 0.0
    load_balancing_choices: Literal["all", "first"] = "all"
    load_balancing_over: Literal["local", "sequence", "global"] = "local"
    aux_loss: Literal["explicit", "attached"] = "explicit"
    num_moe_layers: int = 1

    backend: Backend | None = None
    recompute_pre_activation: bool = False
    accumulate_main_grad: bool = False

    expert_grad_scale: Literal["mean", "sum", "sqrt_world_size"] = "mean"
    max_rows_received: int | None = None
    wire_dtype: Literal["fp8", "int8"] | None = None
    wire_backward: bool = False
    overlap_degree: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.ffn_hidden_size, Sequence) and not isinstance(self.ffn_hidden_size, str):
            object.__setattr__(self, "ffn_hidden_size", tuple(self.ffn_hidden_size))
        self._check_types()
        self._check_experts()
        self._check_router()
        self._check_capacity()

    @property
    def ffn_sizes(self) -> tuple[int, ...]:
        """The width of each expert, ``(E,)``."""
        if isinstance(self.ffn_hidden_size, int):
            return (self.ffn_hidden_size,) * self.num_experts
        return tuple(self.ffn_hidden_size)

    @property
    def dropless(self) -> bool:
        """Whether no assignment is ever dropped."""
        return self.capacity is None and (self.capacity_factor is None or self.router == "expert_choice")

    def capacity_for(self, num_tokens: int) -> int | None:
        """The most rows one expert takes from a batch of ``num_tokens``; None when dropless."""
        if self.dropless:
            return None
        if self.capacity is not None:
            return self.capacity
        assert self.capacity_factor is not None
        if self.capacity_formula == "ceil_per_choice":
            rows = self.top_k * math.ceil(self.capacity_factor * num_tokens / self.num_experts)
        else:
            share = self.capacity_factor * num_tokens * self.top_k / self.num_experts
            rows = (math.ceil if self.capacity_formula == "ceil" else math.floor)(share)
        # Not min and max, which would ask a symbolic number of tokens how large it is.
        return smaller(larger(rows, self.min_capacity), num_tokens * self.top_k)

    def _require(self, condition: bool, field: str, allowed: str) -> None:
        if not condition:
            raise ValueError(f"MoEConfig: {field}: expected {allowed}, got {getattr(self, field)!r}")

    def _check_types(self) -> None:
        hints = get_type_hints(type(self))
        for field in fields(self):
            value, hint = getattr(self, field.name), hints[field.name]
            choices = _choices(hint)
            if choices:
                self._require(value in choices, field.name, "one of " + ", ".join(map(repr, choices)))
            elif hint is bool:
                self._require(isinstance(value, bool), field.name, "True or False")
            elif float in (hint, *get_args(hint)):
                number = isinstance(value, int | float) and not isinstance(value, bool)
                self._require(number or (value is None and hint is not float), field.name, "a number")
            elif field.name != "ffn_hidden_size":
                integer = isinstance(value, int) and not isinstance(value, bool)
                self._require(integer or (value is None and hint is not int), field.name, "an integer")

    def _check_experts(self) -> None:
        for name in ("hidden_size", "num_experts", "top_k", "num_moe_layers", "num_groups", "overlap_degree"):
            self._require(getattr(self, name) >= 1, name, "at least 1")
        if isinstance(self.ffn_hidden_size, tuple):
            whole = all(
                isinstance(size, int) and not isinstance(size, bool) and size >= 1 for size in self.ffn_hidden_size
            )
            self._require(
                whole and len(self.ffn_hidden_size) == self.num_experts,
                "ffn_hidden_size",
                f"num_experts = {self.num_experts} widths of at least 1",
            )
        else:
            size = self.ffn_hidden_size
            whole = isinstance(size, int) and not isinstance(size, bool) and size >= 1
            self._require(whole, "ffn_hidden_size", "an integer of at least 1, or a list")
        whole_blocks = all(size % 16 == 0 for size in self.ffn_sizes)
        self._require(
            self.backend != "block_sparse" or whole_blocks,
            "ffn_hidden_size",
            "multiples of 16 with backend='block_sparse'",
        )
        self._require(self.top_k <= self.num_experts, "top_k", f"at most num_experts = {self.num_experts}")
        for name in ("activation_dropout", "expert_dropout", "input_jitter"):
            self._require(0 <= getattr(self, name) < 1, name, "0 <= p < 1")
        shared = self.shared_ffn_hidden_size
        self._require(shared is None or shared >= 1, "shared_ffn_hidden_size", "at least 1, or None")
        self._require(
            not self.shared_expert_gate or shared is not None,
            "shared_expert_gate",
            "False without shared_ffn_hidden_size",
        )
        if self.backend in ("block_sparse", "reference"):
            for name in ("accumulate_main_grad", "recompute_pre_activation"):
                allowed = f"False with backend={self.backend!r}, whose backward has no such option"
                self._require(not getattr(self, name), name, allowed)
        self._require(not self.return_bias or self.bias == "output", "return_bias", "False unless bias='output'")
        self._require(self.init_std is None or self.init_std >= 0, "init_std", "at least 0, or None")

    def _check_router(self) -> None:
        leaks = self.router == "expert_choice" and self.causal and not self.allow_future_leak
        self._require(
            not leaks,
            "router",
            "'top_k' in a causal model, because experts that pick tokens see later ones; pass causal=False for an "
            "encoder, or allow_future_leak=True",
        )
        if self.router == "expert_choice":
            for name in ("selection_bias", "capacity"):
                self._require(
                    not getattr(self, name), name, f"no value with router='expert_choice' ({name} has no meaning there)"
                )
            self._require(self.num_groups == 1, "num_groups", "1 with router='expert_choice'")
            self._require(self.gate_normalization is None, "gate_normalization", "None with router='expert_choice'")
        norm = self.gate_normalization
        self._require(norm is None or 1 <= norm < math.inf, "gate_normalization", "a finite p >= 1, or None")
        sorted_after = self.softmax_order == "after_topk"
        self._require(
            not (sorted_after and self.score_function == "sigmoid"),
            "softmax_order",
            "'before_topk' with sigmoid scores",
        )
        self._require(
            self.num_experts % self.num_groups == 0, "num_groups", f"a divisor of num_experts = {self.num_experts}"
        )
        groups = self.top_k_groups
        self._require(
            groups is None or 1 <= groups <= self.num_groups,
            "top_k_groups",
            f"1 to num_groups = {self.num_groups}, or None",
        )
        reachable = (self.num_experts // self.num_groups) * (self.num_groups if groups is None else groups)
        self._require(self.top_k <= reachable, "top_k", f"at most {reachable}, the experts in top_k_groups groups")
        self._require(self.gate_scale > 0, "gate_scale", "a positive number")

    def _check_capacity(self) -> None:
        self._require(self.capacity is None or self.capacity >= 0, "capacity", "at least 0 rows, or None")
        self._require(
            self.capacity_factor is None or 0 < self.capacity_factor < math.inf,
            "capacity_factor",
            "a positive number, or None",
        )
        both = self.capacity is not None and self.capacity_factor is not None
        self._require(not both, "capacity_factor", f"None when capacity = {self.capacity} is given")
        self._require(self.min_capacity >= 0, "min_capacity", "at least 0")
        bound = self.max_rows_received
        self._require(bound is None or bound >= 0, "max_rows_received", "at least 0, or None")
        self._require(
            not self.wire_backward or self.wire_dtype is not None, "wire_backward", "False without wire_dtype"
        )
        for name in ("load_balancing_coefficient", "router_z_loss_coefficient", "selection_bias_update_rate"):
            self._require(0 <= getattr(self, name) < math.inf, name, "at least 0")


def _choices(hint: Any) -> tuple[Any, ...]:
    """The values a ``Literal`` (or ``Literal | None``) admits; empty for any other type."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    found = tuple(value for part in get_args(hint) if get_origin(part) is Literal for value in get_args(part))
    return (*found, None) if found else ()
