"""One layer of each family, and of each option that a family has, at small sizes."""

from __future__ import annotations

import torch

from dmoe import MoE, MoEConfig
from dmoe.routing import Base, Cosine, ExpertChoice, Hash, Sinkhorn, TopK, Uniform

HIDDEN, EXPERTS, VOCAB = 6, 4, 20
SIZES = {"hidden_size": HIDDEN, "ffn_hidden_size": 8, "num_experts": EXPERTS}
NOISE_LOSSES = {"importance": 0.1, "load": 0.1, "load_balancing": 0.01, "z": 0.01}

# Name -> fields of the config.
FAMILIES = {
    "top_k": {},
    "gaussian": {"router": TopK(logit_noise="gaussian"), "losses": NOISE_LOSSES},
    "tutel": {"router": TopK(logit_noise="gaussian"), "losses": {"load_importance": 0.1}, "capacity_factor": -1.0},
    "gumbel": {"router": TopK(logit_noise="gumbel"), "top_k": 1},
    "sampling": {"router": TopK(second_expert="sampling"), "gate_normalization": 1.0},
    "random": {
        "router": TopK(second_expert="random"),
        "gate_normalization": 1.0,
        "capacity_factor": 1.0,
        "drop_order": "choice_major",
        "normalize_when": "after_drop",
    },
    "random_raw": {"router": TopK(second_expert="random_raw"), "gate_normalization": 1.0},
    "groups": {"token_groups": 2, "capacity_factor": 0.5, "capacity_multiple_of": 2, "drop_order": "batch_prioritized"},
    "sequence": {"token_groups": "sequence", "capacity_factor": 0.5},
    "random order": {"drop_order": "random", "capacity_factor": 0.5},
    "plain": {"load_balancing_choices": "plain", "selection_bias": True, "score_function": "sigmoid"},
    "sqrt_softplus": {
        "score_function": "sqrt_softplus",
        "gate_normalization": 1.0,
        "losses": {"z": 0.1, "sequence": 1},
    },
    "quantile": {"selection_bias": True, "selection_bias_rule": "quantile"},
    "cosine": {"router": Cosine(dim=5, logit_noise="gaussian"), "losses": NOISE_LOSSES},
    "sinkhorn": {"router": Sinkhorn(), "allow_future_leak": True},
    "sinkhorn of one": {"router": Sinkhorn(), "top_k": 1, "allow_future_leak": True},
    "base": {"router": Base(), "top_k": 1, "allow_future_leak": True},
    "hash": {"router": Hash(vocab_size=VOCAB), "top_k": 1},
    "hash, learned": {
        "router": Hash(table=[[i % 4, (i + 1 + i % 3) % 4] for i in range(VOCAB)], weights="learned"),
        "gate_normalization": 1.0,
    },
    "expert_choice": {"router": ExpertChoice(), "causal": False, "token_groups": 2},
    "uniform": {"router": Uniform(), "capacity_factor": 0.5, "drop_order": "random"},
}


def config_of(name, **more):
    """The config of a case."""
    return MoEConfig(**{**SIZES, **FAMILIES[name], **more})


def layer_of(name, dtype=None, seed=0, **more):
    """The layer of a case, the same for the same seed."""
    torch.manual_seed(seed)
    return MoE(config_of(name, **more), dtype=dtype)


def inputs(tokens=16, sequences=2, dtype=None, seed=1):
    """x ``(B, S, H)`` and ids ``(B, S)``."""
    torch.manual_seed(seed)
    shape = (sequences, tokens // sequences)
    return torch.randn(*shape, HIDDEN, dtype=dtype), torch.randint(VOCAB, shape)
