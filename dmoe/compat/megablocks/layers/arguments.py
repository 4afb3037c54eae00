"""``Arguments``: MegaBlocks' options with its names and defaults; what dmoe cannot do is refused here."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmoe.compat.megablocks.layers import mpu

InitFn = Callable[[Tensor], Any]

DEFAULT_ACTIVATION_FN: Callable[[Tensor], Tensor] = partial(F.gelu, approximate="tanh")
_NORMAL: InitFn = partial(nn.init.normal_, mean=0.0, std=0.02)


def _current_device() -> int | torch.device:
    return torch.cuda.current_device() if torch.cuda.is_available() else torch.device("cpu")


@dataclass
class Arguments:
    """Options of :class:`~dmoe.compat.megablocks.MoE` and :class:`~dmoe.compat.megablocks.dMoE`.

    They are checked when this is made, and again when a layer is made of it.

    Model
        hidden_size: H.
        ffn_hidden_size: F, of one expert; any size, also where MegaBlocks wants a multiple of 128.
        num_layers: MoE layers of the model: the load-balancing loss is divided by it.
        bias: one ``(H,)`` bias for the layer, and biases in a shared expert.
        return_bias: hand the layer's bias back beside the result instead of adding it.
        activation_fn: elementwise, on tensors. ``F.gelu`` (exact or tanh), ``F.silu`` and ``F.relu``, or their modules,
            run inside dmoe's fused operation; any other callable is composed of dmoe's grouped products.

    MoE
        moe_num_experts: E.
        moe_top_k: K.
        moe_capacity_factor: ``MoE`` only: an expert takes ``int(factor * K * T / E)`` rows, all where that is 0.
        moe_normalize_expert_weights: p >= 1 of the p-norm that a token's gate weights are divided by; None or 0: not.
        moe_loss_weight: factor of the load-balancing loss; 0 saves nothing for it.
        moe_jitter_eps: in training the router's input is multiplied by U(1 - eps, 1 + eps).
        moe_lbl_in_fp32: return the load-balancing loss in float32 instead of the scores' dtype. It is summed in
            float32 either way: half precision cannot count tokens.
        uniform_expert_assignment: choice k of token t goes to expert ``(t * K + k) % E``, to measure speed.
        moe_zloss_weight: factor of the router's z-loss; 0 saves nothing for it.
        moe_zloss_in_fp32: compute the z-loss in float32.

    Computation
        memory_optimized_mlp: either way backward keeps the input and the pre-activation, which is what this buys there.
        mlp_type: ``mlp``, or ``glu`` (``dMoE`` only).
        mlp_impl: ``grouped`` or ``sparse``: the same experts, run by dmoe's grouped products.
        fp16, bf16: dtype of the parameters; fp16 comes first, both False is torch's default dtype.
        device: of the parameters; the current CUDA device, or the CPU without one.
        init_method: called on the router's ``(E, H)`` and on ``(E, F, H)`` weights, to fill them.
        output_layer_init_method: the same for the second projection.

    Shared expert
        shared_expert: add an expert that every token takes.
        fc_cls, fc_kwargs: class of its linears, and keywords for them.
        remat_act_fn: changes nothing, as there.
        shared_expert_hidden_size: its width; None for ``ffn_hidden_size``.
        shared_expert_weighted_sum: weigh it 1 and the routed experts K, of K + 1.

    Parallelism
        moe_expert_model_parallelism: experts are spread over ranks, each of which brings tokens of its own: see
            :mod:`.mpu` for who holds what, and :mod:`.expert_parallel` for how tokens get there. Every rank seeds
            PyTorch's default generator alike before it builds a layer.
        expert_parallel_group: those ranks, a process group or a ``DeviceMesh`` of one dimension; None is all.
        pipeline_model_parallel_size: stages that the model is cut into: ``num_layers`` divided by it are the layers of
            which one stage's load-balancing loss is made.
        num_layers_per_virtual_pipeline_stage: how many that are where a stage holds several chunks of the model; a
            loss is then that of one chunk.
        moe_weight_parallelism: of MegaBlocks before 0.6, ``dMoE`` only: ranks hold equal parts of the rows of all
            experts' weights, which each forward brings together; gradients are means over the ranks.
        weight_parallel_group: those ranks; None is all.

    Refused unless left alone
        quantize_inputs_num_bits, quantize_rematerialize_num_bits, quantize_scatter_num_bits: of older MegaBlocks.
    """

    hidden_size: int = 1024
    ffn_hidden_size: int = 4096
    num_layers: int = 1
    bias: bool = True
    return_bias: bool = True
    activation_fn: Callable[[Tensor], Tensor] | None = DEFAULT_ACTIVATION_FN

    moe_num_experts: int = 1
    moe_top_k: int = 1
    moe_capacity_factor: float = 1
    moe_normalize_expert_weights: float | None = None
    moe_loss_weight: float = 0.1
    moe_jitter_eps: float | None = None
    moe_lbl_in_fp32: bool = False

    moe_expert_model_parallelism: bool = False
    expert_parallel_group: Any = None
    pipeline_model_parallel_size: int = 1
    num_layers_per_virtual_pipeline_stage: int | None = None

    memory_optimized_mlp: bool = False
    mlp_type: str = "mlp"
    mlp_impl: str = "grouped"

    fp16: bool = True
    bf16: bool = False
    device: int | str | torch.device = field(default_factory=_current_device)
    init_method: InitFn = _NORMAL
    output_layer_init_method: InitFn = _NORMAL

    uniform_expert_assignment: bool = False

    shared_expert: bool = False
    fc_cls: Any = nn.Linear
    fc_kwargs: dict[str, Any] = field(default_factory=dict)
    remat_act_fn: bool = True
    shared_expert_hidden_size: int | None = None
    shared_expert_weighted_sum: bool = False

    moe_zloss_weight: float = 0
    moe_zloss_in_fp32: bool = False

    moe_weight_parallelism: bool = False
    weight_parallel_group: Any = None
    quantize_inputs_num_bits: int = -1
    quantize_rematerialize_num_bits: int = -1
    quantize_scatter_num_bits: int = -1

    def __post_init__(self) -> None:
        if self.shared_expert_hidden_size is None:
            self.shared_expert_hidden_size = self.ffn_hidden_size
        self.check()

    def check(self) -> None:
        """Refuse what dmoe does not do, and values without a meaning.

        Raises:
            NotImplementedError: an option of MegaBlocks that dmoe lacks.
            ValueError: a value that no option takes, or experts that cannot be spread over the ranks.
            TypeError: a group of ranks that is none, or that this rank does not belong to.
        """
        for name in ("quantize_inputs_num_bits", "quantize_rematerialize_num_bits", "quantize_scatter_num_bits"):
            if getattr(self, name) != -1:
                raise NotImplementedError(
                    f"Arguments: {name}: expected -1, got {getattr(self, name)!r}: dmoe does not quantize what it saves"
                )

        def require(condition: bool, name: str, allowed: str) -> None:
            if not condition:
                raise ValueError(f"Arguments: {name}: expected {allowed}, got {getattr(self, name)!r}")

        sizes = ("hidden_size", "ffn_hidden_size", "num_layers", "moe_num_experts", "pipeline_model_parallel_size")
        for name in (*sizes, "moe_top_k", "shared_expert_hidden_size"):
            require(isinstance(getattr(self, name), int), name, "an integer")
        for name in sizes:
            require(getattr(self, name) >= 1, name, "at least 1")
        require(
            1 <= self.moe_top_k <= self.moe_num_experts,
            "moe_top_k",
            f"1 to moe_num_experts = {self.moe_num_experts}",
        )
        require(0 <= self.moe_capacity_factor < math.inf, "moe_capacity_factor", "a number of at least 0")
        norm = self.moe_normalize_expert_weights
        require(not norm or 1 <= norm < math.inf, "moe_normalize_expert_weights", "a finite p >= 1, or None")
        eps = self.moe_jitter_eps
        require(eps is None or 0 <= eps < math.inf, "moe_jitter_eps", "a number of at least 0, or None")
        for name in ("moe_loss_weight", "moe_zloss_weight"):
            require(0 <= getattr(self, name) < math.inf, name, "a number of at least 0")
        require(callable(self.activation_fn), "activation_fn", "a function of a tensor")
        for name in ("init_method", "output_layer_init_method"):
            require(callable(getattr(self, name)), name, "a function that fills a tensor")
        require(self.mlp_type in ("mlp", "glu"), "mlp_type", "'mlp' or 'glu'")
        require(self.mlp_impl in ("grouped", "sparse"), "mlp_impl", "'grouped' or 'sparse'")
        shared = self.shared_expert_hidden_size
        require(shared is not None and shared >= 1, "shared_expert_hidden_size", "at least 1, or None")
        name, layers = "num_layers_per_virtual_pipeline_stage", self.num_layers_per_virtual_pipeline_stage
        require(layers is None or (isinstance(layers, int) and layers >= 1), name, "an integer of at least 1, or None")
        ranks = mpu.get_weight_parallel_world_size(self)
        if ranks > 1 and mpu.get_expert_parallel_world_size(self) > 1:
            raise NotImplementedError(
                "Arguments: moe_weight_parallelism: expected False, or one rank, beside moe_expert_model_parallelism "
                f"over more than one, got {self.moe_weight_parallelism} over {ranks} ranks: shard each rank's experts "
                "with FSDP2 over the ranks that hold the same ones"
            )
        mpu.rows_per_rank(self)  # says so where ranks do not divide the experts

    def __deepcopy__(self, memo: dict[int, Any]) -> Arguments:
        """The same groups: a copy of a layer talks to the same ranks, and a process group cannot be copied."""
        for group in (self.expert_parallel_group, self.weight_parallel_group):
            memo[id(group)] = group
        copied = copy.copy(self)
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied


def from_megatron(megatron_args: Any) -> Arguments:
    """Arguments of the attributes that another object, such as Megatron's arguments, has under the same names."""
    names = [option.name for option in fields(Arguments) if hasattr(megatron_args, option.name)]
    return Arguments(**{name: getattr(megatron_args, name) for name in names})
