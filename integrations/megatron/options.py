"""How dmoe's own options, which have no name in Megatron, get from its command line to a layer."""

from __future__ import annotations

from typing import Any

from dmoe.integrations.megatron.training_loop import running_args
from dmoe.integrations.megatron.translate import OPTIONS, PREFIX


def options_from_args(args: Any) -> dict[str, Any]:
    """Fields of :class:`dmoe.MoEConfig` as the specs' ``options=`` takes them, those that were given.

    Args:
        args: parsed by a parser that :func:`add_moe_args` has extended; any others hold none.
    """
    values = {name: getattr(args, PREFIX + name, None) for name in OPTIONS}
    return {name: value for name, value in values.items() if value is not None}


def current_options() -> dict[str, Any]:
    """Those on the command line of the running training loop; none outside of Megatron's."""
    args = running_args()
    return {} if args is None else options_from_args(args)
