"""What is converted: tensors, with MoE layers under dmoe's names, and what is known of where they come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from dmoe.checkpoint.options_of import options_of
from dmoe.checkpoint.stored import Stored
from dmoe.config import MoEConfig

_OURS = ("router.", "experts.", "shared_expert.", "output_bias")  # what the names in a MoE layer begin with


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
        from_json: whether ``gpt`` and ``origin`` stood in a file, where anything may stand.
    """

    tensors: dict[str, Stored]
    layers: dict[str, MoEConfig | None]
    gpt: dict[str, Any] | None = None
    origin: dict[str, Any] = field(default_factory=dict)
    beside: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    from_json: bool = False

    def of_layer(self, layer: str) -> dict[str, Stored]:
        """The tensors of a MoE layer, by the names of :class:`dmoe.MoE`'s state dict."""
        starts = tuple(layer + each for each in _OURS)
        return {name[len(layer) :]: tensor for name, tensor in self.tensors.items() if name.startswith(starts)}

    def layer_of(self, name: str) -> str | None:
        """The MoE layer that a tensor belongs to; None for any other."""
        ends = [0, *(position + 1 for position, letter in enumerate(name) if letter == ".")]
        return next((name[:end] for end in ends if name[:end] in self.layers and name.startswith(_OURS, end)), None)

    def with_layers(self, made: Callable[[str], Mapping[str, Stored]]) -> dict[str, Stored]:
        """All tensors in order, those of a MoE layer as ``made(prefix)`` has them, where the first of them stands.

        Raises:
            ValueError: a name twice.
        """
        found: dict[str, Stored] = {}
        done: set[str] = set()
        for name, stored in self.tensors.items():
            layer = self.layer_of(name)
            if layer in done:
                continue
            several = {name: stored} if layer is None else made(layer)
            done |= set() if layer is None else {layer}
            if twice := found.keys() & several.keys():
                raise ValueError(f"{min(twice)}: expected one tensor of this name, got two")
            found |= several
        return found

    def set_config(self, layer: str, build: Callable[..., MoEConfig], settings: Mapping[str, Any]) -> None:
        """Keep a layer's config.

        Args:
            layer: its prefix.
            build: makes a config of fields that are known, and fills in what is not.
            settings: what the user says.

        Raises:
            ValueError: what the user says disagrees with the tensors, or makes no layer.
        """
        where = layer.removesuffix(".") or "the layer"
        facts = options_of(self.of_layer(layer))
        for name in facts.keys() & settings.keys():
            if settings[name] != facts[name]:
                raise ValueError(
                    f"{where}: {name}: expected {facts[name]!r}, which its tensors have, got {settings[name]!r}"
                )
        one = {"top_k": 1} if facts["num_experts"] == 1 else {}  # whatever a system's layer has by default
        try:
            self.layers[layer] = build(**{**one, **facts, **settings})
        except (ValueError, TypeError) as error:
            raise ValueError(f"{where}: {error}") from None

    def their_prefix(self, layer: str, nested: str) -> str:
        """A layer's prefix in a system that has no name for the mixture beside a dense block (PR-MoE), as ours has."""
        outer = layer.removesuffix(nested) if nested else layer
        return outer if f"{outer}coefficient.weight" in self.tensors else layer

    def apply_settings(self, settings: Mapping[str, Any]) -> None:
        """Let the layers' configs say what the user does, where reading has not seen to it.

        Raises:
            ValueError: no such field, a value that it cannot have, or that disagrees with the tensors; or a GPT, whose
                files say all of it.
        """
        if not settings:
            return
        if self.gpt is not None:
            raise ValueError(
                f"--set: expected nothing for a GPT, whose files tell all options, got {', '.join(settings)}"
            )
        for layer, config in list(self.layers.items()):
            if config is None or any(getattr(config, name, None) != value for name, value in settings.items()):
                self.set_config(layer, MoEConfig if config is None else partial(_changed, config, settings), settings)

    def note(self, sentence: str) -> None:
        """Keep a sentence for the user, once."""
        if sentence not in self.notes:
            self.notes.append(sentence)


def _changed(config: MoEConfig, settings: Mapping[str, Any], **_: Any) -> MoEConfig:
    return replace(config, **settings)
