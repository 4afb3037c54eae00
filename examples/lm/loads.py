"""How loaded experts were over a stretch of forwards. Layers may have different numbers of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dmoe import MoE

from .ranks import Ranks


class Loads:
    """Adds up what layers say of their last forwards, without a wait for the device, and tells it when asked.

    This rank's share; the sum over ranks is the measure of the batch.

    Args:
        layers: from input to output.
        device: where they run.
    """

    def __init__(self, layers: Sequence[MoE], device: torch.device) -> None:
        self.layers = layers
        self.experts = [layer.config.num_experts for layer in layers]
        self.forwards = 0
        self._load = torch.zeros(sum(self.experts), dtype=torch.int64, device=device)
        self._dropped = torch.zeros(len(layers), dtype=torch.int64, device=device)
        self._entropy = torch.zeros(len(layers), dtype=torch.float64, device=device)

    def add(self, share: float) -> None:
        """Count the last forward, in which this rank had ``share`` of the sequences."""
        for index, (layer, load) in enumerate(zip(self.layers, self._load.split(self.experts), strict=True)):
            metrics = layer.last_metrics
            if metrics is None:
                raise RuntimeError(f"layer {index} kept no metrics of a forward")
            load += metrics.tokens_per_expert
            self._dropped[index] += (metrics.tokens_per_expert - metrics.kept_per_expert).sum()
            self._entropy[index] += metrics.entropy * share
        self.forwards += 1

    def clear(self) -> None:
        """Begin anew."""
        for counts in (self._load, self._dropped, self._entropy):
            counts.zero_()
        self.forwards = 0

    def told(self, ranks: Ranks) -> dict[str, Any]:
        """Per layer: the load of each expert relative to their mean, the share dropped, the mean entropy in nats."""
        load, dropped, entropy = (ranks.sum(counts) for counts in (self._load, self._dropped, self._entropy))
        of_layers = load.split(self.experts)
        assigned = torch.stack([of_layer.sum() for of_layer in of_layers])
        return {
            "load": [relative(of_layer).tolist() for of_layer in of_layers],
            "dropped": (dropped / assigned).tolist(),
            "entropy": (entropy / self.forwards).tolist(),
        }

    def state_dict(self, ranks: Ranks) -> dict[str, Any]:
        """Of all ranks together."""
        counts = {"load": self._load, "dropped": self._dropped, "entropy": self._entropy}
        return {name: ranks.sum(tensor) for name, tensor in counts.items()} | {"routed_steps": self.forwards}

    def load_state_dict(self, state: dict[str, Any], ranks: Ranks) -> None:
        """Goes on from what `state_dict` gave."""
        self.forwards = state["routed_steps"]
        if ranks.first:
            self._load.copy_(state["load"].flatten())  # an older program had a row for each layer
            self._entropy.copy_(state["entropy"])
            if "dropped" in state:
                self._dropped.copy_(state["dropped"])


def relative(load: Tensor) -> Tensor:
    """Counts ``(E,)`` relative to their mean, float32."""
    return load / load.sum() * len(load)
