"""Everything that says what a :class:`dmoe.models.MoEGPT` is: a value that a file may hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from dmoe.activations import NAMES, ActivationName
from dmoe.config import MoEConfig
from dmoe.config_json import config_from_json, config_to_json

Norm = Literal["layer", "rms"]
Positions = Literal["learned", "rotary"]
_SIZES = ("vocab_size", "hidden_size", "num_layers", "num_heads", "ffn_hidden_size", "max_positions")
_SWITCHES = ("qk_norm", "bias", "tied_head", "gated")


@dataclass(frozen=True)
class MoEGPTConfig:
    """Sizes and options of a decoder. The defaults are GPT-2's; layers that ``moe`` does not name are dense.

    Attributes:
        vocab_size: V, rows of the embedding and logits of a position.
        hidden_size: H.
        num_layers: blocks, counted from 0.
        num_heads: attention heads, of H / num_heads channels each.
        ffn_hidden_size: F of the dense layers; those with experts have their own in ``moe``.
        max_positions: the longest sequence.
        norm: ``layer`` (LayerNorm) or ``rms`` (RMSNorm), before each half of a block and before the head.
        norm_eps: what the norm adds to the variance; None, for ``rms``, is the epsilon of the input's type.
        positions: ``learned`` vectors added to the embedding, or ``rotary`` (Su et al. 2021, base 10000).
        qk_norm: RMS-normalise each head's queries and keys, without weights.
        bias: of linears and of LayerNorm; the experts' is in ``moe``.
        tied_head: the embedding is the output head, too.
        activation: of the dense layers: ``silu``, ``gelu`` (exact), ``gelu_tanh``, ``relu``, ``relu_squared`` or
            ``sigmoid``.
        gated: ``act(gate) * up`` instead of ``act(up)`` in the dense layers.
        moe: layers with experts: the layer's number and its :class:`dmoe.MoEConfig`.
        residual: of these the layers of PR-MoE (:class:`dmoe.ResidualMoE`): the layer's number and the width of the
            dense block beside its experts.

    Raises:
        ValueError: a field out of range, or layers that do not fit the model.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    ffn_hidden_size: int
    max_positions: int
    norm: Norm = "layer"
    norm_eps: float | None = 1e-5
    positions: Positions = "learned"
    qk_norm: bool = False
    bias: bool = True
    tied_head: bool = True
    activation: ActivationName = "gelu_tanh"
    gated: bool = False
    moe: Mapping[int, MoEConfig] = field(default_factory=dict, hash=False)
    residual: Mapping[int, int] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for name in _SIZES:
            value = getattr(self, name)
            self._require(_is_int(value) and value >= 1, name, "an integer of at least 1")
        for name in _SWITCHES:
            self._require(isinstance(getattr(self, name), bool), name, "True or False")
        for name, allowed in (("norm", get_args(Norm)), ("positions", get_args(Positions)), ("activation", NAMES)):
            value = getattr(self, name)
            self._require(isinstance(value, str) and value in allowed, name, f"one of {', '.join(allowed)}")
        eps = self.norm_eps
        number = isinstance(eps, int | float) and not isinstance(eps, bool) and 0 <= eps < 1
        self._require(
            number or (eps is None and self.norm == "rms"), "norm_eps", "a number in [0, 1), or with 'rms' None"
        )
        self._require(self.hidden_size % self.num_heads == 0, "num_heads", f"a divisor of H = {self.hidden_size}")
        pairs = self.positions != "rotary" or self.head_size % 2 == 0
        self._require(pairs, "num_heads", "heads of an even number of channels, which 'rotary' turns in pairs")
        self._check_layers()

    def _check_layers(self) -> None:
        for name in ("moe", "residual"):
            layers = getattr(self, name)
            known = isinstance(layers, Mapping) and all(_is_int(n) and 0 <= n < self.num_layers for n in layers)
            self._require(known, name, f"a mapping of layer numbers in [0, {self.num_layers})")
            object.__setattr__(self, name, {number: layers[number] for number in sorted(layers)})
        for number, config in self.moe.items():
            where = f"MoEGPTConfig: moe: layer {number}"
            if not isinstance(config, MoEConfig):
                raise ValueError(f"{where}: expected a MoEConfig, got {type(config).__name__}")
            if config.hidden_size != self.hidden_size:
                raise ValueError(f"{where}: expected hidden_size = {self.hidden_size}, got {config.hidden_size}")
            if config.return_bias:
                raise ValueError(f"{where}: expected return_bias=False, got True, a bias that no block would add")
        for number, width in self.residual.items():
            if number not in self.moe or not _is_int(width) or width < 1:
                raise ValueError(
                    f"MoEGPTConfig: residual: expected widths of at least 1 for layers in moe "
                    f"({', '.join(map(str, self.moe)) or 'none'}), got {width!r} for layer {number}"
                )

    def _require(self, condition: bool, name: str, allowed: str) -> None:
        if not condition:
            raise ValueError(f"MoEGPTConfig: {name}: expected {allowed}, got {getattr(self, name)!r:.80}")

    @property
    def head_size(self) -> int:
        """D, channels of one head."""
        return self.hidden_size // self.num_heads

    def to_json(self) -> dict[str, Any]:
        """Every field as JSON has values; layer numbers are text there. Raises what ``config_to_json`` does."""
        plain = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        plain["moe"] = {str(number): config_to_json(config) for number, config in self.moe.items()}
        plain["residual"] = {str(number): width for number, width in self.residual.items()}
        return plain

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> MoEGPTConfig:
        """The inverse of :meth:`to_json`, also of ``json.loads`` of its text; nothing is executed.

        Raises:
            ValueError: fields that do not exist or are missing, and values that they cannot have.
        """
        fields = {each.name: each for each in dataclasses.fields(cls)}
        if not isinstance(values, Mapping):
            raise ValueError(f"MoEGPTConfig: expected an object with its fields, got {values!r:.80}")
        unknown = sorted(str(name) for name in values if name not in fields)
        if unknown:
            raise ValueError(f"MoEGPTConfig: expected its own fields, got {', '.join(unknown)}")
        missing = [name for name in _SIZES if name not in values]
        if missing:
            raise ValueError(f"MoEGPTConfig: expected {', '.join(_SIZES)}, got none of {', '.join(missing)}")
        given = dict(values)
        moe = _by_layer(given.get("moe", {}), "moe")
        return cls(
            **{
                **given,
                "moe": {number: config_from_json(config) for number, config in moe.items()},
                "residual": _by_layer(given.get("residual", {}), "residual"),
            }
        )


def _by_layer(written: Any, name: str) -> dict[int, Any]:
    plain = isinstance(written, Mapping) and all(isinstance(n, str) and n.isascii() and n.isdigit() for n in written)
    if not plain:
        raise ValueError(f"MoEGPTConfig: {name}: expected an object by layer number, got {written!r:.80}")
    return {int(number): value for number, value in written.items()}


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
