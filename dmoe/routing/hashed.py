"""Hash layers: a token's id says where it goes (Roller et al. 2021)."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dmoe.config import MoEConfig
from dmoe.losses import NOISE_LOSSES
from dmoe.router_family import RouterFamily, register
from dmoe.routing.base import Routing
from dmoe.routing.token_choice import TopK, TopKRouter
from dmoe.routing.unlearned import UnlearnedRouter


@register("hash")
@dataclass(frozen=True)
class Hash(RouterFamily):
    """Experts by a table of token ids, fixed before training; give one of three.

    Args:
        vocab_size: a random table of so many ids, as ParlAI draws it: ``random.Random(seed).randrange(E)`` id by id.
        frequencies: a balanced one: ids from frequent to rare, each to the expert with the least load so far, the first
            of equals (MoEBERT). Ids of frequency 0 are drawn as above.
        table: your own: the expert of each id, or K of them (DeepSeek-V4's ``tid2eid``).
        seed: of what is drawn. The same table in every layer of a model with the same seed.
        weights: ``one``: gate weights are 1 / K, and there is nothing to learn; ``learned``: those of token choice, of
            a learned linear, for the experts that the table names (DeepSeek-V4).
    """

    vocab_size: int | None = None
    frequencies: Sequence[int] | None = field(default=None, repr=False)
    table: Sequence[int] | Sequence[Sequence[int]] | None = field(default=None, repr=False)
    seed: int = 42
    weights: Literal["one", "learned"] = "one"

    def __post_init__(self) -> None:
        for name in ("frequencies", "table"):
            given = getattr(self, name)
            if hasattr(given, "tolist"):  # a tensor, or NumPy's
                given = given.tolist()
            if given is not None:
                if not isinstance(given, Sequence) or isinstance(given, str) or not given:
                    raise ValueError(f"Hash: {name}: expected a number for each of at least one id, got {given!r:.80}")
                rows = tuple(tuple(row) if isinstance(row, Sequence) else row for row in given)
                object.__setattr__(self, name, rows)
        super().__post_init__()

    def __repr__(self) -> str:
        digests = {
            name: f"<{len(given)} ids, crc32 {zlib.crc32(repr(given).encode()):08x}>"
            for name in ("frequencies", "table")
            if (given := getattr(self, name)) is not None
        }
        shown = {"vocab_size": self.vocab_size, **digests, "seed": self.seed, "weights": repr(self.weights)}
        return f"Hash({', '.join(f'{name}={value}' for name, value in shown.items() if value is not None)})"

    @property
    def weights_sum_to_1(self) -> bool:  # type: ignore[override]
        """See :class:`dmoe.router_family.RouterFamily`."""
        return self.weights == "one"

    @property
    def unread(self) -> tuple[str, ...]:  # type: ignore[override]
        """See :class:`dmoe.router_family.RouterFamily`."""
        of_choice = ("selection_bias", "num_groups")
        of_logits = ("router_bias", "router_logit_softcap", "input_jitter")
        of_scores = ("score_function", "softmax_order", "gate_normalization", *of_logits)
        return of_choice if self.weights == "learned" else (*of_choice, *of_scores)

    @property
    def lacks_losses(self) -> tuple[str, ...]:  # type: ignore[override]
        """See :class:`dmoe.router_family.RouterFamily`."""
        of_noise = NOISE_LOSSES
        return of_noise if self.weights == "learned" else (*of_noise, "z")

    def _check_fields(self) -> None:
        vocab = self.vocab_size
        self.require(vocab is None or vocab >= 1, "vocab_size", "at least 1, or None")
        given = self.frequencies or ()
        if not all(isinstance(each, Real) for each in given):
            raise ValueError("Hash: frequencies: expected one number for each id, got something else")
        negative = any(each < 0 for each in given)
        if negative:
            raise ValueError("Hash: frequencies: expected numbers of at least 0, got a negative one")
        for number, row in enumerate(self.table or ()):
            if not all(isinstance(expert, Integral) for expert in (row if isinstance(row, tuple) else (row,))):
                raise ValueError(f"Hash: table: expected integers, got {row!r:.80} for id {number}")

    def check(self, config: MoEConfig) -> None:
        """See :class:`dmoe.router_family.RouterFamily`."""
        super().check(config)
        given = [name for name in ("vocab_size", "frequencies", "table") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                "MoEConfig: router: expected one of vocab_size, frequencies and table with 'hash', as in "
                f"dmoe.routing.Hash(vocab_size=50257), got {' and '.join(given) or 'none'}"
            )
        if self.table is None:
            if config.top_k != 1:
                raise ValueError(
                    f"MoEConfig: top_k: expected 1 with router='hash' (a table of yours may name more), got "
                    f"{config.top_k}"
                )
            return
        width, most = config.top_k, config.num_experts
        for number, row in enumerate(self.table):
            experts = row if isinstance(row, tuple) else (row,)
            if len(experts) != width or len(set(experts)) != width or any(not 0 <= e < most for e in experts):
                raise ValueError(
                    f"Hash: table: expected {width} different expert{'s' if width > 1 else ''} in [0, {most}) for "
                    f"each id, got {row} for id {number}"
                )

    def experts_of_ids(self, num_experts: int) -> Tensor:
        """The table as a tensor, ``(V, K)`` int64."""
        if self.table is not None:
            return torch.tensor(self.table, dtype=torch.int64, device="cpu").view(len(self.table), -1)
        draw = random.Random(self.seed)
        if self.frequencies is None:
            assert self.vocab_size is not None
            drawn = [draw.randrange(num_experts) for _ in range(self.vocab_size)]
            return torch.tensor(drawn, dtype=torch.int64, device="cpu").unsqueeze(1)
        load, experts = [0] * num_experts, [0] * len(self.frequencies)
        for token, count in sorted(enumerate(self.frequencies), key=lambda pair: -pair[1]):
            experts[token] = load.index(min(load)) if count else draw.randrange(num_experts)
            load[experts[token]] += count
        return torch.tensor(experts, dtype=torch.int64, device="cpu").unsqueeze(1)

    def build(self, config: MoEConfig, *, ranks: Any = None, device: Any = None, dtype: Any = None) -> nn.Module:
        """See :class:`dmoe.router_family.RouterFamily`."""
        kind = HashRouter if self.weights == "one" else LearnedHashRouter
        return kind(config, self, ranks=ranks, device=device, dtype=dtype)


class _Table(nn.Module):
    """The table, where it is needed; not saved, since the config says it.

    No buffer: ``to_empty`` would leave it unwritten, and nothing that is loaded afterwards would put it right.
    """

    def __init__(self, family: Hash, num_experts: int, device: Any) -> None:
        super().__init__()
        self.experts = family.experts_of_ids(num_experts)
        if device is not None:
            self._follow(torch.device(device))

    def _follow(self, device: torch.device) -> None:
        if device != self.experts.device and device.type != "meta":
            self.experts = self.experts.to(device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Table:
        super()._apply(fn, recurse)
        self._follow(fn(self.experts).device)
        return self

    def forward(self, token_ids: Tensor | None, token_mask: Tensor | None) -> Tensor:
        """``(T,)`` ids to ``(T, K)`` experts; ids that ``token_mask`` leaves out may be any number."""
        if token_ids is None:
            raise ValueError(
                "MoE: token_ids: expected the ids of the tokens, which router='hash' goes by, got none: call the layer "
                "as layer(x, token_ids=ids)"
            )
        if token_mask is not None:
            token_ids = token_ids.masked_fill(~token_mask, 0)
        self._follow(token_ids.device)
        if token_ids.device.type == "cpu" and not torch.compiler.is_compiling() and token_ids.numel():
            low, high = token_ids.min().item(), token_ids.max().item()
            if low < 0 or high >= len(self.experts):
                raise ValueError(
                    f"MoE: token_ids: expected ids in [0, {len(self.experts)}), the table of router='hash', got "
                    f"{low} to {high}"
                )
        return self.experts.to(token_ids.device)[token_ids.long()]


class HashRouter(UnlearnedRouter):
    """The router of :class:`Hash` with ``weights="one"``: no parameters, no probabilities, no losses."""

    def __init__(
        self, config: MoEConfig, options: Hash, *, ranks: Any = None, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(config, ranks=ranks, device=device, dtype=dtype)
        self.table = _Table(options, config.num_experts, device)

    def choose(self, x: Tensor, token_ids: Tensor | None, token_mask: Tensor | None) -> Tensor:
        """What the table says; see :class:`dmoe.routing.unlearned.UnlearnedRouter`.

        Raises:
            ValueError: no ``token_ids``, or, on the CPU, ids that the table does not have.
        """
        return self.table(token_ids, token_mask)

    @property
    def gate_weight(self) -> float:
        """What every choice weighs."""
        return self.config.gate_scale / self.config.top_k

    def extra_repr(self) -> str:
        """For ``print(model)``."""
        return f"num_experts={self.config.num_experts}, {self.config.router}"


class LearnedHashRouter(TopKRouter):
    """The router of :class:`Hash` with ``weights="learned"``: token choice whose choice is the table's."""

    def __init__(self, config: MoEConfig, options: Hash, **where: Any) -> None:
        super().__init__(config, TopK(), **where)
        self.table = _Table(options, config.num_experts, where.get("device"))

    def forward(
        self,
        x: Tensor,
        *,
        token_mask: Tensor | None = None,
        token_ids: Tensor | None = None,
        expert_indices: Tensor | None = None,
        num_sequences: int = 1,
    ) -> Routing:
        """Route ``(T, H)``; see :class:`HashRouter`."""
        chosen = self.table(token_ids, token_mask) if expert_indices is None else expert_indices
        return super().forward(x, token_mask=token_mask, expert_indices=chosen, num_sequences=num_sequences)
