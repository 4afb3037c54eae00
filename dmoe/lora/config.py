"""What an adapter is, beside its numbers: rank, scale, dropout, where it stands."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from dmoe.adapters import check_dropout
from dmoe.expert_targets import as_patterns

Init = Literal["default", "gaussian"]


@dataclass(frozen=True)
class LoRA:
    """Options of one adapter: ``W + s B A`` with ``s = alpha / rank`` (LoRA, Hu et al. 2021, section 4.1).

    Attributes:
        rank: r, the rows of each expert's ``A``.
        alpha: numerator of the scale; None is ``rank``, so that ``s`` is 1 (PEFT's defaults are 8 and 8).
        rank_stabilized: ``s = alpha / sqrt(rank)`` (rsLoRA, Kalajdzievski 2023, theorem 3.2); None for ``alpha`` then
            is ``sqrt(rank)``, and ``s`` is 1 again.
        dropout: probability that a number of the adapter's input is dropped in training, where it stands beside
            experts; the router's has none.
        targets: parts of each layer, of :data:`dmoe.lora.TARGETS`, as shell patterns: ``experts`` (both projections),
            ``experts.up`` (with a gate: gate and up), ``experts.down``, ``router``, and ``shared_expert`` with
            ``.up`` and ``.down`` likewise.
        share_a, share_b: one ``A``, or one ``B``, of each projection for all experts of a layer. Not over ranks, nor
            where experts differ in the width that the factor has.
        init: ``A`` as ``nn.Linear`` begins, uniform in ``+-1 / sqrt(in)``, for ``default`` (that is Kaiming's with
            ``a = sqrt(5)``, as in LoRA's own code and PEFT); normal with standard deviation ``1 / rank`` for
            ``gaussian``. ``B`` is zero: an adapter changes nothing at first.

    Raises:
        TypeError, ValueError: a field that is none of these.
    """

    rank: int = 16
    alpha: float | None = None
    rank_stabilized: bool = False
    dropout: float = 0.0
    targets: tuple[str, ...] = ("experts",)
    share_a: bool = False
    share_b: bool = False
    init: Init = "default"

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", as_patterns("LoRA", self.targets))
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"LoRA: rank: expected an integer of at least 1, got {self.rank!r}")
        if self.alpha is not None and not (isinstance(self.alpha, int | float) and math.isfinite(self.alpha)):
            raise ValueError(f"LoRA: alpha: expected a finite number or None, got {self.alpha!r}")
        check_dropout("LoRA: dropout", self.dropout)
        for name in ("rank_stabilized", "share_a", "share_b"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"LoRA: {name}: expected True or False, got {getattr(self, name)!r}")
        if self.init not in get_args(Init):
            raise ValueError(f"LoRA: init: expected one of {', '.join(get_args(Init))}, got {self.init!r}")

    @property
    def scale(self) -> float:
        """What multiplies ``B A``."""
        divisor = math.sqrt(self.rank) if self.rank_stabilized else self.rank
        return 1.0 if self.alpha is None else self.alpha / divisor

    def to_dict(self) -> dict[str, Any]:
        """The fields, as JSON has them."""
        return {**dataclasses.asdict(self), "targets": list(self.targets)}

    @classmethod
    def from_dict(cls, fields: Any) -> LoRA:
        """What :meth:`to_dict` wrote.

        Raises:
            TypeError: no dict, or a field that there is not.
        """
        names = [each.name for each in dataclasses.fields(cls)]
        if not isinstance(fields, dict) or not set(fields) <= set(names):
            got = sorted(fields) if isinstance(fields, dict) else type(fields).__name__
            raise TypeError(f"LoRA: expected a dict of {', '.join(names)}, got {got}")
        return cls(**fields)

    def __str__(self) -> str:
        differing = [
            f"{each.name}={getattr(self, each.name)!r}"
            for each in dataclasses.fields(self)[1:]
            if getattr(self, each.name) != each.default and each.name != "targets"
        ]
        return ", ".join([f"rank={self.rank}", *differing])
