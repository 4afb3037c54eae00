"""Megatron's training arguments: what they say of the model, and how they are kept as text.

FasterTransformer's ``args.txt`` and a dmoe folder hold ``str()`` of every value, in order; a checkpoint the values.
"""

from __future__ import annotations

import ast
from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

from dmoe.checkpoint.formats.gpt_names import Sizes

Texts = Sequence[list[str]]  # [[name, str(value)], ...]


def as_text(args: Namespace) -> list[list[str]]:
    """Names and ``str()`` of the values, in order."""
    return [[str(name), str(value)] for name, value in vars(args).items()]


def from_text(texts: Texts) -> Namespace:
    """The inverse, as far as text tells: None, booleans, numbers and lists of these are such again, the rest is text.

    ``str()`` of every value is what it was.
    """
    return Namespace(**{name: _value(text) for name, text in texts})


def default_args(sizes: Sizes, norm_eps: float, top_k: int) -> list[list[str]]:
    """What a model that was not trained by Megatron says of itself, see :func:`as_text`."""
    counts = sorted(set(sizes.experts.values()))
    said: dict[str, Any] = {
        "num_layers": sizes.layers,
        "hidden_size": sizes.hidden,
        "ffn_hidden_size": sizes.ffn,
        "num_attention_heads": sizes.heads,
        "kv_channels": sizes.hidden // sizes.heads,
        "max_position_embeddings": sizes.positions,
        "layernorm_epsilon": norm_eps,
        "openai_gelu": False,
        "onnx_safe": None,
        "num_experts": counts if len(counts) == 1 else [sizes.experts.get(n, 1) for n in range(sizes.layers)],
        "bias_gelu_fusion": True,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "topk": top_k,
        "padded_vocab_size": sizes.vocabulary,
    }
    if not counts:
        del said["num_experts"]
    return as_text(Namespace(**said))


def activation_of(said: Mapping[str, Any]) -> str:
    """Which GELU the feed-forward blocks computed in training.

    Megatron's fused kernel has the tanh form, whatever else is said; without it ``F.gelu`` is the exact one, and
    ``openai_gelu`` the tanh form again.

    Args:
        said: arguments by name, values or their text.
    """
    fused = str(said.get("bias_gelu_fusion", True)) != "False"
    return "gelu_tanh" if fused or _on(said.get("openai_gelu")) else "gelu"


def tanh_gelu_warnings(texts: Texts) -> list[str]:
    """What in the arguments says that training may have run another GELU than FasterTransformer runs: tanh."""
    said: dict[str, str] = {each[0]: each[1] for each in texts}
    found = [f"{name}={said[name]}" for name in ("openai_gelu", "onnx_safe") if _on(said.get(name))]
    if said and not _on(said.get("bias_gelu_fusion")):
        found.append(f"bias_gelu_fusion={said.get('bias_gelu_fusion', 'absent')}")
    return [f"args: {each}: the model may have been trained with another GELU than tanh's" for each in found]


def whole_number(said: Mapping[str, Any], name: str, where: str) -> int | None:
    """An argument that is an integer; None where it is absent or None.

    Raises:
        ValueError: it is something else.
    """
    value = said.get(name)
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    raise ValueError(f"{where}: args.{name}: expected an integer, got {value!r:.80}")


def check_sizes(said: Mapping[str, Any], sizes: Sizes, where: str) -> None:
    """Whether the arguments fit the tensors; those that are absent do.

    Raises:
        ValueError: they do not.
    """
    expected = {
        "num_layers": sizes.layers,
        "hidden_size": sizes.hidden,
        "ffn_hidden_size": sizes.ffn,
        "kv_channels": sizes.hidden // sizes.heads,
        "max_position_embeddings": sizes.positions,
        "padded_vocab_size": sizes.vocabulary,
    }
    for name, wanted in expected.items():
        got = whole_number(said, name, where)
        if got is not None and got != wanted:
            raise ValueError(f"{where}: args.{name}: expected {wanted} as the tensors have it, got {got}")
    for name in ("apply_residual_connection_post_layernorm", "rotary_position_embeddings"):
        if _on(said.get(name)):
            raise ValueError(f"{where}: args.{name}: expected False, all that dmoe's GPT has, got {said[name]}")
    _check_experts(said.get("num_experts"), sizes, where)


def _check_experts(counts: Any, sizes: Sizes, where: str) -> None:
    """A number, or a list of one for all or of one per (MoE) layer; 1 is a dense layer."""
    if counts is None:
        return
    listed = list(counts) if isinstance(counts, list | tuple) else [counts]
    if any(isinstance(count, bool) or not isinstance(count, int) for count in listed):
        raise ValueError(f"{where}: args.num_experts: expected integers, got {counts!r:.80}")
    found = list(sizes.experts.values())
    if len(listed) == sizes.layers and len(listed) > 1:  # where all layers are MoE, both mean the same
        told = [listed[layer] for layer in sizes.experts]
    elif len(listed) == 1:
        told = [max(listed[0], 1)] * len(found)
    else:
        told = [count for count in listed if count > 1]
        found = [count for count in found if count > 1]
    if told != found or (not sizes.experts and any(count > 1 for count in listed)):
        layers = ", ".join(f"{experts} in layer {layer}" for layer, experts in sizes.experts.items()) or "none"
        raise ValueError(f"{where}: args.num_experts: expected {layers}, as the gates have it, got {counts!r:.80}")


def _on(value: Any) -> bool:
    return str(value) not in ("None", "False", "0", "")


def _value(text: str) -> Any:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text
    return value if not isinstance(value, str | bytes) and str(value) == text else text
