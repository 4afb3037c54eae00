"""``adapter_config.json``: what PEFT says of an adapter beside its tensors, read and written.

Rank and alpha of a target are ``r`` and ``lora_alpha``, or what the first pattern says that the target's name ends with
(PEFT 0.21, ``get_pattern_key``): ``rank_pattern`` and ``alpha_pattern`` are regular expressions.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmoe.adapters import check_dropout

CONFIG = "adapter_config.json"
TENSORS, PICKLED = "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."  # before the name of every module
# The release since which factors of a parameter (E, out, in) are as it is stored; see dmoe/lora/peft_read.py.
PARAMETERS_AS_STORED_SINCE = (0, 19)
# Options under which the factors are not all that is added to a weight.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None,),
    "layer_replication": (None,),
    "alora_invocation_tokens": (None,),
    "use_qalora": (False, None),
    "fan_in_fan_out": (False, None),
    "bias": ("none", None),
}


# Starts of training that leave the base's weights as they are; others (PiSSA, OLoRA, CorDA, LoftQ) change them.
_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")


def _is_positive(value: Any) -> bool:
    """A number above 0 that float64 holds."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return 0 < value <= 1e30


def _is_rank(value: Any) -> bool:
    return _is_positive(value) and value == int(value)


@dataclass(frozen=True)
class PeftConfig:
    """What an adapter's config says of its factors.

    Attributes:
        path: the file, for messages.
        said: everything that is in it.
    """

    path: Path
    said: Mapping[str, Any]

    def __post_init__(self) -> None:
        kind = str(self.said.get("peft_type", "LORA")).rpartition(".")[2].upper()
        if kind != "LORA":
            raise ValueError(f"{self.path}: peft_type: expected LORA, got {self.said['peft_type']!r}")
        for name, harmless in _REFUSED.items():
            if name in self.said and self.said[name] not in harmless:
                raise ValueError(
                    f"{self.path}: {name}: expected {harmless[0]!r}, as factors alone are read, got {self.said[name]!r}"
                )
        start = self.said.get("init_lora_weights")
        if start not in _STARTS:
            raise ValueError(
                f"{self.path}: init_lora_weights: expected a start that leaves the base as it is, got {start!r:.40}: "
                "factors of such an adapter belong to another base; PEFT converts it (save_pretrained with "
                "path_initial_model_for_weight_conversion)"
            )
        if not isinstance(self.said.get("use_rslora"), bool | None):
            raise ValueError(f"{self.path}: use_rslora: expected true or false, got {self.said['use_rslora']!r:.40}")
        for name, patterns, fits, what in (
            ("r", "rank_pattern", _is_rank, "a whole number of at least 1"),
            ("lora_alpha", "alpha_pattern", _is_positive, "a positive number"),
        ):
            if not fits(self.said.get(name)):
                raise ValueError(f"{self.path}: {name}: expected {what}, got {self.said.get(name)!r:.40}")
            found = self.said.get(patterns) or {}
            if not isinstance(found, dict) or not all(map(fits, found.values())):
                raise ValueError(f"{self.path}: {patterns}: expected names, each with {what}, got {found!r:.80}")
            for pattern in found:
                self._check_pattern(patterns, pattern)
        check_dropout(f"{self.path}: lora_dropout", self.dropout)

    def _check_pattern(self, name: str, pattern: str) -> None:
        """A regular expression whose search ends soon: without repeated groups, and with few repetitions."""
        try:
            if re.search(r"\)[*+?{]", pattern) or len(re.findall(r"[*+{]", pattern)) > 4 or len(pattern) > 500:
                raise ValueError("groups that repeat, or many repetitions")
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError, ValueError) as error:
            raise ValueError(
                f"{self.path}: {name}: expected names or simple regular expressions, got {pattern!r:.80}: {error}"
            ) from None

    @property
    def dropout(self) -> float:
        """``lora_dropout``, of all targets."""
        return self.said.get("lora_dropout") or 0.0

    @property
    def target_parameters(self) -> tuple[str, ...]:
        """Names, or ends of names, of adapted parameters."""
        found = self.said.get("target_parameters") or ()
        if not isinstance(found, list | tuple) or not all(isinstance(name, str) for name in found):
            raise ValueError(f"{self.path}: target_parameters: expected a list of names, got {found!r:.80}")
        return tuple(found)

    def names_parameter(self, name: str) -> bool:
        """Whether one of ``target_parameters`` is that parameter, or the end of its name."""
        return any(name == target or name.endswith(f".{target}") for target in self.target_parameters)

    @property
    def version(self) -> tuple[int, int] | None:
        """The first two numbers of the PEFT that wrote it; None where it does not say (before 0.18)."""
        numbers = re.match(r"(\d+)\.(\d+)", str(self.said.get("peft_version") or ""))
        return None if numbers is None else (int(numbers[1]), int(numbers[2]))

    def rank(self, target: str) -> int:
        """Of a module, or of a parameter of one, by its name in the model."""
        return int(self._of("rank_pattern", target, self.said["r"]))

    def scale(self, target: str) -> float:
        """``alpha / r``, or ``alpha / sqrt(r)`` for rank-stabilised adapters (Kalajdzievski 2023)."""
        alpha, rank = float(self._of("alpha_pattern", target, self.said["lora_alpha"])), self.rank(target)
        return alpha / (math.sqrt(rank) if self.said.get("use_rslora") else rank)

    def _of(self, name: str, target: str, otherwise: float) -> float:
        for pattern, value in (self.said.get(name) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", target):
                return float(value)
        return otherwise


def config_for(
    ranks: Mapping[str, tuple[int, float]],
    *,
    modules: list[str],
    parameters: list[str],
    base: str | None,
    kept: Mapping[str, Any],
    version: tuple[int, int],
    first: tuple[int, float] | None = None,
    dropout: float = 0.0,
) -> dict[str, Any]:
    """A config for adapters whose targets have these ranks and scales.

    Args:
        ranks: ``(r, scale)`` by the target's name in the model, with ``#`` for the number of an expert.
        modules, parameters: ``target_modules`` and ``target_parameters``.
        base: name or path of the model.
        kept: another config, whose other fields are taken over.
        version: of PEFT, for ``peft_version``.
        first: the ``(r, scale)`` that ``r`` and ``lora_alpha`` stand for; None is the one that most targets have.
        dropout: for ``lora_dropout``; 0 is written beside ``parameters``, as PEFT refuses any other there.
    """
    common = first or Counter(ranks.values()).most_common(1)[0][0]
    patterns = _patterns(ranks, common)
    return {
        "peft_version": ".".join(map(str, (*version, 0))),
        "peft_type": "LORA",
        "task_type": kept.get("task_type"),
        "base_model_name_or_path": base if base is not None else kept.get("base_model_name_or_path"),
        "r": common[0],
        "lora_alpha": _number(common[1] * common[0]),
        "lora_dropout": 0.0 if parameters else dropout,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "inference_mode": True,
        "init_lora_weights": True,
        "rank_pattern": {name: rank for name, (rank, _) in patterns.items()},
        "alpha_pattern": {name: _number(scale * rank) for name, (rank, scale) in patterns.items()},
        "target_modules": modules,
        "target_parameters": parameters or None,
    }


def _patterns(ranks: Mapping[str, tuple[int, float]], common: tuple[int, float]) -> dict[str, tuple[int, float]]:
    """By the end of a name where all targets that end so agree, else by the whole name."""
    by_end: dict[str, set[tuple[int, float]]] = {}
    for name, each in ranks.items():
        by_end.setdefault(_end(name), set()).add(each)
    found: dict[str, tuple[int, float]] = {}
    for name, each in ranks.items():
        if each != common:
            pattern = re.escape(_end(name) if len(by_end[_end(name)]) == 1 else name)
            # PEFT joins experts of a file into a parameter of the module.
            found[pattern.replace(r"\.\#", r"(\.\d+)?")] = each
    return found


def _end(name: str) -> str:
    """The last two parts: ``experts.gate_up_proj``; of an expert's, three."""
    parts = 3 if ".#." in name else 2
    return ".".join(name.rsplit(".", parts)[-parts:])


def _number(value: float) -> int | float:
    return int(value) if float(value).is_integer() else value
