"""The experts' activations: six by name, and those with numbers of their own, for experts with a gate.

========================  ============================================================================================
``gelu``                  ``x Phi(x)``, the exact one (Hendrycks and Gimpel 2016, section 2)
``gelu_tanh``             ``x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2`` (there, too)
``relu``                  ``max(x, 0)``
``relu_squared``          ``max(x, 0)^2`` (So et al. 2021, Primer)
``sigmoid``               ``1 / (1 + exp(-x))``
``silu``                  ``x sigmoid(x)`` (Hendrycks and Gimpel 2016; Ramachandran et al. 2017, Swish with beta = 1)
========================  ============================================================================================

Experts with a gate compute ``act(gate) * up``: the GLU of Dauphin et al. 2017 (eq. 1) with ``sigmoid``, and ReGLU,
GEGLU and SwiGLU of Shazeer 2020 (section 2) with ``relu``, ``gelu`` and ``silu``.

Operations take text, which is made here and read here, and once more in ``csrc/activation.h``: a name, or
``clamped_swiglu(7.0,1.702,1.0)`` for :class:`ClampedSwiGLU`, numbers as ``repr`` writes them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, get_args

ActivationName = Literal["gelu", "gelu_tanh", "relu", "relu_squared", "sigmoid", "silu"]
NAMES: tuple[ActivationName, ...] = get_args(ActivationName)
# What float32, in which kernels compute, can hold.
_LEAST, _MOST = 2.0**-126, 3.4e38


@dataclass(frozen=True)
class _WithNumbers:
    """An activation ``gate_factor(gate) * up_factor(up)`` of experts with a gate, and its numbers."""

    kind: ClassVar[str]
    any_sign: ClassVar[tuple[str, ...]] = ()  # numbers that may be 0 or negative

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            free = field.name in self.any_sign
            if not number or not (abs(value) <= _MOST if free else _LEAST <= value <= _MOST):
                raise ValueError(
                    f"{type(self).__name__}: {field.name}: expected a finite number{'' if free else ' above 0'}, got "
                    f"{value!r}"
                )
            object.__setattr__(self, field.name, float(value))
        # Made once, and not while somebody's compiler looks on.
        object.__setattr__(self, "_text", f"{self.kind}({','.join(repr(number) for number in self.numbers)})")

    @property
    def numbers(self) -> tuple[float, ...]:
        """In the order of the fields."""
        return tuple(getattr(self, field.name) for field in fields(self))

    def __str__(self) -> str:
        """What operations take, and :class:`dmoe.MoEConfig` as well: text that a file may hold."""
        text: str = self._text  # type: ignore[attr-defined]
        return text


@dataclass(frozen=True)
class ClampedSwiGLU(_WithNumbers):
    """``(clamp(up, -limit, limit) + up_offset) * g * sigmoid(alpha * g)`` with ``g = min(gate, limit)``.

    As it is, that of GPT-OSS (OpenAI 2025: ``swiglu`` of the published model, ``GptOssExperts._apply_gate`` of
    Transformers 5.24.0) and MiniMax-M3. ``ClampedSwiGLU(10.0, alpha=1.0, up_offset=0.0)`` is DeepSeek-V4's, GLM-5's and
    HY-V4's: a SwiGLU of clamped halves. Derivatives are those of ``torch.clamp``: 0 beyond the limits, passed on at
    them.

    Attributes:
        limit: of the gate from above, of up either way; above 0.
        alpha: what the sigmoid's argument is multiplied by; above 0.
        up_offset: what is added to up, after its clamp.

    Raises:
        ValueError: a number out of range, or no number.
    """

    limit: float = 7.0
    alpha: float = 1.702
    up_offset: float = 1.0

    kind: ClassVar[str] = "clamped_swiglu"
    any_sign: ClassVar[tuple[str, ...]] = ("up_offset",)


@dataclass(frozen=True)
class SoftcappedSwiGLU(_WithNumbers):
    """``softcap(gate, gate_cap) * sigmoid(gate) * softcap(up, up_cap)``, ``softcap(x, cap) = cap * tanh(x / cap)``.

    Inkling-2's (``Inkling2SoftcappedSwiGLU`` of Transformers 5.24.0), with caps of 4 and 25: the sigmoid sees the gate
    as it is.

    Attributes:
        gate_cap, up_cap: what the factors stay below; above 0.

    Raises:
        ValueError: a number out of range, or no number.
    """

    gate_cap: float
    up_cap: float

    kind: ClassVar[str] = "softcapped_swiglu"


Activation = ActivationName | ClampedSwiGLU | SoftcappedSwiGLU
_KINDS: tuple[type[ClampedSwiGLU] | type[SoftcappedSwiGLU], ...] = (ClampedSwiGLU, SoftcappedSwiGLU)
_WRITTEN = re.compile(r"([a-z_]+)\(([^()\s]*)\)")
EXPECTED = f"{', '.join(NAMES[:-1])} or {NAMES[-1]}, a dmoe.ClampedSwiGLU or a dmoe.SoftcappedSwiGLU"


def activation_of(value: Any, operation: str, gated: bool) -> Activation:
    """The activation that a name, a written one, or its fields by name stand for; itself where it is one.

    Args:
        value: what somebody gave.
        operation: for the error.
        gated: whether the experts have a gate, which activations with numbers need.

    Raises:
        ValueError: something else, numbers out of range, or a gate that is missing.
    """
    found: Activation | None = None
    if isinstance(value, _KINDS):
        found = value
    elif isinstance(value, str):
        found = value if value in NAMES else _read(value)
    elif isinstance(value, Mapping):  # what dataclasses.asdict makes of one
        found = next((kind(**value) for kind in _KINDS if set(value) == {field.name for field in fields(kind)}), None)
    if found is None:
        raise ValueError(f"{operation}: activation: expected {EXPECTED}, got {value!r}")
    if not gated and not isinstance(found, str):
        raise ValueError(f"{operation}: activation: expected one of {', '.join(NAMES)} with gated=False, got {found!r}")
    return found


def _read(text: str) -> ClampedSwiGLU | SoftcappedSwiGLU | None:
    """The inverse of ``str``; None for any other text."""
    written = _WRITTEN.fullmatch(text)
    kind = next((each for each in _KINDS if written is not None and each.kind == written[1]), None)
    if written is None or kind is None:
        return None
    try:
        found = kind(*(float(number) for number in written[2].split(",")))
    except (TypeError, ValueError):  # too many numbers, or none
        return None
    return found if str(found) == text else None


def kind_and_numbers(text: str) -> tuple[str, tuple[float, ...]]:
    """An operation's activation as its name and its numbers: ``("clamped_swiglu", (7.0, 1.702, 1.0))``.

    Raises:
        ValueError: text that names none.
    """
    if text in NAMES:
        return text, ()
    found = _read(text)
    if found is None:
        raise ValueError(f"moe_mlp: activation: expected {EXPECTED}, got {text!r}")
    return found.kind, found.numbers
