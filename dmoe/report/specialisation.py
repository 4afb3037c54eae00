"""Which tokens an expert prefers, of those that were counted, and what they are called."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dmoe.report.reading import RunError

MOST = 8  # tokens that are shown of an expert


def preferred(rows: Sequence[Sequence[int]]) -> list[list[tuple[int, float, int]]]:
    """Of each expert the tokens that it is given most beyond an even share.

    A token's ``times`` at an expert is the share of its assignments that the expert is given, over ``1 / E``. Tokens
    are ordered by ``count * ln(times)``, what they add to the divergence of the expert's tokens from everybody's.

    Args:
        rows: E rows of N counts.

    Returns:
        By expert: place of the token, times, count; those with at least 1.2 times and 3 counts.
    """
    totals = [sum(column) for column in zip(*rows, strict=True)]
    found = []
    for row in rows:
        scored = []
        for place, (count, total) in enumerate(zip(row, totals, strict=True)):
            times = count * len(rows) / total if total else 0.0
            if times >= 1.2 and count >= 3:
                scored.append((count * math.log(times), place, times, count))
        scored.sort(key=lambda each: (-each[0], each[1]))
        found.append([(place, times, count) for _, place, times, count in scored[:MOST]])
    return found


def names_of(tokens: str | None, tokenizer: str | None) -> Mapping[int, str]:
    """Names of token ids, from ``--tokens`` or ``--tokenizer``; empty without either.

    Raises:
        RunError: a file that is neither, or an absent package.
    """
    if tokens is not None:
        return _from_json(Path(tokens))
    if tokenizer is None:
        return {}
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise RunError("dmoe.report: --tokenizer: expected the package tokenizers: pip install tokenizers") from None
    try:
        vocabulary = Tokenizer.from_file(tokenizer)
    except Exception as error:  # it raises plain Exception
        raise RunError(f"dmoe.report: --tokenizer: expected a tokenizer.json, got {tokenizer}: {error}") from None
    return {number: vocabulary.decode([number]) or piece for piece, number in vocabulary.get_vocab().items()}


def _from_json(path: Path) -> Mapping[int, str]:
    try:
        value: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"dmoe.report: --tokens: expected a JSON file, got {path}: {error}") from None
    if isinstance(value, list):
        return {place: str(each) for place, each in enumerate(value)}
    if isinstance(value, dict) and all(isinstance(each, int) for each in value.values()):
        return {number: name for name, number in value.items()}  # as vocab.json has it
    if isinstance(value, dict) and all(name.lstrip("-").isdecimal() for name in value):
        return {int(name): str(each) for name, each in value.items()}
    raise RunError(
        f"dmoe.report: --tokens: expected a list of names, or names by id or ids by name, got {type(value).__name__} "
        f"of something else in {path}"
    )
