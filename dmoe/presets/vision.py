"""Vision models, and Tutel, which the last two were trained with: V-MoE, GMoE, Swin-MoE."""

from __future__ import annotations

from typing import Any

from dmoe.config import MoEConfig
from dmoe.presets.building import Width, config_of
from dmoe.routing import Cosine, TopK


def vmoe(
    hidden_size: int = 768,
    ffn_hidden_size: Width = 3072,
    num_experts: int = 8,
    *,
    top_k: int = 2,
    batch_priority: bool = False,
    **overrides: Any,
) -> MoEConfig:
    """V-MoE: two experts by noisy logits, importance and load losses, as pre-trained (Riquelme et al. 2021).

    Source: arXiv 2106.05974, section 2 and appendix A; google-research/vmoe at 942a78bc, configs/vmoe_paper
    (``ViT-B/16, E=8, K=2, Every 2``), nn/routing.py, moe.py.

    S/32: ``vmoe(512, 2048)``; L/16: ``vmoe(1024, 4096)``; H/14: ``vmoe(1280, 5120)``. Fine-tuned with
    ``capacity_factor=1.5``; S/32 on ILSVRC alone with ``eval_capacity_factor=4.0, activation_dropout=0.2``.

    Args:
        hidden_size, ffn_hidden_size, num_experts: H, F, E.
        top_k: K.
        batch_priority: drop the least important tokens (Batch Prioritized Routing) instead of the last; off as
            published for pre-training.
        **overrides: fields of :class:`dmoe.MoEConfig`.

    Differs from the original:
        - All tokens are one group unless ``token_groups`` says otherwise; V-MoE's are 8 images (8 * 197 tokens for
          B/16): ``token_groups = T / (8 * 197)``.
        - Each expert begins at values of its own; V-MoE's experts begin alike (``split_rngs=False``).
        - Which layers are MoE layers (every second one, or the last two that are odd) is the model's to say.
    """
    published = {
        "hidden_size": hidden_size,
        "ffn_hidden_size": ffn_hidden_size,
        "num_experts": num_experts,
        "top_k": top_k,
        "activation": "gelu_tanh",  # what flax.linen.gelu is
        "gated": False,
        "bias": "expert",
        "init": "vmoe",
        "router": TopK(logit_noise="gaussian", noise_std=1.0),
        "causal": False,
        "capacity_factor": 1.05,
        "capacity_formula": "ceil",
        "capacity_multiple_of": 4,
        "drop_order": "batch_prioritized" if batch_priority else "choice_major",
        "losses": {"importance": 0.005, "load": 0.005},
    }
    return config_of("vmoe", published, overrides)


def gmoe(hidden_size: int = 384, ffn_hidden_size: Width = 1536, num_experts: int = 6, **overrides: Any) -> MoEConfig:
    """GMoE-S/16: one expert by a noisy cosine score, for domain generalisation (Li et al. 2023).

    Source: arXiv 2206.04046; Luodian/Generalizable-MoE at 0689d557, domainbed/vision_transformer.py and
    algorithms.py, on Tutel's ``cosine_top``.

    Args:
        hidden_size, ffn_hidden_size, num_experts: H, F, E (6 on each rank there).
        **overrides: fields of :class:`dmoe.MoEConfig`.

    Differs from the original:
        - The cosine router's projection begins as ``nn.Linear`` does; there as the vision transformer's linears.
        - Stochastic depth (0.1), and starting from a dense model's weights, are the model's.
        - A ``token_mask`` is refused in training, since the load-importance loss knows none.
    """
    published = {
        "hidden_size": hidden_size,
        "ffn_hidden_size": ffn_hidden_size,
        "num_experts": num_experts,
        "top_k": 1,
        "activation": "gelu",
        "gated": False,
        "bias": "expert",
        "activation_dropout": 0.1,
        "init": "gmoe",
        # Tutel normalises the weights of several choices, and leaves that of one as it is.
        "gate_normalization": 1.0 if overrides.get("top_k", 1) > 1 else None,
        "router": Cosine(logit_noise="gaussian", noise_std=1.0),
        "causal": False,
        "capacity_factor": 1.5,
        "capacity_formula": "floor_per_choice",
        "drop_order": "batch_prioritized",
        "losses": {"load_importance": 0.01},
    }
    return config_of("gmoe", published, overrides)


def tutel(
    hidden_size: int = 2048,
    ffn_hidden_size: Width = 2048,
    num_experts: int = 2,
    *,
    top_k: int = 1,
    **overrides: Any,
) -> MoEConfig:
    """Tutel's ``moe_layer`` with every option at its default (Hwang et al. 2023).

    Source: arXiv 2206.03382; microsoft/tutel at 82af7aad (after 0.3.2), impls/moe_layer.py, impls/fast_dispatch.py,
    gates/top.py, experts/ffn.py; the sizes are those of examples/helloworld.py, which has them for each rank.

    ``capacity_factor=0.0`` and negative ones mean what they mean there. The two-level all-to-all (``use_2dh``), its
    overlap with the experts and one expert on several ranks are ``ep_levels``, ``overlap_degree`` and an ``ep_group``
    of more ranks than experts.

    Args:
        hidden_size, ffn_hidden_size, num_experts: H, F, E over all ranks.
        top_k: K; with more than one the weights sum to 1.
        **overrides: fields of :class:`dmoe.MoEConfig`.

    Differs from the original:
        - Tutel leaves the loss's factor to its caller; here it is ``load_balancing_coefficient``.
        - A factor of 0 under batch priority drops nothing here; Tutel's count is wrong there.
        - At less than one row for each expert Tutel fails; here those tokens are dropped.
        - ``adaptive_r``, which changes how experts are spread from step to step, is not offered.
    """
    published = {
        "hidden_size": hidden_size,
        "ffn_hidden_size": ffn_hidden_size,
        "num_experts": num_experts,
        "top_k": top_k,
        "activation": "relu",
        "gated": False,
        "bias": "expert",
        "gate_normalization": 1.0 if top_k > 1 else None,
        "router_dtype": "input",
        "capacity_factor": 1.0,
        "capacity_formula": "floor_per_choice",
        "drop_order": "choice_major",
        "load_balancing_choices": "first",
        "load_balancing_coefficient": 0.01,
    }
    return config_of("tutel", published, overrides)


def swin_moe(
    hidden_size: int = 512,
    ffn_hidden_size: Width = 2048,
    num_experts: int = 32,
    *,
    cosine: bool = False,
    **overrides: Any,
) -> MoEConfig:
    """Swin-MoE-B's layers of stage 2: one expert by noisy logits, no trained output bias (Hwang et al. 2023).

    Source: arXiv 2206.03382, section 5; microsoft/Swin-Transformer at f82860bf, models/swin_transformer_moe.py,
    config.py, configs/swinmoe, on Tutel.

    Stage 3: ``swin_moe(1024, 4096)``; Swin-MoE-S: ``swin_moe(384, 1536)`` and ``swin_moe(768, 3072)``.

    Args:
        hidden_size, ffn_hidden_size, num_experts: H, F, E (8 to 64 there).
        cosine: the two published models with a cosine router.
        **overrides: fields of :class:`dmoe.MoEConfig`.

    Differs from the original:
        - The cosine router's projection begins as ``nn.Linear`` does; there at N(0, 0.005).
        - The original leaves some parameters without weight decay (the experts' first bias, the cosine router's):
          that is the optimizer's.
        - A ``token_mask`` is refused in training, since the load-importance loss knows none.
    """
    noise: dict[str, Any] = {"logit_noise": "gaussian", "noise_std": 1.0}
    published = {
        "hidden_size": hidden_size,
        "ffn_hidden_size": ffn_hidden_size,
        "num_experts": num_experts,
        "top_k": 1,
        "activation": "gelu",
        "gated": False,
        "bias": "expert",
        "frozen_down_bias": True,
        "activation_dropout": 0.1,
        "init": "swin_moe",
        "router": Cosine(dim=256, temperature=0.5, **noise) if cosine else TopK(**noise),
        "causal": False,
        "capacity_factor": 1.25,
        "capacity_formula": "floor_per_choice",
        "drop_order": "batch_prioritized",
        "losses": {"load_importance": 0.01},
    }
    return config_of("swin_moe", published, overrides)
