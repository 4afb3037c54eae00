"""Every option of the layer with its default, in one place, validated once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from dmoe.activation_functions import ActivationFunction, read_given
from dmoe.activations import Activation
from dmoe.capacity import CapacityFormula, capacity_rows, round_up
from dmoe.config_checks import check_config
from dmoe.router_family import RouterFamily, family_of
from dmoe.sizes import larger, smaller

GateWeightOn = Literal["output", "activation", "input"]
Backend = Literal["grouped", "block_sparse", "torch", "reference"]
# Those that know codes, of weights and in fp8; and those that know adapters and functions as activations.
CODED_BACKENDS: tuple[Backend, ...] = ("grouped", "torch")
COMPOSED_BACKENDS: tuple[Backend, ...] = (*CODED_BACKENDS, "reference")
DropOrder = Literal[
    "token_major", "choice_major", "batch_prioritized", "gate_weight", "normalized_gate_weight", "random"
]
ExpertCompute = Literal["fp8"]
SavedActivations = Literal["fp8"]
Init = Literal["linear", "switch", "vmoe", "gmoe", "swin_moe", "xavier"]


@dataclass(frozen=True)
class MoEConfig:
    """Options of :class:`dmoe.MoE`. Sizes count features, coefficients and shares are dimensionless.

    Experts
        hidden_size: H, the last dimension of input and output.
        ffn_hidden_size: F, the inner width of each expert; a list gives every expert its own.
        num_experts: E.
        activation: ``silu``, ``gelu`` (exact), ``gelu_tanh``, ``relu``, ``relu_squared`` (Primer, Nemotron) or
            ``sigmoid`` (with a gate the GLU of Dauphin 2017); with a gate also a :class:`dmoe.ClampedSwiGLU` (GPT-OSS,
            DeepSeek-V4) or :class:`dmoe.SoftcappedSwiGLU` (Inkling-2), or such a one as text,
            ``str(dmoe.ClampedSwiGLU())``, or as ``dataclasses.asdict`` makes it, which a file may hold. Either becomes
            the object. Or an elementwise function of a tensor, ``torch.nn.functional.mish`` or one of your own: experts
            compute ``fn(gate) * up``, without a gate ``fn(x)``, and autograd its derivative, on the slower path of
            :mod:`dmoe.activation_functions`; one that computes what a name here does becomes that name.
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
        init_std: standard deviation of normal initial weights; None leaves them to ``init``.
        init: how weights begin without ``init_std``; :mod:`dmoe.initial` has the numbers. ``linear``: as ``nn.Linear``;
            ``switch``: Switch's truncated normal of variance 0.1 / fan_in; ``vmoe``, ``gmoe``, ``swin_moe``: theirs;
            ``xavier``: Glorot's uniform (ParlAI's hash layers).
        frozen_down_bias: expert biases of the down projection stay at zero, untrained (Swin-MoE).

    Router
        top_k: K, experts per token.
        router: who goes where: a family of :mod:`dmoe.routing` with its own options, such as
            ``dmoe.routing.Cosine(dim=256)``, or its name where nothing needs saying: ``top_k``, ``cosine``,
            ``sinkhorn``, ``base``, ``hash``, ``expert_choice``, ``uniform``, or one that you registered. A name becomes
            the family. What follows here is read by more than one of them.
        causal: the model must not see later tokens. Families that look at the whole batch, as Expert Choice does, are
            refused unless ``causal=False`` or ``allow_future_leak=True`` says that this is meant.
        score_function: ``softmax``, ``sigmoid`` (DeepSeek-V3) or ``sqrt_softplus`` (DeepSeek-V4: sqrt(ln(1 + e^x)))
            over the router logits.
        softmax_order: ``before_topk`` (Switch, Megatron's pre-softmax) or ``after_topk`` (Mixtral): over all experts,
            or over the chosen ones only.
        gate_normalization: p of the p-norm that gate weights are divided by; None leaves the scores as they are. With
            K = 1 a normalised weight is always 1 and gives the router no gradient but the losses'. With K = 2 of 32
            experts, 1.0 ended 0.08 bits per byte ahead of None (``examples/ablation.md``).
        normalize_when: ``before_drop`` (a dropped choice keeps its share) or ``after_drop`` (fairseq: the
            survivors share 1).
        gate_scale: factor on the gate weights after normalisation (DeepSeek's routed scaling factor).
        router_bias: learn a bias in the router's linear.
        router_dtype: ``float32``: the router computes in float32 whatever the model's dtype (float64 for float64
            input); ``input``: in the input's dtype.
        router_logit_softcap: logits go through ``c * tanh(logits / c)``, as Gemma 2 caps its own (Gemma Team 2024,
            section 2; Laguna's router); None leaves them as they are.
        input_jitter: in training the router's input is multiplied by U(1 - j, 1 + j), number by number (Switch).
        input_jitter_on: whether only the ``router`` sees it (Switch), or the whole ``layer``, the experts too (Mixtral
            in Transformers).
        selection_bias: choose experts by ``score + bias`` and weigh by the score alone; the bias follows the load
            without a loss (DeepSeek-V3), by :meth:`dmoe.MoE.update_selection_bias` after the optimizer step.
        selection_bias_on: what it is added to for the choice: the ``scores`` (DeepSeek-V3) or the ``logits`` (Kolibri).
        selection_bias_rule: ``sign``: a step towards the mean load (DeepSeek-V3, V4); ``quantile``: to where the last
            batch would have been balanced (Su 2025; Megatron-Core's ``quantile_balancing``), the bias being one of the
            logits then.
        selection_bias_update_rate: how far one step moves it.
        selection_bias_decay: how much of the old bias a quantile update keeps, in [0, 1).
        num_groups, top_k_groups: choose only inside the best ``top_k_groups`` of ``num_groups`` groups of experts.
        group_score: a group's rank: the sum of its two best scores (``top2_sum``, DeepSeek-V3) or its best (``max``,
        V2).

    Capacity (None: dropless, the default)
        capacity: the most rows one expert takes.
        capacity_factor: the same relative to an even share ``T * K / E``. For Expert Choice: tokens per expert. 0: as
            much as the busiest expert needs, which drops nothing; negative: as much, but at most its absolute value
            (Tutel).
        eval_capacity_factor: instead of ``capacity_factor`` in evaluation (DeepSpeed); None is the same.
        eval_capacity_fraction: rows as a share of all tokens, ``ceil(fraction * T)``, instead of every other capacity
            in evaluation (fairseq, NLLB); None is the same.
        min_capacity: never fewer than this.
        capacity_multiple_of: what a factor gives is rounded up to a multiple of this (V-MoE, Tutel's alignment).
        capacity_formula: ``ceil``: ceil(factor * T * K / E) (V-MoE, Switch); ``round``: the same, rounded half to even
            (V-MoE); ``ceil_of_share``: ceil(factor * (T * K / E)), which divides first (Megatron-Core); ``floor``: the
            same, floored (MegaBlocks); ``ceil_float32``: ceil(K * factor * (T / E)) in float32 (DeepSpeed);
            ``ceil_per_choice``: K * ceil(factor * T / E) (fairseq, GShard); ``floor_per_choice``:
            K * floor(factor * ceil(T / E)) (Tutel).
        token_groups: capacities are counted, and local losses computed, inside so many groups of consecutive tokens, of
            equal size (GShard's G, V-MoE); ``sequence``: inside each sequence, the last of x's leading dimensions
            (Switch in Transformers). Experts that choose do so inside each group.
        capacity_over: whose tokens share an expert's capacity: those of this rank (``local``: every system named here),
            or of all ranks of ``ep_group`` (``group``), in the order of the ranks, each with equally many.
        drop_order: who is dropped. ``token_major`` (MegaBlocks): later tokens; ``choice_major`` (GShard, fairseq):
            second choices before first ones; ``batch_prioritized`` (V-MoE): tokens with a small largest score;
            ``gate_weight`` (DeepSpeed's ``probs``): the assignments with the smallest scores;
            ``normalized_gate_weight`` (Megatron-Core's ``probs``): those with the smallest weights, normalised;
            ``random``: any, drawn anew each time, in evaluation as well (DeepSpeed's random token selection).

    Losses
        load_balancing_coefficient, router_z_loss_coefficient: factors of the two losses; 0 switches one off.
        losses: every loss by name with its coefficient, instead of these two: ``{"importance": 5e-3, "load": 5e-3}``.
            Names are ``load_balancing``, ``sequence`` and ``global`` (the same over a rank's batch, each sequence, all
            ranks), ``z``, ``importance`` and ``load`` (V-MoE), ``load_importance`` (Tutel), and those that a family of
            your own puts into :attr:`dmoe.Routing.losses`. The formulas are in :mod:`dmoe.losses`.
        load_balancing_choices: count all K choices (``all``), only the ``first`` (GShard, fairseq), or the ``plain`` K
            best scores, without the bias and the groups that choose (Megatron-Core).
        load_balancing_over: what is to be balanced: the ``local`` batch of a rank (Switch, GShard); each ``sequence``,
            the last of x's leading dimensions (DeepSeek-V3); or the ``global`` batch of all ranks of the layer's
            ``loss_group`` (Megatron-Core's ``global_aux_loss``), whose counts are summed without the host waiting; all
            of these train, or none does, for a rank in evaluation has no loss to count for: those that share experts
            are told where they differ, but not in later forwards of the static mode.
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
        expert_compute: ``fp8``: the experts' products, the shared one's too, multiply e4m3 codes, of rows with a scale
            each and of weights with one for each 128 x 128 block; gradients of weights, and the weights themselves,
            stay in their dtype. ``docs/fp8.md`` has the error, measured. None: all products are in x's dtype.
        saved_activations: ``fp8``: what experts keep for backward, their input and the pre-activation, are such codes:
            half of bfloat16's bytes. None: they are in x's dtype.
        accumulate_main_grad: backward adds the gradients of the two projections to their ``main_grad``, a float32
            buffer in the parameter's shape (Megatron's ``gradient_accumulation_fusion``), and leaves ``grad`` alone.
        batch_invariant: a token's router logits, choices, output and gradients have the same bits whatever else is in
            the batch and whichever row it is: a prefill's are a decode step's, and a training forward's those of the
            sampler. ``docs/reinforcement.md`` has what is promised, what it costs, and what is refused: it goes with
            the family ``top_k``, without drops, dropout and noise, and on the compiled CPU kernels alone.

    Expert parallelism (no effect without ``ep_group``)
        expert_grad_scale: what backward multiplies the experts' gradients by, which each rank sums over the tokens of
            all W ranks: ``mean``: 1 / W, as if one process averaged the ranks' losses, and as DDP averages the other
            parameters' gradients; ``sum``: 1; ``sqrt_world_size``: 1 / sqrt(W) (fairseq).
        transport: how rows travel: ``all_to_all`` of torch.distributed; ``deep_ep``, the package of that name, which
            plans and counts on the GPU (bfloat16, see :class:`dmoe.parallel.DeepEPDispatcher`); ``symmetric_memory``,
            torch's, over NVSHMEM (see :class:`dmoe.parallel.SymmetricDispatcher`). The results are the same.
        max_rows_received: the static mode, without any wait of the host: the most token rows that a rank receives,
            ``ceil(max_rows_received / W)`` from each rank. What is beyond is dropped and counted, see
            :class:`dmoe.parallel.AllToAllDispatcher`. None: as many as there are.
        on_overflow: what is beyond ``max_rows_received`` is dropped (``drop``); or nothing ever is (``rerun``): the
            layer is static inside :func:`dmoe.parallel.exact_step` alone, which does a step again, without the bound,
            where any layer of any rank had no room.
        wire_dtype: ``fp8`` or ``int8``: tokens travel to their experts as one byte per number and a float32 scale per
            row; results come back in their own dtype. None: so do the tokens.
        wire_backward: the tokens' gradients travel like that, too.
        rows_between_nodes: with ``ep_levels``, whether a token crosses to another node ``once_per_rank`` of its experts
            there, inside the node first (Tutel's 2DH all-to-all), or ``once_per_node`` (DeepEP), and inside the node
            then, for a second exchange of counts.
        join_choices: whether a token's gate weights and expert ids travel in one exchange with it (True), or before it
            (False), so that the plan is made while it is under way. None: with it where a rank has 63 others or more
            to talk to, as messages then cost more than a copy of the rows.
        balance_ranks: ``replicate``: the hottest experts of ranks that have more rows than the mean are copied for the
            one forward to ranks that have fewer, with a share of their rows. Nothing is dropped; output, gradients and
            checkpoints are as without it. None: an expert's rows are computed where it lives.
        max_expert_copies: copies that a rank hosts at a time, at most (static mode: experts that it lends).
        balance_slack: no rank is to compute more than ``1 + balance_slack`` times the mean, as far as copies allow.
        min_rows_per_copy: no copy for fewer rows than this; None: than pay for the weights' way, as
            :func:`dmoe.parallel.rows_that_pay` reckons.
        overlap_degree: into how many chunks each rank's experts are cut, of which one computes while the next one's
            tokens travel. A token that chose experts of several chunks on one rank travels there once for each.
    """

    hidden_size: int
    ffn_hidden_size: int | Sequence[int]
    num_experts: int
    top_k: int = 2

    activation: Activation | ActivationFunction = "silu"
    gated: bool = True
    bias: Literal["none", "expert", "output"] = "none"
    return_bias: bool = False
    activation_dropout: float = 0.0
    expert_dropout: float = 0.0
    gate_weight_on: GateWeightOn = "output"
    shared_ffn_hidden_size: int | None = None
    shared_expert_gate: bool = False
    init_std: float | None = None
    init: Init = "linear"
    frozen_down_bias: bool = False

    router: str | RouterFamily = "top_k"
    causal: bool = True
    allow_future_leak: bool = False
    score_function: Literal["softmax", "sigmoid", "sqrt_softplus"] = "softmax"
    softmax_order: Literal["before_topk", "after_topk"] = "before_topk"
    gate_normalization: float | None = None
    normalize_when: Literal["before_drop", "after_drop"] = "before_drop"
    gate_scale: float = 1.0
    router_bias: bool = False
    router_dtype: Literal["float32", "input"] = "float32"
    router_logit_softcap: float | None = None
    input_jitter: float = 0.0
    input_jitter_on: Literal["router", "layer"] = "router"
    selection_bias: bool = False
    selection_bias_on: Literal["scores", "logits"] = "scores"
    selection_bias_rule: Literal["sign", "quantile"] = "sign"
    selection_bias_update_rate: float = 1e-3
    selection_bias_decay: float = 0.0
    num_groups: int = 1
    top_k_groups: int | None = None
    group_score: Literal["top2_sum", "max"] = "top2_sum"

    capacity: int | None = None
    capacity_factor: float | None = None
    eval_capacity_factor: float | None = None
    eval_capacity_fraction: float | None = None
    min_capacity: int = 0
    capacity_multiple_of: int = 1
    capacity_formula: CapacityFormula = "ceil"
    token_groups: int | Literal["sequence"] = 1
    capacity_over: Literal["local", "group"] = "local"
    drop_order: DropOrder = "token_major"

    load_balancing_coefficient: float = 0.01
    router_z_loss_coefficient: float = 0.0
    losses: Mapping[str, float] | tuple[tuple[str, float], ...] | None = None
    load_balancing_choices: Literal["all", "first", "plain"] = "all"
    load_balancing_over: Literal["local", "sequence", "global"] = "local"
    aux_loss: Literal["explicit", "attached"] = "explicit"
    num_moe_layers: int = 1

    backend: Backend | None = None
    recompute_pre_activation: bool = False
    expert_compute: ExpertCompute | None = None
    saved_activations: SavedActivations | None = None
    accumulate_main_grad: bool = False
    batch_invariant: bool = False

    expert_grad_scale: Literal["mean", "sum", "sqrt_world_size"] = "mean"
    transport: Literal["all_to_all", "deep_ep", "symmetric_memory"] = "all_to_all"
    max_rows_received: int | None = None
    on_overflow: Literal["drop", "rerun"] = "drop"
    wire_dtype: Literal["fp8", "int8"] | None = None
    wire_backward: bool = False
    rows_between_nodes: Literal["once_per_rank", "once_per_node"] = "once_per_rank"
    join_choices: bool | None = None
    balance_ranks: Literal["replicate"] | None = None
    max_expert_copies: int = 2
    balance_slack: float = 0.05
    min_rows_per_copy: int | None = None
    overlap_degree: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.ffn_hidden_size, Sequence) and not isinstance(self.ffn_hidden_size, str):
            object.__setattr__(self, "ffn_hidden_size", tuple(self.ffn_hidden_size))
        if isinstance(self.losses, Mapping):
            object.__setattr__(self, "losses", tuple(self.losses.items()))
        object.__setattr__(self, "activation", read_given(self.activation, "MoEConfig", self.gated))
        object.__setattr__(self, "router", family_of(self.router))
        check_config(self)
        # What forwards ask for again and again is settled here.
        given = (self.capacity, self.capacity_factor or None, self.eval_capacity_factor or None)
        dropless = given == (None,) * 3 and self.eval_capacity_fraction is None
        object.__setattr__(self, "_dropless", self.family.experts_choose or dropless)
        object.__setattr__(self, "_coefficients", self._loss_terms())
        object.__setattr__(self, "_loss_names", tuple(name for name, _ in self.coefficients))
        self.family.check(self)

    @property
    def family(self) -> RouterFamily:
        """``router``, which is no longer a name."""
        assert isinstance(self.router, RouterFamily)
        return self.router

    @property
    def ffn_sizes(self) -> tuple[int, ...]:
        """The width of each expert, ``(E,)``."""
        if isinstance(self.ffn_hidden_size, int):
            return (self.ffn_hidden_size,) * self.num_experts
        return tuple(self.ffn_hidden_size)

    @property
    def dropless(self) -> bool:
        """Whether no assignment is ever dropped."""
        dropless: bool = self._dropless  # type: ignore[attr-defined]
        return dropless

    def capacity_for(self, num_tokens: int, training: bool = True) -> int | None:
        """The most rows one expert takes from ``num_tokens`` (of one group, if there are any); None drops nothing."""
        if self.dropless:
            return None
        most = num_tokens * self.top_k
        if not training and self.eval_capacity_fraction is not None:
            return smaller(math.ceil(self.eval_capacity_fraction * num_tokens), most)
        factor = self.capacity_factor
        if not training and self.eval_capacity_factor is not None:
            factor = self.eval_capacity_factor
        elif self.capacity is not None:
            return self.capacity
        if not factor:
            return None
        rows = capacity_rows(self.capacity_formula, abs(factor), num_tokens, self.top_k, self.num_experts)
        # Not min and max, which would ask a symbolic number of tokens how large it is.
        return smaller(round_up(larger(rows, self.min_capacity), self.capacity_multiple_of), most)

    @property
    def coefficients(self) -> tuple[tuple[str, float], ...]:
        """Every loss that is on: its name, and its coefficient."""
        terms: tuple[tuple[str, float], ...] = self._coefficients  # type: ignore[attr-defined]
        return terms

    def has_loss(self, *names: str) -> bool:
        """Whether any of these losses is on."""
        there: tuple[str, ...] = self._loss_names  # type: ignore[attr-defined]
        return any(map(there.__contains__, names))

    def _loss_terms(self) -> tuple[tuple[str, float], ...]:
        balance = "load_balancing" if self.load_balancing_over == "local" else self.load_balancing_over
        given: tuple[tuple[str, float], ...] = (
            (balance, self.load_balancing_coefficient),
            ("z", self.router_z_loss_coefficient),
        )
        if self.losses is not None:
            assert isinstance(self.losses, tuple)
            given = self.losses
        return tuple((name, coefficient) for name, coefficient in given if coefficient)
