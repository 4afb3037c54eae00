"""Which class a layer's shared expert is."""

from __future__ import annotations

from dmoe.compat.megablocks.layers import glu, mlp
from dmoe.compat.megablocks.layers.arguments import Arguments

_REGISTRY: dict[str, type[mlp.SharedMLP]] = {"mlp": mlp.SharedMLP, "glu": glu.SharedGLU}


def get(args: Arguments) -> mlp.SharedMLP:
    """The shared expert that ``args.mlp_type`` asks for.

    Raises:
        ValueError: a type that is not registered.
    """
    if args.mlp_type not in _REGISTRY:
        raise ValueError(f"sharedexpert_registry: mlp_type: expected one of {sorted(_REGISTRY)}, got {args.mlp_type!r}")
    return _REGISTRY[args.mlp_type](args)
