"""What ``--override.imports`` names: one function for each component of torchtitan that becomes dmoe's.

::

    --override.imports dmoe.integrations.torchtitan.overrides.experts
    --override.imports 'dmoe.integrations.torchtitan.overrides.experts={"wire_dtype": "fp8"}' \\
        dmoe.integrations.torchtitan.overrides.selective_ac
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from torchtitan.config import derive, override
from torchtitan.distributed.activation_checkpoint import SelectiveAC
from torchtitan.models.common.moe import RoutedExperts

from dmoe.integrations.torchtitan.routed_experts import DmoeRoutedExperts
from dmoe.integrations.torchtitan.selective_ac import DmoeSelectiveAC


@override(target=RoutedExperts.Config, exact=True, description="experts, and tokens on their way to them, by dmoe")
def experts(config: Any, **options: Any) -> Any:
    """The config of :class:`DmoeRoutedExperts` for that of torchtitan's ``RoutedExperts``.

    Args:
        config: of one layer, with its sharding.
        **options: fields of ``DmoeRoutedExperts.Config`` that torchtitan does not have.

    Raises:
        ValueError: an option that there is not, or experts that compute in a way of their own.
    """
    known = {field.name for field in fields(DmoeRoutedExperts.Config)} - {field.name for field in fields(config)}
    if not options.keys() <= known:
        raise ValueError(
            f"experts: expected options of {', '.join(sorted(known))}, got {', '.join(sorted(options.keys() - known))}"
        )
    return derive(config, DmoeRoutedExperts.Config, **options)


@override(target=SelectiveAC.Config, exact=True, description="dmoe's experts are not computed again")
def selective_ac(config: Any) -> Any:
    """The config of :class:`DmoeSelectiveAC` for that of torchtitan's ``SelectiveAC``."""
    return derive(config, DmoeSelectiveAC.Config)
