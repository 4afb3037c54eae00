"""Reading a run's folder: every line checked, none trusted, and only one step's numbers in memory at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dmoe.monitoring import METRICS, TOKENS

_OPTIONAL = ("entropy", "router_logits_rms", "router_logits_max", "expert_similarity", "bytes_sent")


class RunError(Exception):
    """A folder that no page can be made of; the message is one sentence."""


@dataclass
class Run:
    """What is known of a run before its steps are read again.

    Attributes:
        path: of ``metrics.jsonl``.
        name: the folder's.
        ranks: how many trained.
        top_k: K by layer name, as far as the run's first lines say.
        lines: where in the file each step's line begins, by number: of two lines about one step the later.
        layers: E by name, of all layers that ran in any step, in the order in which they came.
        warnings: of all steps that count, in order: number, sentence.
        notes: what was left out of the file, as sentences.
        tokens: what ``tokens.json`` holds; None where there is none.
    """

    path: Path
    name: str
    ranks: int = 1
    top_k: dict[str, int] = field(default_factory=dict)
    lines: dict[int, int] = field(default_factory=dict)
    layers: dict[str, int] = field(default_factory=dict)
    warnings: list[tuple[int, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tokens: Mapping[str, Any] | None = None

    def steps(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Every step's number and line, ascending, read anew."""
        with open(self.path, "rb") as file:
            for number in sorted(self.lines):
                file.seek(self.lines[number])
                yield number, json.loads(file.readline())


def read_run(folder: str | Path) -> Run:
    """Look at every line of a run's folder.

    Raises:
        RunError: no such file, or no line in it that is a step.
    """
    folder = Path(folder)
    path = folder / METRICS
    if not path.is_file():
        raise RunError(f"dmoe.report: RUN: expected a folder with {METRICS}, which dmoe.monitor writes, got {folder}")
    run, wrong, told = Run(path, folder.resolve().name), list[int](), dict[int, list[str]]()
    position = number = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                value = _checked(json.loads(line))
            except (ValueError, RecursionError):
                if line.endswith(b"\n"):
                    wrong.append(number)
                else:
                    run.notes.append(
                        f"The last line ({number}) is half a line, which a run leaves that is killed: left out."
                    )
                value = {}
            if value.get("kind") == "run":
                run.ranks = value.get("ranks", run.ranks)
                run.top_k |= {name: about["top_k"] for name, about in value["layers"].items()}
            elif value.get("kind") == "step":
                run.lines[value["step"]] = position
                told[value["step"]] = value.get("warnings", [])
                for name, layer in value["layers"].items():
                    run.layers[name] = max(run.layers.get(name, 0), len(layer["tokens_per_expert"]))
            position += len(line)
    if wrong:
        some = ", ".join(map(str, wrong[:20])) + (", ..." if len(wrong) > 20 else "")
        which = f"Line {some} is" if len(wrong) == 1 else f"{len(wrong)} lines ({some}) are"
        run.notes.append(f"{which} no record of a run, and left out.")
    if not run.lines:
        raise RunError(f"dmoe.report: {path}: expected at least one recorded step, got none in {number} lines")
    run.warnings = [(step, text) for step in sorted(told) for text in told[step]]
    run.tokens = _tokens(folder / TOKENS, run)
    return run


def _checked(value: Any) -> dict[str, Any]:
    """A line that is what it says it is; of another kind, which a later version may write, an empty one.

    Raises:
        ValueError: it is not.
    """
    _expect(isinstance(value, dict))
    if value.get("kind") == "run":
        _expect(isinstance(value.get("layers"), dict))
        _expect(all(isinstance(each, dict) and _is_count(each.get("top_k")) for each in value["layers"].values()))
        _expect("ranks" not in value or _is_count(value["ranks"]))
        return value
    if value.get("kind") != "step":
        return {}
    _expect(_is_count(value.get("step")) and isinstance(value.get("layers"), dict))
    _expect(_numbers(value.get("parts", {})) and _is_number(value.get("seconds")) and _is_number(value.get("tokens")))
    warnings = value.get("warnings", [])
    _expect(isinstance(warnings, list) and all(isinstance(each, str) for each in warnings))
    for layer in value["layers"].values():
        _expect(isinstance(layer, dict))
        tokens = layer.get("tokens_per_expert")
        kept = layer.get("kept_per_expert", tokens)
        for counts in (tokens, kept):
            _expect(_counts(counts))
        _expect(len(tokens) == len(kept))
        _expect(all(_is_number(layer.get(name)) for name in _OPTIONAL) and _numbers(layer.get("seconds", {})))
    return value


def _expect(fine: bool) -> None:
    if not fine:
        raise ValueError


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def _counts(values: Any) -> bool:
    """A list of at least one; as :func:`_is_count`, and in a tenth of the time: it sees most of a file."""
    if not isinstance(values, list) or set(map(type, values)) != {int}:
        return False
    return min(values) >= 0 and max(values) < 2**53


def _is_number(value: Any) -> bool:
    """A finite number, or none."""
    if value is None:
        return True
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _numbers(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_number(each) for each in value.values())


def _tokens(path: Path, run: Run) -> Mapping[str, Any] | None:
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_bytes())
        _expect(
            isinstance(value, dict) and isinstance(value.get("ids"), list) and isinstance(value.get("layers"), dict)
        )
        _expect(all(isinstance(each, int) for each in value["ids"]))
        for rows in value["layers"].values():
            _expect(isinstance(rows, list) and bool(rows))
            for row in rows:
                _expect(_counts(row) and len(row) == len(value["ids"]))
    except (ValueError, RecursionError):
        run.notes.append(f"{TOKENS} is no table of tokens, and left out.")
        return None
    return value
