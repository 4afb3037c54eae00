"""The papers that began it: Switch, GShard, BASE, hash layers, Expert Choice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dmoe.config import MoEConfig
from dmoe.presets.building import Width, config_of
from dmoe.routing import ExpertChoice, Hash, TopK
from dmoe.routing.second_expert import SecondExpert


def switch(
    hidden_size: int = 768,
    ffn_hidden_size: Width = 3072,
    num_experts: int = 128,
    *,
    fine_tuning: bool = False,
    **overrides: Any,
) -> MoEConfig:
    """Switch Transformer: one expert for each token, weighed by its probability (Fedus, Zoph and Shazeer 2021).

    Source: arXiv 2101.03961, sections 2.2 and 2.4; Mesh TensorFlow at da907937, transformer/moe.py
    (``_switch_gating``); the sizes are switch_base's (flaxformer at 399ea3a8, t5x/configs/moe/models).

    Large: ``switch(1024, 4096, 128)``; Switch-C: ``switch(2080, 6144, 2048, capacity_factor=1.0, min_capacity=2)``.
    As T5X trains it: ``capacity_formula="round", input_jitter=0.0``.

    Args:
        hidden_size, ffn_hidden_size, num_experts: H, F, E.
        fine_tuning: 0.4 of dropout after the experts' activation (table 4 of the paper, which has 0.1 everywhere else
            in the model); none in pre-training.
        **overrides: fields of :class:`dmoe.MoEConfig`.

    Differs from the original:
        - All tokens are one group unless ``token_groups`` says otherwise; Mesh TensorFlow's groups have 1024 tokens,
          T5X's up to 8192.
        - A ``token_mask`` takes padding out of both factors of the balance loss and of its means; Mesh TensorFlow masks
          the probabilities alone, and divides by all tokens.
        - T5X draws the router's weights from N(0, 0.02), and keeps the standard deviation that the cut of the normal
          distribution takes away (12%).
        - Every second FFN is one: that is the model's to say.
    """
    published = {
        "hidden_size": hidden_size,
        "ffn_hidden_size": ffn_hidden_size,
        "num_experts": num_experts,
        "top_k": 1,
        "activation": "relu",
        "gated": False,
        "activation_dropout": 0.4 if fine_tuning else 0.0,
        "init": "switch",
        "input_jitter": 0.01,
        "capacity_factor": 1.25,
        "eval_capacity_factor": 2.0,
        "min_capacity": 4,
        "capacity_formula": "floor",
        "load_balancing_coefficient": 0.01,
    }
    return config_of("switch", published, overrides)


def gshard(
    hidden_size: int = 1024,
    ffn_hidden_size: Width = 8192,
    num_experts: int = 2048,
    *,
    token_groups: int = 1,
    second_expert: SecondExpert = "random",
    **overrides: Any,
) -> MoEConfig:
    """GShard: two experts, the second one by chance, all first choices before all second ones (Lepikhin et al. 2021).

    Source: arXiv 2006.16668, algorithm 1 and appendix A.2 (sizes: MoE(2048E, 36L), 600B); lingvo at e0be5dc4,
    core/gshard_layers.py (``Top2GatingOnLogits``), whose capacity is a multiple of 4.

    Args:
        hidden_size, ffn_hidden_size, num_experts: H, F, E.
        token_groups: G, groups of consecutive tokens with a capacity of 2 T / (G E) each.
        second_expert: ``random``: kept with probability 2 g (the paper); ``all``: lingvo's default; ``sampling``.
        **overrides: fields of :class:`dmoe.MoEConfig`.

    Differs from the original:
        - A second expert is left out by chance in training only; Mesh TensorFlow's ``top_2`` does it in evaluation,
          too (``router=TopK(second_expert="random", noise_in_eval=True)``), and with threshold 0.2 instead of 0.5.
        - The sum that the two weights are divided by is without the 1e-9 that lingvo adds.
        - The paper does not say how experts begin; here as ``nn.Linear`` does.
    """
    published = {
        "hidden_size": hidden_size,
        "ffn_hidden_size": ffn_hidden_size,
        "num_experts": num_experts,
        "top_k": 2,
        "activation": "relu",
        "gated": False,
        "router": TopK(second_expert=second_expert),
        "gate_normalization": 1.0,
        "capacity_factor": 1.0,
        "min_capacity": 4,
        "capacity_multiple_of": 4,
        "capacity_formula": "floor",
        "token_groups": token_groups,
        "drop_order": "choice_major",
        "load_balancing_choices": "first",
        "load_balancing_coefficient": 0.01,
    }
    return config_of("gshard", published, overrides)


def base_layer(
    hidden_size: int = 2048, ffn_hidden_size: Width = 8192, num_experts: int = 128, **overrides: Any
) -> MoEConfig:
    """BASE: in training a balanced assignment, every expert as many tokens, without any loss (Lewis et al. 2021).

    Source: arXiv 2103.16716; fairseq at 3d262bb2, modules/base_layer.py. E is the number of workers, 128 in the paper;
    H and F are those with which an expert of ten such FFNs makes its 44B parameters (from memory).

    Tokens of a batch compete, so a token's expert depends on later tokens: the original trains language models like
    that, and ``allow_future_leak=True`` says so. In evaluation each token goes to its best expert.

    Args:
        hidden_size, ffn_hidden_size, num_experts: H, F, E.
        **overrides: fields of :class:`dmoe.MoEConfig`.

    Differs from the original:
        - An expert there is x + g(LayerNorm(x)), ten of them one after the other in the paper, and the layer returns
          a f(x) + (1 - a) x. With a residual connection around it this layer returns x + a g(x): the same for one FFN,
          but for the norm, which is the model's here, and which the router sees then, too.
        - The assignment is exact; fairseq's auction comes to within some percent of it.
        - Tokens are not shuffled over the workers before (``base_shuffle``).
        - Training is ``module.training``; there it is an input that requires a gradient.
        - Down projections begin as ``nn.Linear`` does; there at 0.
    """
    published = {
        "hidden_size": hidden_size,
        "ffn_hidden_size": ffn_hidden_size,
        "num_experts": num_experts,
        "top_k": 1,
        "activation": "relu",
        "gated": False,
        "bias": "expert",
        "router": "base",
        "allow_future_leak": True,
        "load_balancing_coefficient": 0.0,
    }
    return config_of("base_layer", published, overrides)


def hash_layer(
    hidden_size: int = 1024,
    ffn_hidden_size: Width = 4096,
    num_experts: int = 32,
    *,
    vocab_size: int = 8008,
    frequencies: Sequence[int] | None = None,
    **overrides: Any,
) -> MoEConfig:
    """Hash layers: a token's id says where it goes, nothing is learned (Roller et al. 2021).

    Source: arXiv 2106.04426; ParlAI at a29567f7, projects/params_vs_compute/hash_ladder. H and F are those with which
    64 and 128 experts make the paper's 751M and 1.28B parameters (from memory). Call the layer with ``token_ids``.

    Args:
        hidden_size, ffn_hidden_size, num_experts: H, F, E.
        vocab_size: of your tokens; each id's expert is drawn as ParlAI draws it. (8008: ParlAI's BPE, from memory.)
        frequencies: of each id, instead: a table under which the experts' loads are equal (the paper's balanced hash).
        **overrides: fields of :class:`dmoe.MoEConfig`.

    Differs from the original:
        - The paper's clustered and multi-hash tables are not made here; ``router=Hash(table=...)`` takes any.
        - The dropout after the activation is the model's in ParlAI: ``activation_dropout``.
        - Only one layer of the model is one in ParlAI (``hash_layer=7``): that is the model's to say.
    """
    published = {
        "hidden_size": hidden_size,
        "ffn_hidden_size": ffn_hidden_size,
        "num_experts": num_experts,
        "top_k": 1,
        "activation": "relu",
        "gated": False,
        "bias": "expert",
        "init": "xavier",
        "router": Hash(vocab_size=vocab_size) if frequencies is None else Hash(frequencies=frequencies),
        "load_balancing_coefficient": 0.0,
    }
    return config_of("hash_layer", published, overrides)


def expert_choice(
    hidden_size: int = 768,
    ffn_hidden_size: Width = 2048,
    num_experts: int = 64,
    *,
    capacity_factor: float = 1.0,
    **overrides: Any,
) -> MoEConfig:
    """Expert Choice: every expert takes the tokens that it scores highest, without any loss (Zhou et al. 2022).

    Source: arXiv 2202.09368, section 3; flaxformer at 399ea3a8, experts_choose_base.gin and
    ``ExpertsChooseMaskedRouter``. A token's experts depend on later tokens: the original is an encoder
    (``causal=False``; in its decoder each token chooses two experts).

    Args:
        hidden_size, ffn_hidden_size, num_experts: H, F, E.
        capacity_factor: mean number of experts of a token: 1 in flaxformer, 2 in the paper's EC-CF2.
        **overrides: fields of :class:`dmoe.MoEConfig`.

    Differs from the original:
        - All tokens are one group unless ``token_groups`` says otherwise; flaxformer's have 4096.
        - Masked tokens are chosen by nobody; flaxformer only lowers their scores.
        - Flaxformer draws the router's weights from N(0, 0.02), and keeps the standard deviation that the cut of the
          normal distribution takes away (12%).
    """
    published = {
        "hidden_size": hidden_size,
        "ffn_hidden_size": ffn_hidden_size,
        "num_experts": num_experts,
        "top_k": 1,
        "activation": "gelu_tanh",  # what jax.nn.gelu is
        "init": "switch",
        "router": ExpertChoice(),
        "causal": False,
        "capacity_factor": capacity_factor,
        "capacity_formula": "round",
        "load_balancing_coefficient": 0.0,
    }
    return config_of("expert_choice", published, overrides)
