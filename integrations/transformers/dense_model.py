"""A dense language model in files: its config, what its tensors are called, and its FFNs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmoe.checkpoint.hub_folder import HubFolder, read_json
from dmoe.integrations.transformers.dense_traits import traits_of
from dmoe.integrations.transformers.upcycle_families import Recipe

_FFN = re.compile(r"model\.layers\.\d+\.mlp\.")
_IN_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_OLD_BUFFER = re.compile(r".*\.rotary_emb\.inv_freq")  # in files from before 2024; computed from the config since then


class DenseModel:
    """Opened for reading, and checked: every tensor of its family is there, and no other. A context manager.

    Args:
        folder: in Hugging Face's format.

    Attributes:
        folder: where it is.
        config: of Transformers.
        traits: what it computes around its FFNs.
        tensors: by name, read lazily.
        num_layers: L.
        dtype: of its FFNs.

    Raises:
        ValueError: it is of no known family, or its tensors are not those of its config; see :func:`traits_of`.
        OSError: files are missing.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import AutoConfig

        self.folder = folder
        raw = read_json(folder / "config.json")
        if "model_type" not in raw:
            raise ValueError(f"{folder / 'config.json'}: expected a model_type, got none")
        try:
            self.config: Any = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            self.traits = traits_of(self.config)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error
        self.tensors = HubFolder(folder)
        self.num_layers: int = self.config.num_hidden_layers
        self._check_tensors()
        self.dtype = self.tensors.dtype(self._ffn_names(0)[0])

    def __enter__(self) -> DenseModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.tensors.close()

    def ffn(self, layer: int) -> tuple[list[Tensor], Tensor]:
        """The gate and up projection of a layer, ``(F, H)`` each, and the down projection, ``(H, F)``."""
        gate, up, down = (self.tensors.read(name) for name in self._ffn_names(layer))
        return [gate, up], down

    def outside_layers(self) -> list[str]:
        """Embeddings, the last norm, the head."""
        return [name for name in self._names() if _IN_LAYER.match(name) is None]

    def of_layer(self, layer: int, *, with_ffn: bool) -> list[str]:
        """The tensors of one layer."""
        names = [name for name in self._names() if name.startswith(f"model.layers.{layer}.")]
        return [name for name in names if with_ffn or _FFN.match(name) is None]

    def check_ffns_of(self, other: DenseModel) -> None:
        """Raise ValueError unless another model's FFNs could stand where this one's do."""
        for field in ("hidden_size", "intermediate_size", "num_hidden_layers", "hidden_act"):
            mine, its = getattr(self.config, field), getattr(other.config, field)
            if mine != its:
                raise ValueError(f"{other.folder}: {field}: expected {mine}, as {self.folder} has, got {its}")

    def check_target(self, config: Any, recipe: Recipe) -> None:
        """Raise ValueError unless a mixture's model has a place for every tensor but the experts', and no other.

        Args:
            config: the mixture's.
            recipe: which of its layers have experts.
        """
        places = _parameters(config)
        for name in (*self.outside_layers(), *self._layer_names(recipe)):
            if places.get(name) != self.tensors.shape(name):
                raise ValueError(
                    f"{self.folder}: {name} {self.tensors.shape(name)}: expected the same in {config.model_type}, got "
                    f"{places.get(name, 'none')}"
                )

    def _layer_names(self, recipe: Recipe) -> list[str]:
        layers = range(self.num_layers)
        return [name for layer in layers for name in self.of_layer(layer, with_ffn=not recipe.is_moe(layer))]

    def _ffn_names(self, layer: int) -> list[str]:
        return [f"model.layers.{layer}.mlp.{name}_proj.weight" for name in ("gate", "up", "down")]

    def _names(self) -> list[str]:
        return [name for name in self.tensors if not _OLD_BUFFER.fullmatch(name)]

    def _check_tensors(self) -> None:
        expected = _parameters(self.config)
        tied = {"lm_head.weight"} if self.config.tie_word_embeddings else set()
        for name, shape in expected.items():
            if name not in self.tensors and name not in tied:
                raise ValueError(f"{self.folder}: expected a tensor {name}, as {self.config.model_type} has, got none")
            if name in self.tensors and self.tensors.shape(name) != shape:
                raise ValueError(
                    f"{self.folder}: {name}: expected the shape {shape}, as config.json says, got "
                    f"{self.tensors.shape(name)}"
                )
        for name in self._names():
            if name not in expected:
                raise ValueError(f"{self.folder}: expected the tensors of {self.config.model_type}, got {name} too")


def _parameters(config: Any) -> Mapping[str, tuple[int, ...]]:
    """Names and shapes of a language model of a config; nothing is allocated."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
