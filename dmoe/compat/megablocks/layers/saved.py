"""What layers leave behind for a loss over all of them: bounded, and empty after an evaluation or a recomputation.

MegaBlocks keeps this in module-level lists that grow, graphs included, until they are cleared, and its loss refuses
more than one entry for each layer. Here entries stand in rounds, one for each forward of the model: a round begins when
a layer that has left something leaves it again, although as many entries as a round has (``num_layers``) are there. So
layers may be called several times in a round, and models may leave ``num_layers`` at 1.

Gradient accumulation and pipelines run several forwards before the first backward: of these every round is there. A
round before the last is kept only as long as the caller keeps the graph of that forward, and has not run backward
through it. Then nobody has cleared it in time, and it is dropped with a warning: what is held is the last round, and
what the caller holds anyway.
"""

from __future__ import annotations

import warnings
import weakref
from typing import Any

import torch
from torch import Tensor

from dmoe.compat.megablocks.layers.arguments import Arguments


class _Entry:
    """What one layer left.

    Attributes:
        value: for the loss.
        recorded: whether autograd was on.
        in_graph: whether the graph of the layer's result holds this entry.
        spent: whether a backward has passed that graph.
    """

    def __init__(self, value: Any, result: Tensor | None) -> None:
        self.value, self.recorded, self.spent = value, torch.is_grad_enabled(), False
        self.in_graph = result is not None and result.grad_fn is not None
        if result is not None and self.in_graph:
            result.register_hook(self._pass)

    def _pass(self, grad: Tensor) -> None:
        self.spent = True


def layers_per_stage(args: Arguments) -> int:
    """How many entries a round has: the MoE layers of one (virtual) pipeline stage."""
    if args.num_layers_per_virtual_pipeline_stage is not None:
        return args.num_layers_per_virtual_pipeline_stage
    return args.num_layers // args.pipeline_model_parallel_size


class Rounds:
    """What layers left, in order.

    Args:
        what: for messages.
        clear_with: name of the function that clears it, for messages.
    """

    def __init__(self, what: str, clear_with: str) -> None:
        self.what, self.clear_with = what, clear_with
        self._earlier: list[list[weakref.ref[_Entry]]] = []
        self._last: list[_Entry] = []
        self._owners: set[int] = set()  # ids of the layers of the last round
        self._warned = False

    def __len__(self) -> int:
        return len(self.values())

    def rounds(self) -> list[list[Any]]:
        """The values of each round; none at all where there is nothing."""
        return [[entry.value for entry in entries] for entries in self._entries()]

    def values(self) -> list[Any]:
        """The values, in a list of the caller's own."""
        return [value for values in self.rounds() for value in values]

    def clear(self) -> None:
        """Forget everything."""
        self._earlier, self._last, self._owners = [], [], set()

    @torch.compiler.disable  # traced, it would be compiled anew for every length of the list
    def save(
        self, value: Any, owner: object | None = None, args: Arguments | None = None, result: Tensor | None = None
    ) -> None:
        """Append a value; of a layer, or of a caller who clears it in time.

        A forward inside a backward is activation checkpointing's second one, whose value is in use already: it leaves
        nothing. Under ``torch.compile`` this is a graph break, so ``fullgraph=True`` wants the losses' weights at 0.

        Args:
            value: what the loss needs.
            owner, args: the layer.
            result: what the layer computes of that value, by which is known whether its graph is still needed.
        """
        if owner is not None and args is not None:
            if torch._C._current_graph_task_id() != -1:
                return
            if len(self._last) >= layers_per_stage(args) and id(owner) in self._owners:
                self._begin_round()
            self._owners.add(id(owner))
        self._last.append(_Entry(value, result))

    def check_recorded(self) -> None:
        """Refuse to make a loss without a gradient of what ran under ``no_grad``.

        Raises:
            RuntimeError: autograd is on, and was off when an entry was saved.
        """
        if torch.is_grad_enabled() and not all(entry.recorded for entries in self._entries() for entry in entries):
            raise RuntimeError(
                f"the {self.what} has no graph, because a layer's forward ran under no_grad, as under reentrant "
                "activation checkpointing: use checkpoint(..., use_reentrant=False); for the value alone, ask for it "
                "under torch.no_grad()"
            )

    def _entries(self) -> list[list[_Entry]]:
        """The entries of each round that is still needed; the others are dropped."""
        kept, needed = [], []
        for references in self._earlier:
            entries = [entry for reference in references if (entry := reference()) is not None and not entry.spent]
            if len(entries) == len(references):
                kept.append(references)
                needed.append(entries)
            else:
                self._warn()
        self._earlier = kept
        return [*needed, self._last] if self._last else needed

    def _begin_round(self) -> None:
        if all(entry.in_graph for entry in self._last):
            self._earlier.append([weakref.ref(entry) for entry in self._last])
        else:
            self._warn()
        self._last, self._owners = [], set()
        self._entries()

    def _warn(self) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"dmoe.compat.megablocks: a second round of forwards began before the {self.what} of the first was "
                f"cleared; the first is dropped. Call {self.clear_with}() after each step, or set its weight to 0.",
                stacklevel=2,
            )
