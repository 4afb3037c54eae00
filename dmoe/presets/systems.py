"""Training systems and the models they were made for: DeepSpeed, PR-MoE, NLLB-200 on fairseq, MegaBlocks."""

from __future__ import annotations

from typing import Any

from dmoe.config import MoEConfig
from dmoe.presets.building import Width, config_of
from dmoe.routing import TopK


def deepspeed(
    hidden_size: int = 1024,
    ffn_hidden_size: Width = 4096,
    num_experts: int = 128,
    *,
    top_k: int = 1,
    use_rts: bool = True,
    drop_tokens: bool = True,
    second_expert_sampling: bool = True,
    **overrides: Any,
) -> MoEConfig:
    """``deepspeed.moe.layer.MoE`` with every option at its default (Rajbhandari et al. 2022).

    Source: arXiv 2201.05596; DeepSpeed at edaa7221, moe/layer.py and moe/sharded_moe.py (``top1gating``,
    ``top2gating``, ``topkgating``); the sizes are those of the paper's 350M+MoE-128.

    Args:
        hidden_size, ffn_hidden_size, num_experts: H, F, E.
        top_k: K (``k``). 1: the raw probability weighs, and whom the capacity leaves out is drawn; 2: the second expert
            is drawn, in evaluation as well, and survivors share 1; more: those with small probabilities are dropped.
        use_rts: random token selection, with K = 1; without it later tokens are dropped.
        drop_tokens: False drops nothing.
        second_expert_sampling: ``top2_2nd_expert_sampling``, with K = 2.
        **overrides: fields of :class:`dmoe.MoEConfig`. ``noisy_gate_policy``: ``input_jitter=0.01`` is ``Jitter``,
            ``router=TopK(logit_noise="gumbel")`` is ``RSample``.

    Differs from the original:
        - Experts begin at values of their own; there at copies of one module, which is also what says its activation
          and biases (here Megatron-DeepSpeed's).
        - The loss comes unscaled there; the factor is ``load_balancing_coefficient`` here.
        - ``used_token`` acts with K = 1 only there. A ``token_mask`` acts with any K: as it does there, which is
          ``TopK(masked_tokens="unrouted")``, with K = 1 and 2, and out of the losses, too, with more.
        - Without random token selection the order of equals is left to ``torch.topk`` there.
    """
    fewest = {
        "capacity_factor": 1.0,
        "eval_capacity_factor": 1.0,
        "min_capacity": 4,
        "capacity_formula": "ceil_float32",
    }
    router = TopK(masked_tokens="unrouted") if top_k < 3 else TopK()
    if top_k == 2 and second_expert_sampling:
        router = TopK(second_expert="sampling", noise_in_eval=True, masked_tokens="unrouted")
    in_order = {1: "random" if use_rts else "token_major", 2: "choice_major"}
    published = {
        "hidden_size": hidden_size,
        "ffn_hidden_size": ffn_hidden_size,
        "num_experts": num_experts,
        "top_k": top_k,
        "activation": "gelu_tanh",
        "gated": False,
        "bias": "expert",
        "router": router,
        "gate_normalization": 1.0 if top_k > 1 else None,
        "normalize_when": "after_drop" if top_k > 1 else "before_drop",
        **(fewest if drop_tokens else {}),
        "drop_order": in_order.get(top_k, "gate_weight"),
        "load_balancing_choices": "first" if top_k < 3 else "all",
        "load_balancing_coefficient": 0.01,
    }
    return config_of("deepspeed", published, overrides)


def pr_moe(
    hidden_size: int = 1024, ffn_hidden_size: Width = 4096, num_experts: int = 32, **overrides: Any
) -> MoEConfig:
    """PR-MoE 350M+32/64: one expert beside an MLP that every token takes, more experts in the last layers.

    Source: Rajbhandari et al. 2022, arXiv 2201.05596, section 4.1; Megatron-DeepSpeed at 4efb479d,
    examples_deepspeed/MoE/ds_pretrain_gpt_350M_PR-MoE32or64.sh; the layer is DeepSpeed's (:func:`deepspeed`) with
    ``use_residual``.

    This is the experts' half: ``dmoe.ResidualMoE(dmoe.MoE(dmoe.presets.pr_moe()), mlp)`` is the layer, with an MLP as
    wide as an expert. The pyramid is a preset for each layer: ten with 32 experts, then two with ``num_experts=64``
    (1.3B: 64 and 128); :func:`dmoe.replace_ffn` makes both of a dense model. MoS distils it into a model of ten:
    :func:`dmoe.losses.distillation_loss`.

    Args:
        hidden_size, ffn_hidden_size, num_experts: H, F, E.
        **overrides: fields of :class:`dmoe.MoEConfig`.

    Differs from the original:
        - Experts begin at values of their own, there at copies of one; that output projections begin smaller, as
          Megatron's do, is the model's to say.
    """
    published = {
        "hidden_size": hidden_size,
        "ffn_hidden_size": ffn_hidden_size,
        "num_experts": num_experts,
        "top_k": 1,
        "activation": "gelu_tanh",
        "gated": False,
        "bias": "expert",
        "init_std": 0.014,
        "router": TopK(masked_tokens="unrouted"),
        "capacity_factor": 1.0,
        "eval_capacity_factor": 1.0,
        "min_capacity": 4,
        "capacity_formula": "ceil_float32",
        "drop_order": "random",
        "load_balancing_choices": "first",
        "load_balancing_coefficient": 0.01,
    }
    return config_of("pr_moe", published, overrides)


def nllb(hidden_size: int = 2048, ffn_hidden_size: Width = 8192, num_experts: int = 128, **overrides: Any) -> MoEConfig:
    """NLLB-200 54.5B: two experts whose survivors share 1, a capacity that is without effect in evaluation.

    Source: Costa-jussa et al. 2022, arXiv 2207.04672, section 6; fairseq's branch nllb at ec0ae71a,
    modules/moe/top2gate.py and moe_layer.py, examples/nllb/modeling.

    Args:
        hidden_size, ffn_hidden_size, num_experts: H, F, E.
        **overrides: fields of :class:`dmoe.MoEConfig`. Fine-tuned with ``load_balancing_coefficient=0.0``.

    Differs from the original:
        - Expert output masking (``moe_eom=0.2``) is not here: in training it zeroes whole rows of an expert's output
          and leaves the others as they are, in evaluation it multiplies all by 0.8. ``expert_dropout=0.2`` masks single
          numbers and scales the rest up.
        - Conditional MoE routing (CMR) is not here.
        - fairseq's own default draws the second expert, ``TopK(second_expert="sampling", masked_tokens="unrouted")``,
          and its evaluation keeps a quarter of the tokens for each expert, ``eval_capacity_fraction=0.25``.
        - Every fourth layer is one: that is the model's to say.
    """
    published = {
        "hidden_size": hidden_size,
        "ffn_hidden_size": ffn_hidden_size,
        "num_experts": num_experts,
        "top_k": 2,
        "activation": "relu",
        "gated": False,
        "bias": "expert",
        "router": TopK(masked_tokens="unrouted"),
        "gate_normalization": 1.0,
        "normalize_when": "after_drop",
        "capacity_factor": 1.0,
        "eval_capacity_fraction": 1.0,
        "capacity_formula": "ceil_per_choice",
        "drop_order": "choice_major",
        "load_balancing_choices": "first",
        "load_balancing_coefficient": 0.01,
        "expert_grad_scale": "sqrt_world_size",
    }
    return config_of("nllb", published, overrides)


def megablocks(
    hidden_size: int = 1024, ffn_hidden_size: Width = 4096, num_experts: int = 64, **overrides: Any
) -> MoEConfig:
    """MegaBlocks' dMoE: one expert, nothing dropped, one output bias for the layer (Gale et al. 2023).

    Source: arXiv 2211.15841; databricks/megablocks at 78eea65f, layers/arguments.py (every option at its default, but
    64 experts as in the paper instead of 1), router.py, moe.py, dmoe.py. :mod:`dmoe.compat.megablocks` has its names.

    Args:
        hidden_size, ffn_hidden_size, num_experts: H, F, E.
        **overrides: fields of :class:`dmoe.MoEConfig`. ``num_moe_layers``: its loss is a mean over layers.

    Differs from the original:
        - The output bias is added; MegaBlocks hands it back beside the result (``return_bias=True``).
        - Parameters are float32 unless ``dtype`` says otherwise; there float16.
    """
    published = {
        "hidden_size": hidden_size,
        "ffn_hidden_size": ffn_hidden_size,
        "num_experts": num_experts,
        "top_k": 1,
        "activation": "gelu_tanh",
        "gated": False,
        "bias": "output",
        "init_std": 0.02,
        "router_dtype": "input",
        "load_balancing_coefficient": 0.1,
    }
    return config_of("megablocks", published, overrides)
