"""What is worth saying about a step, in words: once for each layer, and again only after it was cured."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from dmoe.monitoring.records import LayerRecord

_AT_ONCE = ("nan", "unread", "dead")  # the last has a number of steps of its own


@dataclass(frozen=True)
class Limits:
    """From where on a monitor warns.

    Attributes:
        lasting_steps: recorded steps in a row after which something is said: one alone is noise of a batch. (NaN and
            unread losses are said at once.)
        quiet_steps: recorded steps without it after which something is cured, and may be said again.
        dead_steps: recorded steps in a row in which an expert was given nothing, while an even load would have given
            each at least ten tokens.
        collapse: share of a layer's tokens that one expert takes, when that is three times an even load, too.
        certain, undecided: entropy as a share of ln E below which a router is certain of every token; and above which
            it is undecided, which is said where its load has collapsed all the same.
        dropped_share: of the assignments.
        logits_growth: times that the RMS of the router's logits has grown over its smallest so far ...
        logits_max: ... when their largest magnitude is above this.
    """

    lasting_steps: int = 3
    quiet_steps: int = 20
    dead_steps: int = 20
    collapse: float = 0.5
    certain: float = 0.02
    undecided: float = 0.98
    dropped_share: float = 0.1
    logits_growth: float = 4.0
    logits_max: float = 20.0


class Alarms:
    """Remembers what was said, and for how long experts have been idle.

    Args:
        limits: from where on.
        top_k: K by layer name.
    """

    def __init__(self, limits: Limits, top_k: Mapping[str, int]) -> None:
        self._limits, self._top_k = limits, top_k
        self._standing: dict[tuple[str, str], int] = {}  # (layer, kind) that were said: steps since it was last seen
        self._lasting: dict[tuple[str, str], int] = {}  # what was found: for how many recorded steps in a row
        self._idle: dict[str, list[int]] = {}  # for each expert, recorded steps in a row without a token
        self._even: dict[str, float] = {}  # tokens that an even load would have given each in these steps
        self._smallest: dict[str, float] = {}

    def of(self, step: int, layers: Mapping[str, LayerRecord], unread: list[str]) -> list[str]:
        """What is new in a step.

        Args:
            step: its number.
            layers: that ran.
            unread: those whose auxiliary loss waits although the step is over.
        """
        found: dict[tuple[str, str], str] = {}
        for name, layer in layers.items():
            for kind, words in self._found(name, layer):
                found[name, kind] = f"step {step}, layer {name}: {words}"
            if name in unread:
                found[name, "unread"] = (
                    f"step {step}, layer {name}: nobody has read the auxiliary loss of this step's forward; add "
                    "dmoe.aux_loss(model) to the task's loss, or build the layer with aux_loss='attached'"
                )
        gone = {key for key in self._lasting if key[0] in layers and key not in found}
        self._lasting = {key: count for key, count in self._lasting.items() if key not in gone}
        for key in list(found):
            self._lasting[key] = count = self._lasting.get(key, 0) + 1
            if count < self._limits.lasting_steps and key not in self._standing and key[1] not in _AT_ONCE:
                del found[key]
        new = [words for key, words in found.items() if key not in self._standing]
        for key in list(self._standing):
            self._standing[key] += key[0] in layers
            if self._standing[key] > self._limits.quiet_steps:
                del self._standing[key]
        self._standing |= dict.fromkeys(found, 0)
        return new

    def _found(self, name: str, layer: LayerRecord) -> Iterator[tuple[str, str]]:
        limits, experts = self._limits, len(layer.load)
        if not all(math.isfinite(value) for value in (layer.entropy, layer.router_logits_rms or 0.0)):
            yield "nan", "the router's logits are not finite (NaN or infinite)"
            return
        share, busiest = max((share, expert) for expert, share in enumerate(layer.load))
        taken = share * self._top_k[name]
        collapsed = taken > limits.collapse and share * experts > 3
        if collapsed:
            yield "collapse", f"the load has collapsed: expert {busiest} takes {taken:.0%} of the tokens"
        if (dead := self._dead(name, layer)) is not None:
            yield "dead", dead
        if layer.router_logits_rms is not None and experts > 1 and any(layer.tokens_per_expert):
            relative = layer.entropy / math.log(experts)
            if relative < limits.certain:
                yield "certain", f"the router's entropy is {layer.entropy:.3g} nats: it is certain of every token"
            if relative > limits.undecided and collapsed:
                yield (
                    "undecided",
                    f"the router is undecided (entropy {layer.entropy:.3g} of {math.log(experts):.3g} nats), and its "
                    f"load is uneven all the same",
                )
        if layer.dropped_share > limits.dropped_share:
            yield "dropped", f"{layer.dropped_share:.0%} of the assignments were dropped"
        if (grown := self._grown(name, layer)) is not None:
            yield "logits", grown

    def _dead(self, name: str, layer: LayerRecord) -> str | None:
        experts, total = len(layer.load), float(sum(layer.tokens_per_expert))
        idle = self._idle.setdefault(name, [0] * experts)
        if total:
            self._idle[name] = idle = [
                0 if count else steps + 1 for count, steps in zip(layer.tokens_per_expert, idle, strict=True)
            ]
            self._even[name] = self._even.get(name, 0.0) + total / experts if any(idle) else 0.0
        dead = [expert for expert, steps in enumerate(idle) if steps >= self._limits.dead_steps]
        if not dead or self._even.get(name, 0.0) < 10:
            return None
        some = ", ".join(map(str, dead[:8])) + (", ..." if len(dead) > 8 else "")
        which = f"expert {some} has" if len(dead) == 1 else f"{len(dead)} experts ({some}) have"
        return f"{which} had no token for {self._limits.dead_steps} recorded steps"

    def _grown(self, name: str, layer: LayerRecord) -> str | None:
        rms, largest = layer.router_logits_rms, layer.router_logits_max
        if rms is None or largest is None or not rms:
            return None
        smallest = self._smallest[name] = min(rms, self._smallest.get(name, rms))
        if rms < smallest * self._limits.logits_growth or largest < self._limits.logits_max:
            return None
        return (
            f"the router's logits grow: their RMS is {rms:.3g}, {rms / smallest:.1f} times the smallest so far, and "
            f"the largest is {largest:.3g}; a z-loss holds them back"
        )
