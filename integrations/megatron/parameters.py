"""The parameters of a layer as Megatron wants them: initial values, and marks that its optimizer and DDP look at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dmoe import MoE, MoEConfig
from dmoe.integrations.megatron.flat_biases import axis_of_width, flatten_biases, parameters_by_name
from dmoe.integrations.megatron.refusals import refuse, refuse_placement
from dmoe.integrations.megatron.translate import FLAGS
from dmoe.integrations.naming import by_flags

GRAD_DTYPE = torch.float32
OF_MATRICES = (
    "it works on matrices, and dmoe keeps those of all experts in one parameter, which would be left to Adam",
    "choose adam or sgd, or --moe-impl megatron",
)


@by_flags(FLAGS, "dmoe.integrations.megatron: ")
def build_moe(config: Any, moe_config: MoEConfig, pg_collection: Any, *, with_router: bool = True, **hooks: Any) -> MoE:
    """dmoe's layer over Megatron's process groups, with values and marks.

    Args:
        config: Megatron's ``TransformerConfig``.
        moe_config: what it became, see :func:`dmoe.integrations.megatron.moe_config`.
        pg_collection: Megatron's groups: ``ep``, ``expt_tp``, ``tp``.
        with_router: whether the router is used: if not, no values are drawn for it.
        **hooks: further arguments of :class:`dmoe.MoE`.

    Raises:
        ValueError: experts, or their width, that the ranks cannot share evenly.
    """
    ep, etp = pg_collection.ep, pg_collection.expt_tp
    refuse_placement(config, ep.size())
    alone = ep.size() == etp.size() == 1
    moe = MoE(
        moe_config,
        ep_group=None if alone else ep,
        expert_tp_group=etp if etp.size() > 1 else None,
        dtensor=False,
        device="meta",  # no values yet: one seed of dmoe's own would have to be the same on all ranks
        dtype=config.params_dtype,
        **hooks,
    )
    device = torch.device("cpu") if config.use_cpu_initialization else torch.cuda.current_device()
    moe.to_empty(device=device)
    for buffer in moe.buffers():
        buffer.zero_()
    moe.reset_parameters()
    if config.perform_initialization:
        if with_router:
            _initialize_router(moe.router, config)
        _initialize_experts(moe.experts, config, ep.rank(), etp)
    flatten_biases(moe.experts)
    mark_router(moe.router, config)
    mark_output_bias(moe, config)
    mark_experts(moe.experts, config, ep.size(), etp.size())
    return moe


@torch.no_grad()
def _initialize_router(router: nn.Module, config: Any) -> None:
    """In float32 on the CPU, from the stream that is the same on all ranks, as Megatron's own router."""
    for parameter in router.parameters():
        fresh = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
        config.init_method(fresh)
        parameter.copy_(fresh)


@torch.no_grad()
def _initialize_experts(experts: nn.Module, config: Any, ep_rank: int, etp: Any) -> None:
    """The values that Megatron's own experts get from the same seed, for as many ranks as hold whole experts.

    On the GPU from the stream that differs between expert-parallel ranks. On the CPU every rank draws all experts and
    keeps its own, as Megatron does with the parts of tensor parallelism: values do not depend on the ranks.
    """
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, get_expert_parallel_rng_tracker_name

    for name, parameter in experts.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
    up, down = matrices(experts)
    if not config.use_cpu_initialization:
        with get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name()):
            for expert in range(len(down)):
                config.init_method(up[expert])
                config.output_layer_init_method(down[expert])
        return
    halves, shards = (2 if config.gated_linear_unit else 1), etp.size()
    width, hidden = down.shape[2], down.shape[1]
    mine = range(ep_rank * len(down), (ep_rank + 1) * len(down))
    columns = slice(etp.rank() * width, (etp.rank() + 1) * width)
    for expert in range(config.num_moe_experts):
        whole_up = _drawn(config.init_method, halves * width * shards, hidden)
        whole_down = _drawn(config.output_layer_init_method, hidden, width * shards)
        if expert in mine:
            part = whole_up.view(halves, width * shards, hidden)[:, columns]
            up[expert - mine.start].copy_(part.reshape(halves * width, hidden))
            down[expert - mine.start].copy_(whole_down[:, columns])


def _drawn(init_method: Callable[[Tensor], Any], *shape: int) -> Tensor:
    fresh = torch.empty(shape, dtype=torch.float32, device="cpu")
    init_method(fresh)
    return fresh


def matrices(experts: nn.Module) -> tuple[Tensor, Tensor]:
    """Views of the experts' two projections as Megatron shapes them: ``(E, 2 F or F, H)`` and ``(E, H, F)``."""
    named = dict(experts.named_parameters())
    up = named["gate_up_proj"] if "gate_up_proj" in named else named["up_proj"]
    down = named["down_proj"]
    return up.detach().view(len(down), -1, up.shape[-1]), down.detach()


def mark_router(router: nn.Module, config: Any) -> None:
    """With sequence parallelism each rank's gradient is a part of a sum over tensor-parallel ranks."""
    for parameter in router.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def mark_output_bias(moe: MoE, config: Any) -> None:
    """The layer's one bias, where it has that, gets a part of its gradient on each tensor-parallel rank, too."""
    if moe.output_bias is not None:
        moe.output_bias.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def mark_experts(experts: nn.Module, config: Any, ep_ranks: int, etp_ranks: int) -> None:
    """Say which ranks share an expert's gradient, and that no rank's part is a duplicate of another's.

    ``allreduce`` is False where experts are replicated over other ranks than the rest of the model. Without the
    tensor-parallel attributes the gradient norm leaves out all but the first tensor-parallel rank's experts.
    """
    apart = ep_ranks > 1 or etp_ranks != config.tensor_model_parallel_size
    for name, parameter in parameters_by_name(experts):
        parameter.allreduce = not apart
        f_dim = axis_of_width(name)
        # What all ranks of expert tensor parallelism hold alike counts once.
        parameter.tensor_model_parallel = f_dim is not None or etp_ranks == 1
        parameter.partition_dim = 0 if f_dim is None or parameter.dim() == 1 else f_dim
        parameter.partition_stride = 1


def announce_main_grads(experts: nn.Module) -> None:
    """Tell Megatron's DDP, while backward runs, that the projections' gradients go straight into ``main_grad``.

    Its hooks add ``grad`` to ``main_grad`` unless told otherwise, and insist on a ``grad`` when they overlap their
    communication: one that takes no memory stands in.

    Raises:
        ValueError: buffers that are not float32.
    """
    for name, parameter in parameters_by_name(experts):
        if name.endswith("bias") or not parameter.requires_grad:
            continue
        parameter.grad_added_to_main_grad = True
        if parameter.grad is None:
            parameter.grad = torch.zeros((), dtype=parameter.dtype, device=parameter.device).expand(parameter.shape)


def refuse_optimizers_of_matrices(experts: nn.Module) -> None:
    """Refuse Muon and its like, which take a layer's matrices one by one and leave to Adam what has more dimensions.

    They mark parameters of experts, in every release: that is what tells here, whoever set them up.

    Raises:
        ValueError: such an optimizer has these experts.
    """
    if any(getattr(parameter, "expert_tp", False) for parameter in experts.parameters()):
        refuse("optimizer", "muon or another of matrices", *OF_MATRICES)


def check_main_grads(experts: nn.Module) -> None:
    """Refuse buffers that dmoe cannot add to.

    Raises:
        ValueError: a ``main_grad`` that is not float32.
    """
    for parameter in experts.parameters():
        buffer = getattr(parameter, "main_grad", None)
        if buffer is not None and buffer.dtype != GRAD_DTYPE:
            raise ValueError(
                f"dmoe.integrations.megatron: --gradient-accumulation-fusion: expected gradients in {GRAD_DTYPE}, got "
                f"{buffer.dtype}; add --accumulate-allreduce-grads-in-fp32 or --no-gradient-accumulation-fusion"
            )
