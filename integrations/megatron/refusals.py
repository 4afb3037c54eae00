"""Options of Megatron that dmoe does not carry: each is refused with a sentence, and none is ignored.

Options that only choose between implementations of the same values (``moe_grouped_gemm``, ``moe_permute_fusion``,
``moe_router_fusion``, the all-gather and all-to-all dispatchers) are accepted: dmoe is another implementation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn


def refuse(option: str, value: Any, reason: str, way_out: str) -> NoReturn:
    """Raise the sentence that names a flag, why dmoe does not carry it, and what to do.

    Raises:
        ValueError: always.
    """
    flag = _FLAGS.get(option, "--" + option.replace("_", "-"))
    raise ValueError(f"dmoe.integrations.megatron: {flag} ({option}={value!r}): {reason}; {way_out}")


class _Refusal(NamedTuple):
    """One option: which values are refused, why, and what to do instead."""

    option: str
    refused: Callable[[Any], bool]
    reason: str
    way_out: str = "leave it out, or choose --moe-impl megatron"


_FLAGS = {
    "fp8": "--fp8-format",
    "fp4": "--fp4-format",
    "moe_router_load_balancing_type": "--moe-router-load-balancing-type",
    "activation_func": "activation function",
    "overlap_moe_expert_parallel_comm": "--overlap-moe-expert-parallel-comm",
    "glu_linear_offset": "--glu-linear-offset",
}


def _on(value: Any) -> bool:
    return bool(value)


def _given(value: Any) -> bool:
    return value is not None


def _kinds(value: Any) -> set[str]:
    return {value} if isinstance(value, str) else set(value or ())


LOSSES = ("aux_loss", "seq_aux_loss", "global_aux_loss")
_BALANCED = ("sinkhorn", "quantile_balancing")  # by the choice itself, and never beside a loss
_INSIDE = "it works on the insides of Megatron's own MoE layer, which is not there"
_REFUSALS = (
    _Refusal("fp8", _on, "dmoe's experts compute in the parameters' dtype"),
    _Refusal("fp4", _on, "dmoe's experts compute in the parameters' dtype"),
    _Refusal(
        "moe_router_load_balancing_type",
        lambda value: value not in _BALANCED and bool(_kinds(value) - {"none", *LOSSES}),
        "dmoe's router balances by losses, by --moe-router-enable-expert-bias, or by sinkhorn or quantile_balancing "
        "alone",
        "choose aux_loss, seq_aux_loss, global_aux_loss, none, or one of these two",
    ),
    _Refusal(
        "moe_router_score_function",
        lambda value: value not in ("softmax", "sigmoid", "sqrtsoftplus"),
        "dmoe's router has softmax, sigmoid and sqrtsoftplus scores",
        "choose one of these",
    ),
    _Refusal("moe_router_dtype", lambda value: value == "fp64", "dmoe's router computes in float32", "choose fp32"),
    _Refusal("moe_enable_routing_replay", _on, "dmoe's router has no recorder", "leave it out"),
    _Refusal("moe_router_topk_limited_devices", _given, "Megatron no longer has it", "use --moe-router-num-groups"),
    _Refusal("moe_router_padding_for_quantization", _on, "dmoe never pads tokens", "leave it out"),
    _Refusal("moe_router_padding_for_fp8", _on, "dmoe never pads tokens", "leave it out"),
    _Refusal("moe_router_force_biased", _given, "dmoe's router has no random bias", "leave it out"),
    _Refusal("moe_pad_expert_input_to_capacity", _on, "dmoe never pads tokens", "leave it out"),
    _Refusal("moe_expert_rank_capacity_factor", _given, "dmoe drops by expert, not by rank", "leave it out"),
    _Refusal("moe_token_dropping", _on, "Megatron itself has not built it", "use --moe-expert-capacity-factor"),
    _Refusal("moe_latent_size", _on, "dmoe's experts take the hidden size"),
    _Refusal(
        "moe_token_dispatcher_type",
        lambda value: value not in ("alltoall", "allgather"),
        "dmoe has its own dispatcher, over torch.distributed",
        "choose alltoall, which dmoe replaces",
    ),
    _Refusal("moe_enable_deepep", _on, "dmoe has its own dispatcher, over torch.distributed", "leave it out"),
    _Refusal("moe_paged_stash", _on, _INSIDE),
    _Refusal("moe_single_grouped_weight", _on, _INSIDE),
    _Refusal("moe_single_grouped_bias", _on, _INSIDE),
    _Refusal("moe_mlp_glu_interleave_size", _given, "dmoe keeps gate and up apart"),
    _Refusal("use_transformer_engine_op_fuser", _on, _INSIDE),
    _Refusal("activation_func_clamp_value", _given, "it is not translated into a dmoe.ClampedSwiGLU"),
    _Refusal("glu_linear_offset", _on, "it is not translated into a dmoe.ClampedSwiGLU"),
    _Refusal("activation_func_fp8_input_store", _on, "dmoe saves the activation's input in its own dtype"),
    _Refusal("overlap_moe_expert_parallel_comm", _on, _INSIDE, "use --moe-dmoe-overlap-degree instead"),
    _Refusal("overlap_dispatch_backward_with_experts_wgrad", _on, _INSIDE, "use --moe-dmoe-overlap-degree instead"),
    _Refusal("delay_wgrad_compute", _on, "dmoe computes weight gradients with the others"),
    _Refusal("enable_cuda_graph", _on, "Megatron would capture dmoe's layer as a dense one", "leave it out"),
    _Refusal("external_cuda_graph", _on, "Megatron would capture dmoe's layer as a dense one", "leave it out"),
    _Refusal("init_model_with_meta_device", _on, "dmoe's parameters get their values when they are made"),
    _Refusal("use_kitchen", _on, _INSIDE),
    _Refusal(
        "transformer_impl",
        lambda value: value == "inference_optimized",
        "dmoe's layer has no inference kernels of Megatron's",
        "choose transformer_engine or local",
    ),
    _Refusal(
        "offload_modules",
        lambda value: bool({"expert_fc1", "moe_act"} & set(value or ())),
        _INSIDE,
        "leave out expert_fc1 and moe_act",
    ),
)
_ROUTER_AND_DISPATCHER = {
    "moe_router_load_balancing_type",
    "moe_router_score_function",
    "moe_router_dtype",
    "moe_enable_routing_replay",
    "moe_router_topk_limited_devices",
    "moe_router_force_biased",
    "moe_pad_expert_input_to_capacity",
    "moe_expert_rank_capacity_factor",
    "moe_token_dropping",
    "moe_token_dispatcher_type",
    "moe_enable_deepep",
    "enable_cuda_graph",
    "external_cuda_graph",
}


def refuse_uncarried(config: Any, *, experts_only: bool = False) -> None:
    """Refuse what dmoe does not carry of a ``TransformerConfig``.

    Args:
        config: Megatron's.
        experts_only: whether router and dispatcher are Megatron's own: what concerns them is then its business.

    Raises:
        ValueError: the first such option.
    """
    if not config.num_moe_experts:
        refuse("num_moe_experts", config.num_moe_experts, "a MoE layer needs experts", "give --num-experts")
    for option, refused, reason, way_out in _REFUSALS:
        value = getattr(config, option, None)
        if refused(value) and not (experts_only and option in _ROUTER_AND_DISPATCHER):
            refuse(option, value, reason, way_out)
    if not experts_only:
        _refuse_beside_balanced_choices(config)
        _refuse_cuda_graphs(config)


def _refuse_beside_balanced_choices(config: Any) -> None:
    kind = config.moe_router_load_balancing_type
    if kind not in _BALANCED:
        return
    if config.moe_aux_loss_coeff:
        refuse("moe_aux_loss_coeff", config.moe_aux_loss_coeff, f"{kind} balances without a loss", "set it to 0")
    if config.moe_router_enable_expert_bias:
        refuse("moe_router_enable_expert_bias", True, f"{kind} does not choose by it", "leave it out")
    if kind == "sinkhorn":
        return
    if not hasattr(config, "moe_router_quantile_balancing_ema"):
        reason = "this megatron-core has no step that would move its bias"
        refuse("moe_router_load_balancing_type", kind, reason, "install 0.19")
    if config.tensor_model_parallel_size * config.context_parallel_size > 1:
        refuse(
            "moe_router_load_balancing_type",
            kind,
            "Megatron finds the quantile of all tensor- and context-parallel ranks' tokens, and dmoe that of one's own",
            "use expert, data and pipeline parallelism alone, or choose --moe-impl megatron",
        )


def _refuse_cuda_graphs(config: Any) -> None:
    kind = getattr(config, "cuda_graph_impl", None)
    if kind in (None, "none"):
        return
    parts = getattr(config, "cuda_graph_modules", None) or getattr(config, "cuda_graph_scope", None)
    parts = [parts] if isinstance(parts, str) else list(parts or ())
    if {getattr(part, "name", part) for part in parts} != {"attn"}:
        refuse(
            "cuda_graph_impl",
            kind,
            "Megatron would capture dmoe's layer as a dense one",
            "leave it out, or capture attention alone (--cuda-graph-scope attn, or --cuda-graph-modules attn)",
        )


def refuse_placement(config: Any, ep_ranks: int) -> None:
    """Refuse experts that the ranks cannot share evenly.

    Raises:
        ValueError: E is no multiple of the expert-parallel ranks.
    """
    if config.num_moe_experts % ep_ranks:
        raise ValueError(
            f"dmoe.integrations.megatron: --num-experts {config.num_moe_experts}: expected a multiple of "
            f"--expert-model-parallel-size {ep_ranks}; change one of the two"
        )
