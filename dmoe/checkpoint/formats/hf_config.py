"""What a Hugging Face ``config.json`` says of a family's MoE layers, as options of :class:`dmoe.MoEConfig`.

What a family computes is read from Transformers 5.24.0, as in ``dmoe.integrations.transformers``; a value that the file
leaves out is that of Transformers' config class. Sizes and biases are the tensors'.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dmoe.activations import ClampedSwiGLU
from dmoe.routing import TopK

_ABSENT = object()
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu_squared",
    "sigmoid": "sigmoid",
}
# of NLLB, whose draws do not end with training
_SECOND = {
    "all": TopK(),
    "sampling": TopK(second_expert="sampling", noise_in_eval=True),
    "random": TopK(second_expert="random_raw", noise_in_eval=True),
}


class LackingError(Exception):
    """An option that :class:`dmoe.MoE` lacks, as a part of a sentence."""


class Said:
    """A config by its fields.

    Args:
        config: of ``config.json``; a model of text inside one of more has its own, ``text_config``, which counts.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        text = config.get("text_config")
        self._config = {**config, **text} if isinstance(text, Mapping) else config

    def __call__(self, *names: str, otherwise: Any = None) -> Any:
        """The first of some fields that is there, with dots where it lies deeper; None counts as a value."""
        for name in names:
            value: Any = self._config
            for part in name.split("."):
                value = value.get(part, _ABSENT) if isinstance(value, Mapping) else _ABSENT
            if value is not _ABSENT:
                return value
        return otherwise


def _activation(said: Said, *names: str, otherwise: str = "silu") -> str:
    name = said(*names, otherwise=otherwise)
    if name not in _ACTIVATIONS:
        raise LackingError(f"the activation {name!r}, {names[0]} of its config")
    return _ACTIVATIONS[name]


def _top_k(said: Said, otherwise: int) -> dict[str, Any]:
    return {"top_k": said("num_experts_per_tok", "experts_per_token", otherwise=otherwise)}


def _balanced(said: Said, top_k: Any, *names: str) -> dict[str, Any]:
    """Their loss is K times ours: its shares of tokens sum to K."""
    coefficient = said(*(names or ("router_aux_loss_coef",)), otherwise=0)
    return {"load_balancing_coefficient": float(top_k * coefficient) if coefficient else 0.0}


def _softmax(said: Said, top_k: int, **more: Any) -> dict[str, Any]:
    chosen = _top_k(said, top_k)
    return {**chosen, "activation": _activation(said, "hidden_act"), **_balanced(said, chosen["top_k"]), **more}


def _normalized(said: Said, otherwise: bool) -> float | None:
    return 1.0 if said("norm_topk_prob", otherwise=otherwise) else None


def _mixtral(said: Said) -> dict[str, Any]:
    jitter = {"input_jitter": said("router_jitter_noise") or 0.0, "input_jitter_on": "layer"}
    return _softmax(said, 2, gate_normalization=1.0, **jitter)


def _deepseek_v3(said: Said) -> dict[str, Any]:
    if (method := said("topk_method", otherwise="noaux_tc")) != "noaux_tc":
        raise LackingError(f"topk_method {method!r}, where this family's is 'noaux_tc'")
    if (scores := said("scoring_func", otherwise="sigmoid")) != "sigmoid":
        raise LackingError(f"scoring_func {scores!r}, where this family's is 'sigmoid'")
    groups = said("n_group", otherwise=8) or 1
    grouped = {"num_groups": groups, "top_k_groups": said("topk_group", otherwise=4), "group_score": "top2_sum"}
    return {
        **_top_k(said, 8),
        "activation": _activation(said, "hidden_act"),
        "score_function": "sigmoid",
        **(grouped if groups != 1 else {}),
        "gate_normalization": _normalized(said, True),
        "gate_scale": said("routed_scaling_factor", otherwise=2.5),
        **_balanced(said, 1),
    }


def _switch(said: Said) -> dict[str, Any]:
    return {
        "top_k": 1,
        "activation": _activation(said, "dense_act_fn", "feed_forward_proj", otherwise="relu"),
        "activation_dropout": said("dropout_rate", otherwise=0.1),
        "capacity": said("expert_capacity", otherwise=64),
        "token_groups": "sequence",
        # The experts see it, too: it is multiplied in place.
        "input_jitter": said("router_jitter_noise", otherwise=0.01),
        "input_jitter_on": "layer",
        **_balanced(said, 1),
        "router_z_loss_coefficient": said("router_z_loss_coef", otherwise=0.0),
    }


def _nllb(said: Said) -> dict[str, Any]:
    policy = said("second_expert_policy", otherwise="all")
    if policy not in _SECOND:
        raise LackingError(f"second_expert_policy {policy!r}")
    share = said("moe_eval_capacity_token_fraction", otherwise=1.0)
    capacity = said("expert_capacity", otherwise=64)
    if capacity is None:  # twice an even share
        rows = {"capacity_factor": 1.0, "capacity_formula": "ceil_per_choice"}
    else:
        rows = {"capacity": capacity}
    return {
        "top_k": 2,
        "activation": _activation(said, "activation_function", otherwise="relu"),
        "activation_dropout": said("activation_dropout", otherwise=0.0),
        "router": _SECOND[policy],
        "gate_normalization": 1.0,
        "normalize_when": "before_drop" if said("normalize_router_prob_before_dropping") else "after_drop",
        "gate_scale": 1.0 - said("moe_token_dropout", otherwise=0.2),
        **rows,
        "eval_capacity_fraction": share if share > 0 else None,
        "drop_order": "batch_prioritized" if said("batch_prioritized_routing") else "choice_major",
        **_balanced(said, 2),
    }


def _gpt_oss(said: Said) -> dict[str, Any]:
    chosen = _top_k(said, 4)
    limit, alpha = said("swiglu_limit", otherwise=7.0), said("swiglu_alpha", otherwise=1.702)
    return {
        **chosen,
        "softmax_order": "after_topk",
        "activation": ClampedSwiGLU(limit, alpha),
        **_balanced(said, chosen["top_k"]),
    }


def _dbrx(said: Said) -> dict[str, Any]:
    top_k = said("ffn_config.moe_top_k", otherwise=1)
    return {
        "top_k": top_k,
        "activation": _activation(said, "ffn_config.ffn_act_fn.name"),
        "gate_normalization": said("ffn_config.moe_normalize_expert_weights", otherwise=1.0),
        "input_jitter": said("ffn_config.moe_jitter_eps") or 0.0,
        "input_jitter_on": "layer",
        **_balanced(said, top_k, "ffn_config.moe_loss_weight"),
    }


OPTIONS: dict[str, Callable[[Said], dict[str, Any]]] = {
    "mixtral": _mixtral,
    "qwen2_moe": lambda said: _softmax(said, 4, gate_normalization=_normalized(said, False)),
    "qwen3_moe": lambda said: _softmax(said, 8, gate_normalization=_normalized(said, False)),
    "olmoe": lambda said: _softmax(said, 8, gate_normalization=_normalized(said, False)),
    "deepseek_v3": _deepseek_v3,
    "granitemoe": lambda said: _softmax(said, 2, softmax_order="after_topk"),
    "switch_transformers": _switch,
    "nllb_moe": _nllb,
    "gpt_oss": _gpt_oss,
    "llama4": lambda said: _softmax(said, 1, score_function="sigmoid", gate_weight_on="input"),
    "dbrx": _dbrx,
}
_OWN_WIDTH = ("qwen2_moe", "qwen3_moe", "deepseek_v3")  # F is not that of dense layers


def sizes(family: str, said: Said) -> dict[str, tuple[str, list[Any]]]:
    """What a config says of sizes: field of :class:`dmoe.MoEConfig` -> the config's field, and values that fit.

    Fields that are not there are left out.
    """
    width = {"switch_transformers": ("d_ff",), "nllb_moe": ("encoder_ffn_dim", "decoder_ffn_dim")}
    width |= {"dbrx": ("ffn_config.ffn_hidden_size",)} | dict.fromkeys(_OWN_WIDTH, ("moe_intermediate_size",))
    count = ("num_local_experts", "num_experts", "n_routed_experts", "ffn_config.moe_num_experts")
    names: dict[str, tuple[str, ...]] = {
        "hidden_size": ("d_model", "hidden_size"),
        "num_experts": count,
        "ffn_hidden_size": width.get(family, ("intermediate_size",)),
    }
    if family == "qwen2_moe":
        names["shared_ffn_hidden_size"] = ("shared_expert_intermediate_size",)
    there = {field: [name for name in given if said(name) is not None] for field, given in names.items()}
    found = {field: (" or ".join(given), [said(name) for name in given]) for field, given in there.items() if given}
    shared, each = said("n_shared_experts"), said("moe_intermediate_size")
    if family == "deepseek_v3" and shared and each:
        found["shared_ffn_hidden_size"] = ("n_shared_experts * moe_intermediate_size", [shared * each])
    return found


def notes_on(family: str, said: Said) -> list[str]:
    """What a family's config says and dmoe's cannot, in sentences."""
    dropout = said("moe_token_dropout", otherwise=0.2) if family == "nllb_moe" else 0
    if not dropout:
        return []
    return [
        f"NLLB-MoE multiplies what experts give by 1 - {dropout} in evaluation alone, which gate_scale does here, in "
        f"training as well: for training set gate_scale=1 (its dropout of experts' outputs has no option in dmoe.MoE)."
    ]
