"""Experts that begin as copies of a dense block (Komatsuzaki et al. 2023, "Sparse Upcycling")."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dmoe.config import MoEConfig
from dmoe.dense_copies import perturb as perturbed
from dmoe.dense_ffn import DenseFFN
from dmoe.expert_init import draw_initial_seed, expert_generator
from dmoe.experts import Experts
from dmoe.layer import MoE


def check_upcycle(name: str, ffn: DenseFFN, config: MoEConfig) -> None:
    """Refuse options under which the experts' weighted sum is not the dense block.

    Raises:
        ValueError: naming the block and the option.
    """
    weights_sum_to_1 = config.gate_normalization == 1 or config.family.weights_sum_to_1
    if config.softmax_order == "after_topk" and config.gate_normalization is None:
        weights_sum_to_1 = True
    on_sum = config.gate_weight_on == "output" or (config.gate_weight_on == "activation" and ffn.down.bias is None)
    up_has_bias = ffn.up.bias is not None or (ffn.gate is not None and ffn.gate.bias is not None)
    kept = {"expert": True, "output": not up_has_bias, "none": not ffn.has_bias}[config.bias]
    required: list[tuple[str, bool, str]] = [
        ("ffn_hidden_size", config.ffn_hidden_size == ffn.ffn_hidden_size, f"the dense block's {ffn.ffn_hidden_size}"),
        ("activation", config.activation == ffn.activation, f"the dense block's {ffn.activation!r}"),
        ("gated", config.gated == ffn.gated, f"the dense block's {ffn.gated}"),
        ("bias", kept, "'expert', to hold the dense block's biases"),
        ("router", not config.family.experts_choose, "'top_k': experts that pick tokens leave some out"),
        ("gate_normalization", weights_sum_to_1, "1.0, so that gate weights sum to 1"),
        ("gate_scale", config.gate_scale == 1, "1, so that gate weights sum to 1"),
        ("gate_weight_on", on_sum, "'output', so that the weighted sum of equal experts is one of them"),
        (
            "shared_ffn_hidden_size",
            config.shared_ffn_hidden_size is None,
            "None: a shared expert adds to the dense output",
        ),
    ]
    for option, holds, allowed in required:
        if not holds:
            raise ValueError(
                f"replace_ffn: {name!r}: {option}: with upcycle=True expected {allowed}; got "
                f"{getattr(config, option)!r}"
            )
    if ffn.down_proj().is_meta:
        raise ValueError(
            f"replace_ffn: {name!r}: expected weights to copy with upcycle=True, got a module on the meta device"
        )


def build_moe(ffn: DenseFFN, config: MoEConfig, *, upcycle: bool, perturb: float) -> MoE:
    """A layer where a dense block was: on its device, in its dtype, trained as far as it was.

    Args:
        ffn: the block.
        config: of the layer.
        upcycle: whether its experts are copies of the block.
        perturb: of :func:`copy_into_experts`.
    """
    weight = ffn.down_proj()
    where: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    if not upcycle:
        moe = MoE(config, **where)
    else:
        moe = MoE(config, device="meta", dtype=weight.dtype)  # experts are copied: drawing them first takes longer
        moe.experts.to_empty(device=weight.device)
        moe.router = config.family.build(config, **where)
        if moe.output_bias is not None:
            moe.output_bias = nn.Parameter(ffn.down_bias().detach().clone())
        copy_into_experts(ffn, moe.experts, perturb)
    moe.requires_grad_(any(trained_parts(ffn).values()))
    copy_requires_grad(ffn, moe.experts)
    if moe.output_bias is not None:
        moe.output_bias.requires_grad_(trained_parts(ffn)["down_bias"])
    return moe


@torch.no_grad()
def copy_into_experts(ffn: DenseFFN, experts: Experts, perturb: float = 0.0) -> None:
    """Write a dense block's weights into every expert.

    Args:
        ffn: the block.
        experts: of its sizes and form.
        perturb: standard deviation of the noise that projections are multiplied by, other numbers for each expert.
    """
    dense = {
        "up_proj": ffn.up_proj(),
        "down_proj": ffn.down_proj(),
        "up_bias": ffn.up_bias(),
        "down_bias": ffn.down_bias(),
    }
    seed = draw_initial_seed() if perturb else 0
    weights = experts.weights()
    for position, expert in enumerate(experts.owned.experts):
        generator = expert_generator(seed, expert)
        for name, target in weights.of_expert(position).items():
            target.copy_(dense[name])
            if perturb and name.endswith("proj"):
                target.copy_(perturbed(target, perturb, generator, relative=True))


def copy_requires_grad(ffn: DenseFFN, experts: Experts) -> None:
    """Train each weight of the experts where its counterpart is trained."""
    weights = experts.weights()
    for name, flag in trained_parts(ffn).items():
        tensor = getattr(weights, name)
        if tensor is not None:
            tensor.requires_grad_(flag)
    experts.mark_parameters()  # frozen_down_bias has the last word


def trained_parts(ffn: DenseFFN) -> dict[str, bool]:
    """Which weights of a block are trained, by the experts' names; a bias that it has not follows its linear."""

    def trained(tensors: list[Any]) -> bool:
        return any(tensor.requires_grad for tensor in tensors if isinstance(tensor, Tensor))

    ups = [linear for linear in (ffn.gate, ffn.up) if linear is not None]
    return {
        "up_proj": trained([linear.weight for linear in ups]),
        "down_proj": trained([ffn.down.weight]),
        "up_bias": trained([linear.bias if linear.bias is not None else linear.weight for linear in ups]),
        "down_bias": trained([ffn.down.bias if ffn.down.bias is not None else ffn.down.weight]),
    }
