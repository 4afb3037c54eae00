"""DeepSeek-V2, V3 and V4."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dmoe.activations import ClampedSwiGLU
from dmoe.config import MoEConfig
from dmoe.presets.building import Width, config_of
from dmoe.routing import Hash


def deepseek_v2(
    hidden_size: int = 5120, ffn_hidden_size: Width = 1536, num_experts: int = 160, **overrides: Any
) -> MoEConfig:
    """DeepSeek-V2 (236B): six experts in the best three of eight groups, two shared ones, a loss for each sequence.

    Source: arXiv 2405.04434, sections 2.2 and 3.1.2; the published config.json; Transformers 5.24.0,
    models/deepseek_v2 (``DeepseekV2TopkRouter``).

    V2-Lite: ``deepseek_v2(2048, 1408, 64, shared_ffn_hidden_size=2816, num_groups=1, top_k_groups=None,
    gate_scale=1.0)``. The first layer of either is dense.

    Args:
        hidden_size, ffn_hidden_size, num_experts: H, F, E.
        **overrides: fields of :class:`dmoe.MoEConfig`.

    Differs from the original:
        - The losses that balance devices (0.05) and their communication (0.02) are not here.
        - Nothing is dropped; in its training each device kept 1.0 of an even share, those with the largest scores, and
          a tenth of the sequences whole.
        - Its loss coefficient is the paper's, 0.003; config.json has another.
        - The paper multiplies the experts' inner values by a scaling factor that it does not state.
    """
    published = {
        "hidden_size": hidden_size,
        "ffn_hidden_size": ffn_hidden_size,
        "num_experts": num_experts,
        "top_k": 6,
        "shared_ffn_hidden_size": 3072,
        "init_std": 0.006,
        "gate_scale": 16.0,
        "num_groups": 8,
        "top_k_groups": 3,
        "group_score": "max",
        "load_balancing_over": "sequence",
        "load_balancing_coefficient": 0.003,
    }
    return config_of("deepseek_v2", published, overrides)


def deepseek_v3(
    hidden_size: int = 7168, ffn_hidden_size: Width = 2048, num_experts: int = 256, **overrides: Any
) -> MoEConfig:
    """DeepSeek-V3 (671B): eight experts by sigmoid scores and a bias that balances them, nearly without a loss.

    Source: arXiv 2412.19437, sections 2.1.2 and 4.2; Transformers 5.24.0, models/deepseek_v3. Call
    ``dmoe.update_selection_bias(model)`` after each optimizer step.

    Args:
        hidden_size, ffn_hidden_size, num_experts: H, F, E.
        **overrides: fields of :class:`dmoe.MoEConfig`.

    Differs from the original:
        - The bias moves as long as it is updated; in its training the speed of 0.001 became 0 for the last 500B of
          14.8T tokens: leave the calls out.
        - The weights' sum is without the 1e-20 that the published code adds.
        - Transformers begins at N(0, 0.02); this is the paper's 0.006.
        - The first three layers are dense: that is the model's to say.
    """
    published = {
        "hidden_size": hidden_size,
        "ffn_hidden_size": ffn_hidden_size,
        "num_experts": num_experts,
        "top_k": 8,
        "shared_ffn_hidden_size": 2048,
        "init_std": 0.006,
        "score_function": "sigmoid",
        "gate_normalization": 1.0,
        "gate_scale": 2.5,
        "selection_bias": True,
        "selection_bias_update_rate": 1e-3,
        "num_groups": 8,
        "top_k_groups": 4,
        "group_score": "top2_sum",
        "load_balancing_choices": "plain",  # eq. 18 counts the best scores, without bias and groups
        "load_balancing_over": "sequence",
        "load_balancing_coefficient": 1e-4,
    }
    return config_of("deepseek_v3", published, overrides)


def deepseek_v4(
    hidden_size: int = 4096,
    ffn_hidden_size: Width = 2048,
    num_experts: int = 256,
    *,
    hash_table: Sequence[Sequence[int]] | None = None,
    **overrides: Any,
) -> MoEConfig:
    """DeepSeek-V4-Flash: six experts by the root of a softplus and V3's bias; in the first layers by a token's id.

    Source: its technical report, sections 2.1 and 4.2; the published config.json and inference code; Transformers'
    models/deepseek_v4. Call ``dmoe.update_selection_bias(model)`` after each optimizer step.

    Pro: ``deepseek_v4(7168, 3072, 384, shared_ffn_hidden_size=3072, gate_scale=2.5)``.

    Args:
        hidden_size, ffn_hidden_size, num_experts: H, F, E.
        hash_table: the experts of each token id, V rows of K, for the first three layers (``tid2eid`` of a checkpoint):
            the table chooses, a learned linear weighs, and there is no bias. Call the layer with ``token_ids``.
        **overrides: fields of :class:`dmoe.MoEConfig`.

    Differs from the original:
        - How the hash table was made is not published; whether layers that hash have the balance loss is not, either:
          here they do.
        - Anticipatory routing (choices of earlier parameters, after a spike of the loss) is not here.
        - Its initial values are not known here: those of V3 (0.006).
    """
    published: dict[str, Any] = {
        "hidden_size": hidden_size,
        "ffn_hidden_size": ffn_hidden_size,
        "num_experts": num_experts,
        "top_k": 6,
        "activation": ClampedSwiGLU(limit=10.0, alpha=1.0, up_offset=0.0),
        "gate_weight_on": "activation",
        "shared_ffn_hidden_size": 2048,
        "init_std": 0.006,
        "score_function": "sqrt_softplus",
        "gate_normalization": 1.0,
        "gate_scale": 1.5,
        "selection_bias": True,
        "selection_bias_update_rate": 1e-3,
        "load_balancing_choices": "plain",
        "load_balancing_over": "sequence",
        "load_balancing_coefficient": 1e-4,
    }
    if hash_table is not None:
        published["router"] = Hash(table=hash_table, weights="learned")
        published |= {"selection_bias": False, "load_balancing_choices": "all"}
    return config_of("deepseek_v4", published, overrides)
