"""Open language models: Mixtral, OLMoE, Qwen3, GPT-OSS, Llama 4."""

from __future__ import annotations

from typing import Any

from dmoe.activations import ClampedSwiGLU
from dmoe.config import MoEConfig
from dmoe.presets.building import Width, config_of


def mixtral(
    hidden_size: int = 4096,
    ffn_hidden_size: Width = 14336,
    num_experts: int = 8,
    *,
    top_k: int = 2,
    router_aux_loss_coef: float = 0.02,
    **overrides: Any,
) -> MoEConfig:
    """Mixtral 8x7B: two experts, weighed by the softmax of their two logits (Jiang et al. 2024).

    Source: arXiv 2401.04088, section 2.1; Transformers 5.24.0, models/mixtral, and the published config.json.

    Args:
        hidden_size, ffn_hidden_size, num_experts: H, F, E.
        top_k: K.
        router_aux_loss_coef: as in config.json: of Transformers' balance loss, which is K times dmoe's, since its
            shares of tokens sum to K; ``load_balancing_coefficient`` is K times this.
        **overrides: fields of :class:`dmoe.MoEConfig`.

    Differs from the original:
        - Transformers makes one loss of the tokens of all layers together; here it is one for each layer
          (``num_moe_layers=32`` makes their sum a mean).
        - How the original was trained is not published: the coefficient and the initial values are Transformers'.
    """
    published = {
        "hidden_size": hidden_size,
        "ffn_hidden_size": ffn_hidden_size,
        "num_experts": num_experts,
        "top_k": top_k,
        "init_std": 0.02,
        "softmax_order": "after_topk",
        "load_balancing_coefficient": top_k * router_aux_loss_coef,
    }
    return config_of("mixtral", published, overrides)


def olmoe(hidden_size: int = 2048, ffn_hidden_size: Width = 1024, num_experts: int = 64, **overrides: Any) -> MoEConfig:
    """OLMoE-1B-7B: eight small experts, weighed by their probabilities as they are (Muennighoff et al. 2024).

    Source: arXiv 2409.02060, section 2 and table 10; Transformers 5.24.0, models/olmoe, and the published config.json.

    Args:
        hidden_size, ffn_hidden_size, num_experts: H, F, E.
        **overrides: fields of :class:`dmoe.MoEConfig`. ``num_moe_layers=16``: both losses are means over the layers.

    Differs from the original:
        - It trained on MegaBlocks, whose z-loss was also divided by K at that time, as far as is known: the same effect
          would be ``router_z_loss_coefficient=1.25e-4``.
        - Its normal distribution was cut at three standard deviations (from memory).
    """
    published = {
        "hidden_size": hidden_size,
        "ffn_hidden_size": ffn_hidden_size,
        "num_experts": num_experts,
        "top_k": 8,
        "init_std": 0.02,
        "load_balancing_coefficient": 0.01,
        "router_z_loss_coefficient": 0.001,
    }
    return config_of("olmoe", published, overrides)


def qwen3(
    hidden_size: int = 2048,
    ffn_hidden_size: Width = 768,
    num_experts: int = 128,
    *,
    top_k: int = 8,
    router_aux_loss_coef: float = 0.001,
    **overrides: Any,
) -> MoEConfig:
    """Qwen3-30B-A3B: eight small experts whose weights sum to 1, balanced over the global batch (Yang et al. 2025).

    Source: arXiv 2505.09388, section 2; Transformers 5.24.0, models/qwen3_moe, and the published config.json.

    The 235B-A22B: ``qwen3(4096, 1536)`` (from memory). On several ranks the layer needs a ``loss_group`` or an
    ``ep_group``.

    Args:
        hidden_size, ffn_hidden_size, num_experts: H, F, E.
        top_k: K.
        router_aux_loss_coef: as in config.json: of Transformers' balance loss, which is K times dmoe's;
            ``load_balancing_coefficient`` is K times this.
        **overrides: fields of :class:`dmoe.MoEConfig`.

    Differs from the original:
        - The coefficient of its training is not published: this one is config.json's.
        - Transformers makes one loss of the tokens of all layers of one rank together; here, as in training, it is one
          for each layer, over all ranks.
    """
    published = {
        "hidden_size": hidden_size,
        "ffn_hidden_size": ffn_hidden_size,
        "num_experts": num_experts,
        "top_k": top_k,
        "init_std": 0.02,
        "gate_normalization": 1.0,
        "load_balancing_over": "global",
        "load_balancing_coefficient": top_k * router_aux_loss_coef,
    }
    return config_of("qwen3", published, overrides)


def gpt_oss(
    hidden_size: int = 2880,
    ffn_hidden_size: Width = 2880,
    num_experts: int = 128,
    *,
    top_k: int = 4,
    router_aux_loss_coef: float = 0.001,
    **overrides: Any,
) -> MoEConfig:
    """gpt-oss-120b: four experts by the softmax of their logits, a clamped SwiGLU, biases everywhere (OpenAI 2025).

    Source: the model card, arXiv 2508.10925; Transformers 5.24.0, models/gpt_oss (``GptOssExperts``,
    ``GptOssTopKRouter``). gpt-oss-20b: ``gpt_oss(num_experts=32)``.

    Args:
        hidden_size, ffn_hidden_size, num_experts: H, F, E.
        top_k: K.
        router_aux_loss_coef: as in Transformers' config, of its balance loss, which is K times dmoe's.
        **overrides: fields of :class:`dmoe.MoEConfig`.

    Differs from the original:
        - Its projections lie interleaved (gate, up, gate, up), and the layer's do not: a file has to be put in order
          first. (:class:`dmoe.ExpertWeights` takes them as they lie.)
        - Transformers draws the router's bias from N(0, 0.02); here it begins at 0.
        - How it was trained is not published: the coefficient is Transformers'.
    """
    published = {
        "hidden_size": hidden_size,
        "ffn_hidden_size": ffn_hidden_size,
        "num_experts": num_experts,
        "top_k": top_k,
        "activation": ClampedSwiGLU(limit=7.0, alpha=1.702, up_offset=1.0),
        "bias": "expert",
        "init_std": 0.02,
        "softmax_order": "after_topk",
        "router_bias": True,
        "router_dtype": "input",
        "load_balancing_coefficient": top_k * router_aux_loss_coef,
    }
    return config_of("gpt_oss", published, overrides)


def llama4(
    hidden_size: int = 5120,
    ffn_hidden_size: Width = 8192,
    num_experts: int = 16,
    *,
    router_aux_loss_coef: float = 0.001,
    **overrides: Any,
) -> MoEConfig:
    """Llama 4 Scout: one expert whose input is scaled by the sigmoid of its logit, beside a shared one (Meta 2025).

    Source: Transformers 5.24.0, models/llama4 (``Llama4TextMoe``), and the published config.json. Maverick:
    ``llama4(num_experts=128)`` in every second layer.

    Args:
        hidden_size, ffn_hidden_size, num_experts: H, F, E; the shared expert is as wide as the others.
        router_aux_loss_coef: as in Transformers' config.
        **overrides: fields of :class:`dmoe.MoEConfig`.

    Differs from the original:
        - Transformers runs all experts, those that were not chosen on zeros: the same results.
        - The balance loss divides the sigmoids by their sum, as DeepSeek-V3's does; how Llama 4 was balanced in
          training is not published, nor its coefficient: this one is Transformers'.
    """
    published = {
        "hidden_size": hidden_size,
        "ffn_hidden_size": ffn_hidden_size,
        "num_experts": num_experts,
        "top_k": 1,
        "gate_weight_on": "input",
        "shared_ffn_hidden_size": ffn_hidden_size if isinstance(ffn_hidden_size, int) else max(ffn_hidden_size),
        "init_std": 0.02,
        "score_function": "sigmoid",
        "load_balancing_coefficient": router_aux_loss_coef,
    }
    return config_of("llama4", published, overrides)
