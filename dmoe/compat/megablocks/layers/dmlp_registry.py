"""Which class the experts of a dropless layer are."""

from __future__ import annotations

from dmoe.compat.megablocks.layers import glu, mlp
from dmoe.compat.megablocks.layers.arguments import Arguments

MlpType = mlp.SparseMLP | glu.SparseGLU

_REGISTRY: dict[str, dict[str, type[mlp.SparseMLP]]] = {
    "mlp": {"grouped": mlp.GroupedMLP, "sparse": mlp.SparseMLP},
    "glu": {"grouped": glu.GroupedGLU, "sparse": glu.SparseGLU},
}


def get(args: Arguments) -> mlp.SparseMLP:
    """The experts that ``args.mlp_type`` and ``args.mlp_impl`` ask for.

    Raises:
        ValueError: a type or an implementation that is not registered.
    """
    for name, known in (("mlp_type", _REGISTRY), ("mlp_impl", _REGISTRY.get(args.mlp_type, {}))):
        if getattr(args, name) not in known:
            raise ValueError(f"dmlp_registry: {name}: expected one of {sorted(known)}, got {getattr(args, name)!r}")
    return _REGISTRY[args.mlp_type][args.mlp_impl](args)
