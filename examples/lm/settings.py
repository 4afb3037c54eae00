"""What a training run is made of: every number that decides its outcome, in one frozen value."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


class UsageError(Exception):
    """Something the user can put right; its message says what, and how."""


@dataclass(frozen=True)
class Settings:
    """Everything that decides the numbers of a run. A checkpoint carries it, so that resuming needs no flags."""

    data: tuple[str, ...] = ()
    """Files and folders to train on; empty: the Python standard library's own sources."""
    data_bytes: int = 8_000_000
    """The most text to use, in bytes."""
    layers: int = 3
    hidden: int = 128
    heads: int = 2
    ffn: int = 256
    """Width of one expert. The dense twin's FFN is ``top_k`` times as wide."""
    experts: int = 32
    top_k: int = 2
    balance: float = 0.05
    """Coefficient of the load-balancing loss, which is averaged over the layers."""
    steps: int = 2000
    batch: int = 12
    """Sequences in a step."""
    seq_len: int = 192
    """Bytes in a sequence."""
    lr: float = 6e-3
    """Peak learning rate: reached after ``warmup`` steps, then a cosine down to a tenth of it."""
    warmup: int = 100
    weight_decay: float = 0.1
    clip: float = 1.0
    """Largest norm of the gradient."""
    eval_every: int = 100
    """Steps between two measurements on the held-out text."""
    eval_bytes: int = 65_536
    """Held-out bytes in a measurement."""
    seed: int = 0
    dtype: str = "auto"
    """``float32``, or ``bfloat16`` under autocast; ``auto`` takes whichever this machine multiplies faster."""
    compile: bool = False
    compare_dense: bool = False

    def __post_init__(self) -> None:
        at_least_one = "layers hidden heads ffn experts top_k steps batch eval_every eval_bytes data_bytes"
        for name in at_least_one.split():
            if getattr(self, name) < 1:
                raise UsageError(f"--{flag(name)} must be at least 1, got {getattr(self, name)}")
        for name in ("warmup", "weight_decay", "balance", "seed"):
            if not getattr(self, name) >= 0:
                raise UsageError(f"--{flag(name)} must not be negative, got {getattr(self, name)}")
        for name in ("lr", "clip"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UsageError(f"--{flag(name)} must be positive and finite, got {getattr(self, name)}")
        if self.seq_len < 2:
            raise UsageError(f"--seq-len must be at least 2, got {self.seq_len}")
        if self.top_k > self.experts:
            raise UsageError(f"--top-k must be at most --experts ({self.experts}), got {self.top_k}")
        if self.hidden % self.heads or self.hidden // self.heads % 2:
            raise UsageError(
                f"--hidden must be --heads times an even number (rotary positions turn pairs of channels), "
                f"got --hidden {self.hidden} --heads {self.heads}"
            )

    @property
    def dense_ffn(self) -> int:
        """Width of the dense twin's FFN, at which it multiplies as much for a token as ``top_k`` experts do."""
        return self.top_k * self.ffn

    def to_dict(self) -> dict[str, Any]:
        """Only plain values, for JSON and checkpoints."""
        return {**dataclasses.asdict(self), "data": list(self.data)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Settings:
        """The inverse of `to_dict`."""
        return cls(**{**values, "data": tuple(values["data"])})


def flag(name: str) -> str:
    """The command line's spelling of a field."""
    return name.replace("_", "-")
