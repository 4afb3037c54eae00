"""What is converted: tensors, with MoE layers under dmoe's names, and what is known of where they come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dmoe.checkpoint.stored import Stored
from dmoe.config import MoEConfig


@dataclass
class Model:
    """A whole model, on no rank in particular, whatever its files are.

    Attributes:
        tensors: by name, in the model's order. In MoE layers the names are ``layer +`` those of :class:`dmoe.MoE`'s
            ``state_dict()`` (``router.weight``, ``experts.up_proj`` ...), and shapes are dmoe's; every other tensor has
            the name that it has in its own system, or, where ``gpt`` is set, in :class:`dmoe.models.MoEGPT`.
        layers: the prefix of each MoE layer, as ``blocks.1.ffn.``, in order, with its config; None where the files do
            not tell, or dmoe lacks an option that the layer needs.
        gpt: what :meth:`dmoe.models.MoEGPTConfig.to_json` gives, where the model is such a one; else None.
        origin: plain JSON data: the layout (``"layout"``) that it was read from, and what writing that layout again
            needs besides the tensors.
        beside: what stood beside the model in its files, as ``args``: for layouts that can hold it. Never executed.
        files: paths of other files that belong to it, by what they are: ``vocab``, ``merges``.
        notes: sentences for the user, as of options that dmoe does not have.
    """

    tensors: dict[str, Stored]
    layers: dict[str, MoEConfig | None]
    gpt: dict[str, Any] | None = None
    origin: dict[str, Any] = field(default_factory=dict)
    beside: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def of_layer(self, layer: str) -> Mapping[str, Stored]:
        """The tensors of a MoE layer, by their names in it."""
        return {name[len(layer) :]: tensor for name, tensor in self.tensors.items() if name.startswith(layer)}

    def layer_of(self, name: str) -> str | None:
        """The MoE layer that a tensor belongs to; None for any other."""
        ends = [position + 1 for position, letter in enumerate(name) if letter == "."]
        return next((name[:end] for end in (0, *ends) if name[:end] in self.layers), None)
