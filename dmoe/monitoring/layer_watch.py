"""What one layer does in a step, seen by hooks on it, its router and its experts.

In eager mode every forward is seen as it happens. Inside a compiled graph hooks are traced with the layer: what they
keep are values of the graph, and it is the model's own hooks, or the end of the step, that take them along with
``layer.last_metrics``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dmoe.layer import MoE
from dmoe.metrics import RoutingMetrics
from dmoe.monitoring.clocks import Clock, Clocks
from dmoe.routing import Routing

Size = tuple[Tensor, Tensor, int | Tensor]  # norm, largest magnitude, number


def inside_backward() -> bool:
    """Whether this runs inside a backward: a forward there is an activation checkpoint's, run again."""
    return torch._C._current_graph_task_id() != -1


def only_looks(hook: Callable[..., None]) -> Callable[..., None]:
    """Mark a hook that changes nothing, so that the experts' weights may still be used ahead of their forward."""
    hook.only_looks = True  # type: ignore[attr-defined]
    return hook


@torch.no_grad()
def logits_size(routing: Routing) -> Size | None:
    """Norm, largest magnitude and number of the logits of tokens that count, scalars; None where there are none."""
    logits, mask = routing.router_logits, routing.token_mask
    if logits is None or not logits.numel():
        return None
    logits = logits.detach()
    count: int | Tensor = logits.numel()
    if mask is not None:
        logits, count = logits.masked_fill(~mask.unsqueeze(1), 0), mask.sum() * logits.shape[1]
    wide = torch.promote_types(logits.dtype, torch.float32)
    low, high = logits.aminmax()  # which the infinity norm takes ten times as long to find, on a CPU
    return torch.linalg.vector_norm(logits, dtype=wide), torch.maximum(-low, high), count


class LayerWatch:
    """One layer's hooks, and what they saw since :meth:`begin`.

    Args:
        name: of the layer.
        layer: the layer.
        clocks: for its parts' times.
        routed: called with this, the choices ``(T, K)`` of each forward that counts (None where experts choose), and T.

    Attributes:
        metrics: of each forward that counts.
        sizes: of each one's logits, see :func:`logits_size`.
        tokens: how many there were.
    """

    def __init__(
        self, name: str, layer: MoE, clocks: Clocks, routed: Callable[[LayerWatch, Tensor | None, int], None]
    ) -> None:
        self.name, self.layer = name, layer
        self._clocks, self._routed = clocks, routed
        self._active = False
        self._taken: RoutingMetrics | None = None
        self._seen: tuple[Size | None, Tensor | None, int] | None = None  # of a forward that has not ended
        self._last: tuple[str, Any] | None = None
        self._spans: list[tuple[Clock, str, Any, Any]] = []
        self._clock: Clock | None = None
        self.metrics: list[RoutingMetrics] = []
        self.sizes: list[Size] = []
        self.tokens = 0

    def start(self) -> list[Any]:
        """Put the hooks in; their handles."""
        router, experts = self.layer.router, self.layer.experts
        return [
            self.layer.register_forward_pre_hook(self._layer_begins),
            router.register_forward_hook(self._router_ends),
            experts.register_forward_pre_hook(self._experts_begin),
            experts.register_forward_hook(self._experts_end),
            self.layer.register_forward_hook(self._layer_ends),
        ]

    def begin(self, active: bool) -> None:
        """A step begins, which is recorded or not."""
        self._active, self._seen, self._last, self.tokens = active, None, None, 0
        self.metrics, self.sizes, self._spans = [], [], []
        self.skip()

    def skip(self) -> None:
        """What ran until now is not of this step, or was counted."""
        self._taken = self.layer.last_metrics

    def take(self) -> None:
        """Count the layer's last forward, unless that has been done."""
        metrics = self.layer.last_metrics
        if metrics is None or metrics is self._taken:
            return
        self._taken = metrics
        self.metrics.append(metrics)
        if self._seen is not None:
            size, chosen, tokens = self._seen
            self._seen = None
            if size is not None:
                self.sizes.append(size)
            self.tokens += tokens
            self._routed(self, chosen, tokens)

    def seconds(self) -> dict[str, float]:
        """Of the forwards that were seen, by part; it waits for the device."""
        total: dict[str, float] = {}
        for clock, part, first, second in self._spans:
            total[part] = total.get(part, 0.0) + clock.between(first, second)
        return total

    # ---------------------------------------------------------------- hooks, in the order in which a forward comes by

    def _layer_begins(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        if torch.compiler.is_compiling() or not self._active or inside_backward():
            return
        self._seen = None
        self._clock = self._clocks.of(args[0].device) if args else None
        self._last = None if self._clock is None else ("router", self._clock.now())

    def _router_ends(self, router: nn.Module, args: Any, routing: Routing) -> None:
        if torch.compiler.is_compiling():
            self._see(routing)
        elif self._active and not inside_backward():
            self._pass("dispatch")
            self._see(routing)

    def _see(self, routing: Routing) -> None:
        chosen = routing.expert_indices
        self._seen = (logits_size(routing), None if chosen is None else chosen.detach(), routing.plan.num_tokens)

    @only_looks
    def _experts_begin(self, experts: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling() and self._active and not inside_backward():
            self._pass("experts")

    def _experts_end(self, experts: nn.Module, args: Any, y: Any) -> None:
        if not torch.compiler.is_compiling() and self._active and not inside_backward():
            self._pass("combine")

    def _layer_ends(self, layer: nn.Module, args: Any, y: Any) -> None:
        if torch.compiler.is_compiling() or not self._active:
            return
        if inside_backward():
            self.skip()
            return
        self._pass(None)
        self.take()

    def _pass(self, part: str | None) -> None:
        """What runs from here on is such a part of the layer."""
        if self._last is None or self._clock is None:
            return
        before, mark = self._last
        now = self._clock.now()
        self._spans.append((self._clock, before, mark, now))
        self._last = None if part is None else (part, now)
