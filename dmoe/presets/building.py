"""From what is published and what the caller wants otherwise to a config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from dmoe.config import MoEConfig

Width = int | Sequence[int]  # of the experts: all alike, or one each

_FIELDS = tuple(field.name for field in fields(MoEConfig))
# An override of the left says the same thing in another way, so that what is published of the right no longer holds.
_INSTEAD_OF = {
    "init_std": ("init",),
    "init": ("init_std",),
    "bias": ("frozen_down_bias",),
    "capacity": ("capacity_factor", "eval_capacity_factor", "eval_capacity_fraction"),
    "losses": ("load_balancing_coefficient", "router_z_loss_coefficient"),
}
_DROPLESS = ("eval_capacity_factor", "eval_capacity_fraction", "min_capacity", "capacity_multiple_of")


def config_of(preset: str, published: Mapping[str, Any], overrides: Mapping[str, Any]) -> MoEConfig:
    """The config of a preset.

    Args:
        preset: its name, for errors.
        published: fields as the original has them.
        overrides: fields as the caller wants them; what says the same in another way gives way to them: ``init`` to an
            ``init_std``, a capacity factor to a ``capacity``, the capacity of evaluation to ``capacity_factor=None``.

    Raises:
        TypeError: overrides that are no fields.
        ValueError: a coefficient that this preset's ``losses`` would hide, or what :class:`dmoe.MoEConfig` refuses.
    """
    unknown = ", ".join(sorted(set(overrides) - set(_FIELDS)))
    if unknown:
        raise TypeError(f"presets.{preset}: expected its own arguments and fields of MoEConfig, got {unknown}")
    hidden = [name for name in _INSTEAD_OF["losses"] if name in overrides]
    if hidden and "losses" in published and "losses" not in overrides:
        raise ValueError(
            f"presets.{preset}: {hidden[0]}: expected losses=..., by which this preset names its losses "
            f"({dict(published['losses'])}), got {overrides[hidden[0]]!r}"
        )
    given_up = [name for override in overrides for name in _INSTEAD_OF.get(override, ())]
    if not overrides.get("capacity_factor", True):
        given_up += _DROPLESS
    kept = {name: value for name, value in published.items() if name not in given_up}
    return MoEConfig(**{**kept, **overrides})
