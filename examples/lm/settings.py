"""What a training run is made of: every number that decides its outcome, in one frozen value."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from typing import Any

TOP_K, BALANCE = 2, 0.05  # of the example's own layer


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
    experts: int | tuple[int, ...] = 32
    """Of every layer, or one number for each of them (PR-MoE's pyramid)."""
    top_k: int | None = None
    """None is 2, or what the preset says."""
    balance: float | None = None
    """Coefficient of the load-balancing loss, which is averaged over the layers. None is 0.05, or the preset's own."""
    gate_normalization: str | None = None
    """``sum``: a byte's gate weights add up to 1; ``none``: they are the router's probabilities. None is ``sum`` where
    there are several, or the preset's own."""
    z_loss: float | None = None
    """Coefficient of the router's z-loss, averaged over the layers. None is 0, or the preset's own."""
    shared: int = 0
    """Width of an expert that every byte takes beside its ``top_k``; 0 for none."""
    router_init: float = 1.0
    """Factor on the router's initial weights."""
    residual: bool = False
    """Beside every mixture a dense FFN as wide as one expert, and a learned mean of the two (PR-MoE)."""
    preset: str | None = None
    """Of `dmoe.presets`: the FFNs are this system's layer. None is the example's own: see `lm/layers.py`."""
    steps: int = 1000
    batch: int = 24
    """Sequences in a step. A mixture casts, clips and updates all its experts in every step, whatever a batch holds: at
    half of this, a step takes 1.3 times the dense twin's time instead of 1.1."""
    seq_len: int = 192
    """Bytes in a sequence."""
    lr: float = 6e-3
    """Peak learning rate: reached after ``warmup`` steps, then a cosine down to a tenth of it."""
    dense_lr: float | None = None
    """The dense twin's. None is ``lr``."""
    expert_lr_power: float = 0.5
    """Experts learn at ``(top_k / experts) ** expert_lr_power`` of the rate: see `lm/optimizer.py`."""
    warmup: int = 50
    weight_decay: float = 0.1
    clip: float = 1.0
    """Largest norm of the gradient."""
    eval_every: int = 50
    """Steps between two measurements on the held-out text."""
    eval_bytes: int = 65_536
    """Held-out bytes in a measurement."""
    seed: int = 0
    seeds: int = 1
    """Each model is trained so many times, with ``seed`` and those that follow it."""
    dtype: str = "auto"
    """``float32``, or ``bfloat16`` under autocast; ``auto`` takes whichever this machine multiplies faster."""
    expert_compute: str | None = None
    """``fp8``: the experts multiply 8-bit numbers. None: what ``dtype`` says, as everything else does."""
    saved_activations: str | None = None
    """``fp8``: what experts keep for backward is 8-bit numbers."""
    compile: bool = False
    compare_dense: bool = False
    teacher: str | None = None
    """Folder of a finished run, whose mixture's predictions this one learns beside the text (MoS)."""
    kd_temperature: float = 1.0
    """Both predictions are softened by it where they are compared."""
    kd_coefficient: float = 1.0
    """What the comparison weighs beside the task's loss."""
    kd_stop: int | None = None
    """The first step without the teacher: the student ends on the task's loss alone. None keeps it to the end."""

    def __post_init__(self) -> None:
        self._check_ranges()
        self._check_layers()
        if self.hidden % self.heads or self.hidden // self.heads % 2:
            raise UsageError(
                f"--hidden must be --heads times an even number (rotary positions turn pairs of channels), "
                f"got --hidden {self.hidden} --heads {self.heads}"
            )

    def _check_ranges(self) -> None:
        at_least_one = "layers hidden heads ffn top_k steps batch eval_every eval_bytes data_bytes seeds"
        for name in at_least_one.split():
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{flag(name)} must be at least 1, got {value}")
        not_negative = "warmup weight_decay balance z_loss shared router_init expert_lr_power seed"
        for name in (*not_negative.split(), "kd_coefficient", "kd_stop"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise UsageError(f"--{flag(name)} must not be negative, got {value}")
        for name in ("lr", "dense_lr", "clip", "kd_temperature"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise UsageError(f"--{flag(name)} must be positive and finite, got {value}")
        if self.seq_len < 2:
            raise UsageError(f"--seq-len must be at least 2, got {self.seq_len}")

    def _check_layers(self) -> None:
        given = self.experts if isinstance(self.experts, tuple) else (self.experts,)
        if any(number < 1 for number in given) or not given:
            raise UsageError(f"--experts must be at least 1, got {written(self.experts)}")
        if isinstance(self.experts, tuple) and len(given) != self.layers:
            raise UsageError(
                f"--experts must be one number, or one for each of the {self.layers} layers (--layers), "
                f"got {written(self.experts)}"
            )
        top_k = TOP_K if self.top_k is None and self.preset is None else self.top_k
        if top_k is not None and top_k > min(given):
            raise UsageError(f"--top-k must be at most --experts ({written(self.experts)}), got {top_k}")
        if self.gate_normalization not in (None, "sum", "none"):
            raise UsageError(f"--gate-normalization must be sum or none, got {self.gate_normalization}")
        own = {"balance": "losses", "z_loss": "losses", "gate_normalization": "gate weights", "shared": "experts",
               "router_init": "initial weights"}  # fmt: skip
        for name, what in own.items():
            if self.preset is not None and getattr(self, name) != getattr(Settings, name):
                raise UsageError(f"--{flag(name)}: --preset {self.preset} has its own {what}. Leave one of the two out")
        if self.dense_lr is not None and not self.compare_dense:
            raise UsageError("--dense-lr: expected --compare-dense, which trains the dense twin, got none")
        if self.preset is not None and self.compare_dense:
            raise UsageError("--compare-dense: the dense twin is that of the example's own layer. Leave out --preset")
        for name, default in (("kd_temperature", 1.0), ("kd_coefficient", 1.0), ("kd_stop", None)):
            if self.teacher is None and getattr(self, name) != default:
                raise UsageError(f"--{flag(name)}: expected a --teacher to learn from, got none")

    @property
    def layer_experts(self) -> tuple[int, ...]:
        """The number of experts in each layer, from input to output."""
        return self.experts if isinstance(self.experts, tuple) else (self.experts,) * self.layers

    @property
    def dense_ffn(self) -> int:
        """Width of the dense twin's FFN, at which it multiplies as much for a token as what it stands in for."""
        return ((self.top_k or TOP_K) + self.residual) * self.ffn + self.shared

    def each_run(self) -> dict[str, Settings]:
        """What is trained, each with its own settings: ``moe`` and ``dense``, of more seeds ``moe-1``, ``dense-1``."""
        runs: dict[str, Settings] = {}
        for seed in range(self.seed, self.seed + self.seeds):
            behind = "" if seed == self.seed else f"-{seed}"
            own = dataclasses.replace(self, seed=seed, seeds=1)
            runs[f"moe{behind}"] = own
            if self.compare_dense:
                runs[f"dense{behind}"] = dataclasses.replace(own, lr=self.dense_lr or self.lr)
        return runs

    def taught(self, step: int) -> bool:
        """Whether the teacher has a say in this step."""
        return self.teacher is not None and (self.kd_stop is None or step < self.kd_stop)

    def to_dict(self) -> dict[str, Any]:
        """Only plain values, for JSON and checkpoints."""
        values = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Settings:
        """The inverse of `to_dict`; what an older program did not write down has its default, which is what it did."""
        plain: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
        }
        return cls(**plain)


def experts_from(text: str) -> int | tuple[int, ...]:
    """``32`` or ``4,4,8,8``, as the command line has it."""
    try:
        numbers = tuple(int(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, or numbers as 4,4,8,8, got {text!r}") from None
    return numbers if "," in text else numbers[0]


def written(value: Any) -> str:
    """A value as the command line has it."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def flag(name: str) -> str:
    """The command line's spelling of a field."""
    return name.replace("_", "-")
