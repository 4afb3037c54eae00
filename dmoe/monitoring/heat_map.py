"""The load of all layers in one step as a small picture: a row for each layer, a square for each expert."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dmoe.monitoring.records import StepRecord

# Blue below an even load, pale at it, orange above: told apart by everybody, and by their lightness.
STOPS = ((24, 59, 110), (84, 142, 196), (240, 240, 236), (236, 150, 62), (140, 45, 4))
_SQUARE = 12  # pixels


def heat_map(record: StepRecord) -> Tensor:
    """``(12 * L, 12 * E, 3)`` uint8. The scale is logarithmic: an eighth of an even load or less, to eight times it.

    Layers with fewer experts than the widest one end in white.

    Args:
        record: of a step with at least one layer.
    """
    widest = max(len(layer.load) for layer in record.layers.values())
    image = torch.full((len(record.layers), widest, 3), 255, dtype=torch.uint8, device="cpu")
    for row, layer in enumerate(record.layers.values()):
        colours = [colour(share * len(layer.load)) for share in layer.load]
        image[row, : len(colours)] = torch.tensor(colours, dtype=torch.uint8, device="cpu")
    return image.repeat_interleave(_SQUARE, 0).repeat_interleave(_SQUARE, 1)


def colour(times_even: float) -> tuple[int, int, int]:
    """Red, green and blue of a load, as a multiple of an even one."""
    place = (math.log2(times_even) if times_even > 0 else -3.0) / 3.0
    place = (min(max(place, -1.0), 1.0) + 1.0) * (len(STOPS) - 1) / 2
    first = min(int(place), len(STOPS) - 2)
    rest = place - first
    red, green, blue = (
        round(low + (high - low) * rest) for low, high in zip(STOPS[first], STOPS[first + 1], strict=True)
    )
    return red, green, blue
