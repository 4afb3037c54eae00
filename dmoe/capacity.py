"""How many rows an expert takes at most: one formula for each system, whose roundings differ."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

CapacityFormula = Literal[
    "ceil", "ceil_of_share", "ceil_float32", "floor", "round", "ceil_per_choice", "floor_per_choice"
]


def _float32(value: float) -> float:
    """A positive number rounded to float32's 24 bits, to even, in arithmetic that a compiler can follow."""
    exponent = math.floor(math.log2(value))
    exponent -= 2.0**exponent > value  # the logarithm is rounded, too
    exponent += 2.0 ** (exponent + 1) <= value
    one = 2.0 ** (exponent - 23)
    return round(value / one) * one


def _ceil_float32(factor: float, tokens: int, top_k: int, experts: int) -> int:
    return math.ceil(_float32(_float32(tokens / experts) * _float32(factor * top_k))) if tokens else 0


# By name: factor, tokens, K and E to rows. Some differ in the order of operations alone, which moves a product off a
# whole number and so decides a row. All but one in double, as the systems named in the config compute it.
_ROWS: dict[str, Callable[[float, int, int, int], int]] = {
    "ceil": lambda factor, tokens, top_k, experts: math.ceil(factor * (tokens * top_k) / experts),
    "round": lambda factor, tokens, top_k, experts: round(factor * (tokens * top_k) / experts),  # half to even
    "ceil_of_share": lambda factor, tokens, top_k, experts: math.ceil(factor * (tokens * top_k / experts)),
    "ceil_float32": _ceil_float32,
    "floor": lambda factor, tokens, top_k, experts: math.floor(factor * (tokens * top_k / experts)),
    "ceil_per_choice": lambda factor, tokens, top_k, experts: top_k * math.ceil(factor * tokens / experts),
    "floor_per_choice": lambda factor, tokens, top_k, experts: top_k * int(factor * -(-tokens // experts)),
}


def capacity_rows(formula: CapacityFormula, factor: float, num_tokens: int, top_k: int, num_experts: int) -> int:
    """Rows of one expert by a capacity factor; the formulas are in :class:`dmoe.MoEConfig`.

    Args:
        formula: which one.
        factor: relative to an even share, positive.
        num_tokens: T; may be symbolic while tracing.
        top_k, num_experts: K and E.
    """
    if formula == "ceil_float32":
        num_tokens = int(num_tokens)  # no symbol rounds to float32
    return _ROWS[formula](factor, num_tokens, top_k, num_experts)


def round_up(rows: int, multiple: int) -> int:
    """The next multiple of ``multiple``."""
    return -(-rows // multiple) * multiple
