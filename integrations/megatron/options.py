"""How dmoe's own options, which have no name in Megatron, get from its command line to a layer."""

from __future__ import annotations

import sys
from typing import Any

from dmoe.integrations.megatron.translate import OPTIONS, PREFIX


def options_from_args(args: Any) -> dict[str, Any]:
    """Fields of :class:`dmoe.MoEConfig` as the specs' ``options=`` takes them, those that were given.

    Args:
        args: parsed by a parser that :func:`add_moe_args` has extended; any others hold none.
    """
    values = {name: getattr(args, PREFIX + name, None) for name in OPTIONS}
    return {name: value for name, value in values.items() if value is not None}


def current_options() -> dict[str, Any]:
    """Those on the command line of the running training loop; none outside of Megatron's.

    Megatron copies to a TransformerConfig only what the TransformerConfig has, but keeps all arguments at hand for
    whoever builds a model. A program that never loaded ``megatron.training`` has none.
    """
    training = sys.modules.get("megatron.training")
    if training is None:
        return {}
    try:
        args = training.get_args()
    except AssertionError:  # Megatron's word for: none have been parsed
        return {}
    return options_from_args(args)
