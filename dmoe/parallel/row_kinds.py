"""What kind of rows a rank is about to send: told with the counts, and the same on all ranks.

Ranks whose rows differ would wait for each other in the exchange to come, or in backward's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmoe.parallel.agreement import raise_unless_equal
from dmoe.parallel.wire import WIRE_DTYPES

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_MODES = ("any", "evaluation", "training")
_NEEDS = ("none", "x", "gate_weights", "x and gate_weights")
_WIRES = (None, *((kind, narrow_gradients) for kind in WIRE_DTYPES for narrow_gradients in (False, True)))


def kind_of(
    x: Tensor, choices: Tensor, gates: Tensor, wire_dtype: str | None, wire_backward: bool, mode: str
) -> list[int]:
    """Four integers: H, K, the dtype with the wire's, and whose gradients backward will exchange with the mode.

    Args:
        x: ``(T, H)`` of one of :data:`DTYPES`.
        choices, gates: ``(T, K)``.
        wire_dtype, wire_backward, mode: of the dispatcher.
    """
    wire = _WIRES.index(None if wire_dtype is None else (wire_dtype, wire_backward))
    needs = (x.requires_grad + 2 * gates.requires_grad) if torch.is_grad_enabled() else 0
    both = DTYPES.index(x.dtype) + len(DTYPES) * wire, needs + len(_NEEDS) * _MODES.index(mode)
    return [x.shape[1], choices.shape[1], *both]


def check_kinds(received: list[list[list[int]]]) -> None:
    """Are all ranks' rows of one kind?

    Args:
        received: by tensor-parallel rank and rank two counts and the four integers of :func:`kind_of`.

    Raises:
        ValueError: they are not; on every rank that was told of the others.
    """
    kinds = [
        {
            "H": str(hidden),
            "K": str(top_k),
            "dtype": str(DTYPES[dtype % len(DTYPES)]),
            "wire_dtype, wire_backward": str(_WIRES[dtype // len(DTYPES)]),
            "requires_grad": _NEEDS[gradient % len(_NEEDS)],
            "mode": _MODES[gradient // len(_NEEDS)],
        }
        for counts in received
        for _, _, hidden, top_k, dtype, gradient in counts
    ]
    ranks = len(received[0])
    numbered = f" (rank = rank in group + {ranks} * rank in tp_group)" if len(received) > 1 else ""
    raise_unless_equal("dispatch" + numbered, kinds, {})
