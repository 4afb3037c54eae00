"""Tutel's dictionaries as values, checked; the user's own are left as they are."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, fields
from typing import Any

from dmoe.activations import ActivationName
from dmoe.known_activations import read_activation

# Keys of the experts' dictionary: of both types, of "ffn", and those that are refused, each with the reason.
COMMON_KEYS = frozenset({"type", "num_experts_per_device", "count_per_node", "hidden_size_per_expert", "activation_fn"})
FFN_KEYS = frozenset({"output_dim", "has_fc1_bias", "has_fc2_bias"})
REFUSED_KEYS = {
    "activation_fn_with_self": "it is called with Tutel's module; give activation_fn",
    "implicit_dropout_p": "Tutel has given it up; an nn.Dropout in activation_fn does it",
    "fused_custom_fn": "Tutel has given it up",
}


@dataclass(frozen=True)
class GateOptions:
    """One gate's dictionary. ``proj_dim`` and ``init_t`` are those of ``cosine_top``."""

    type: str
    k: int = 1
    capacity_factor: float = 1.0
    gate_noise: float = 0.0
    fp32_gate: bool = False
    proj_dim: int = 256
    init_t: float = 0.5
    device: Any = None
    dtype: Any = None


@dataclass(frozen=True)
class ExpertOptions:
    """The experts' dictionary.

    Attributes:
        gated: ``llama_ffn`` instead of ``ffn``.
        per_device: experts of a rank; -n where n ranks share one.
        hidden_size: F of an expert.
        activation: its name here.
        dropout: of the ``nn.Dropout`` behind it.
        bias1, bias2: whether there are biases.
    """

    gated: bool
    per_device: int
    hidden_size: int
    activation: ActivationName
    dropout: float
    bias1: bool
    bias2: bool


def read_gates(gate_type: Any) -> list[GateOptions]:
    """``gate_type`` as Tutel takes it: a dictionary, a list of them, or a string such as ``Top2Gate``.

    Raises:
        ValueError: a gate that dmoe has not, or an option that no gate has.
        TypeError: something else.
    """
    if isinstance(gate_type, str):
        found = re.fullmatch(r"Top(\d+)Gate", gate_type)
        if found is None:
            raise ValueError(f"moe_layer: gate_type: expected a dictionary, got {gate_type!r}")
        gate_type = {"type": "top", "k": int(found.group(1))}
        warnings.warn(f"moe_layer: gate_type: Tutel writes this as {gate_type} by now", stacklevel=3)
    gates = gate_type if isinstance(gate_type, Sequence) else [gate_type]
    if not gates or not all(isinstance(gate, Mapping) for gate in gates):
        raise TypeError(f"moe_layer: gate_type: expected a dictionary, or a list of them, got {gate_type!r:.80}")
    return [_read_gate(dict(gate)) for gate in gates]


def _read_gate(gate: dict[str, Any]) -> GateOptions:
    kind = gate.get("type")
    if kind not in ("top", "cosine_top"):
        told = " (a router of your own is dmoe.MoE(..., router_module=...))" if kind == "custom" else ""
        raise ValueError(f"moe_layer: gate_type: type: expected 'top' or 'cosine_top', got {kind!r}{told}")
    known = {field.name for field in fields(GateOptions)}
    known -= {"proj_dim", "init_t"} if kind == "top" else {"dtype"}
    _refuse_others("gate_type", gate, known)
    return GateOptions(**gate)


def read_experts(experts: Any) -> ExpertOptions:
    """``experts`` as Tutel takes it.

    Raises:
        ValueError: experts of a form that dmoe has not, or an option that they have not.
        TypeError: something else.
    """
    if not isinstance(experts, Mapping):
        raise TypeError(f"moe_layer: experts: expected a dictionary, got {type(experts).__name__}")
    given = dict(experts)
    kind = given.pop("type", None)
    if kind not in ("ffn", "llama_ffn"):
        raise ValueError(
            f"moe_layer: experts: type: expected 'ffn' or 'llama_ffn', got {kind!r}: dmoe's experts are feed-forward "
            "blocks in one operation, and call no module of yours"
        )
    llama = kind == "llama_ffn"
    for name, why in REFUSED_KEYS.items():
        if given.pop(name, None) is not None:
            raise ValueError(f"moe_layer: experts: {name}: expected none, got {experts[name]!r:.80}: {why}")
    _refuse_others("experts", given, COMMON_KEYS if llama else COMMON_KEYS | FFN_KEYS)
    width = given.get("hidden_size_per_expert")
    if not isinstance(width, int):
        raise ValueError(f"moe_layer: experts: hidden_size_per_expert: expected an integer, got {width!r}")
    activation, dropout = _activation(given.get("activation_fn"), "silu" if llama else "relu")
    return ExpertOptions(
        gated=llama,
        per_device=_per_device(given.get("count_per_node", given.get("num_experts_per_device", 1))),
        hidden_size=width,
        activation=activation,
        dropout=dropout,
        bias1=not llama and given.get("has_fc1_bias", True),
        bias2=not llama and given.get("has_fc2_bias", True),
    )


def check_output_dim(experts: Mapping[str, Any], model_dim: int) -> None:
    """Raise ValueError where experts would lead to another width."""
    width = experts.get("output_dim")
    if width not in (None, model_dim):
        raise ValueError(
            f"moe_layer: experts: output_dim: expected None or model_dim = {model_dim}, got {width}: dmoe's experts "
            "lead back to the width that they come from"
        )


def _refuse_others(argument: str, given: Mapping[str, Any], known: Set[str]) -> None:
    others = sorted(set(given) - known - {"type"})
    if others:
        raise ValueError(f"moe_layer: {argument}: expected options among {sorted(known)}, got {', '.join(others)}")


def _per_device(count: Any) -> int:
    """Experts of a rank; a fraction 1 / n, or -n, is one expert of n ranks."""
    if isinstance(count, float):
        count = -int(1 / (count + 1e-5)) if 0 < count < 1 else count
    if count == -1:
        return 1
    if not isinstance(count, int) or isinstance(count, bool) or count == 0:
        raise ValueError(
            f"moe_layer: experts: num_experts_per_device: expected experts of a rank, or -n (or 1 / n) where n ranks "
            f"share one, got {count!r}"
        )
    return count


def _activation(function: Callable[..., Any] | None, default: ActivationName) -> tuple[ActivationName, float]:
    if function is None:
        return default, 0.0
    name, dropout = read_activation(function) if callable(function) else (None, 0.0)
    if name is None:
        raise ValueError(
            "moe_layer: experts: activation_fn: expected a function that computes relu, its square, gelu (erf or "
            f"tanh), sigmoid or silu, got {function!r:.80}, which computes another one, or draws random numbers other "
            "than by an nn.Dropout on its result"
        )
    return name, dropout
