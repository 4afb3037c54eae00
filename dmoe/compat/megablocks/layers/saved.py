"""What layers leave behind for a loss over all of them: bounded, and empty after an evaluation or a recomputation.

MegaBlocks keeps this in module-level lists that grow, graphs included, until they are cleared. Here a list holds one
round: when a layer that has left something leaves it again, although as many entries as a round has (``num_layers``)
are there, then nobody has cleared the last round, and it is dropped. So layers may be called several times in a round,
models may leave ``num_layers`` at 1, and memory stays that of one round.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch

from dmoe.compat.megablocks.layers.arguments import Arguments


class _Entry(NamedTuple):
    value: Any
    owner: int | None  # id of the layer
    recorded: bool  # whether autograd was on


def layers_per_stage(args: Arguments) -> int:
    """How many entries a round has: the MoE layers of one (virtual) pipeline stage."""
    if args.num_layers_per_virtual_pipeline_stage is not None:
        return args.num_layers_per_virtual_pipeline_stage
    return args.num_layers // args.pipeline_model_parallel_size


class Rounds:
    """A list of what layers left, in order.

    Args:
        what: for messages.
        clear_with: name of the function that clears it, for messages.
    """

    def __init__(self, what: str, clear_with: str) -> None:
        self.what, self.clear_with = what, clear_with
        self._entries: list[_Entry] = []
        self._warned = False

    def __len__(self) -> int:
        return len(self._entries)

    def values(self) -> list[Any]:
        """The values, in a list of the caller's own."""
        return [entry.value for entry in self._entries]

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()

    @torch.compiler.disable  # traced, it would be compiled anew for every length of the list
    def save(self, value: Any, owner: object | None = None, args: Arguments | None = None) -> None:
        """Append a value; of a layer (``owner`` and its ``args``), or of a caller who clears it in time.

        A forward inside a backward is activation checkpointing's second one, whose value is in use already: it leaves
        nothing. Under ``torch.compile`` this is a graph break, so ``fullgraph=True`` wants the losses' weights at 0.
        """
        if owner is not None and args is not None:
            if torch._C._current_graph_task_id() != -1:
                return
            if len(self) >= layers_per_stage(args) and any(entry.owner == id(owner) for entry in self._entries):
                self._drop_round()
        self._entries.append(_Entry(value, None if owner is None else id(owner), torch.is_grad_enabled()))

    def check_recorded(self) -> None:
        """Refuse to make a loss without a gradient of what ran under ``no_grad``.

        Raises:
            RuntimeError: autograd is on, and was off when an entry was saved.
        """
        if torch.is_grad_enabled() and not all(entry.recorded for entry in self._entries):
            raise RuntimeError(
                f"the {self.what} has no graph, because a layer's forward ran under no_grad, as under reentrant "
                "activation checkpointing: use checkpoint(..., use_reentrant=False); for the value alone, ask for it "
                "under torch.no_grad()"
            )

    def _drop_round(self) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"dmoe.compat.megablocks: a second round of forwards began before the {self.what} of the first was "
                f"cleared; the first is dropped. Call {self.clear_with}() after each step, or set its weight to 0.",
                stacklevel=4,
            )
        self.clear()
