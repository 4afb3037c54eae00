"""Parts of an MoE layer that options name as ``targets``: projections of its experts, and of its shared expert.

Each part has two halves, ``up`` (with its gate, if there is one) and ``down``, and a target is a shell pattern of
``<part>.<half>``, or of a part, which is both.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

# Part -> path of the module of experts, in the layer.
PATHS = {"experts": "experts", "shared_expert": "shared_expert.mlp"}
HALVES = ("up", "down")
TARGETS = tuple(f"{part}.{half}" for part in PATHS for half in HALVES)


def fields_of(experts: Any) -> dict[str, str]:
    """By half, the parameter of experts, :class:`dmoe.experts.Experts` or :class:`dmoe.OtherExperts`."""
    return {"up": experts.up_name, "down": "down_proj"}


def half_of(field: str) -> str:
    """The way back: of ``gate_up_proj``, ``up_proj`` and ``down_proj``."""
    return "down" if field == "down_proj" else "up"


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a pattern names a target, or the part that it lies inside."""
    return any(fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*") for pattern in patterns)


def as_patterns(operation: str, targets: Any, argument: str = "targets") -> tuple[str, ...]:
    """What somebody gave as ``targets``, or as another argument.

    Raises:
        TypeError: no strings, or one alone.
    """
    found = tuple(targets) if isinstance(targets, Iterable) and not isinstance(targets, str) else None
    if found is None or not all(isinstance(each, str) for each in found):
        raise TypeError(f"{operation}: {argument}: expected a sequence of patterns, got {targets!r}")
    return found


def check_patterns(operation: str, patterns: Iterable[str], known: Iterable[str] = TARGETS) -> None:
    """Every pattern matches something.

    Raises:
        ValueError: one does not.
    """
    known = list(known)
    for pattern in patterns:
        if not any(matches(name, [pattern]) for name in known):
            raise ValueError(f"{operation}: targets: expected patterns of {', '.join(known)}, got {pattern!r}")
